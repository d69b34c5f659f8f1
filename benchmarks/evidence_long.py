"""Is averaging worth it in a long run over few data? `polyak train long`, tuned, over paired seeds.

    python benchmarks/evidence_long.py                 # trains everything: about 2 core-hours
    python benchmarks/evidence_long.py --quick --output /tmp/long.jsonl     # a smoke test
    python benchmarks/evidence_long.py --write-docs    # the tables into docs/should-i-average.md

200 epochs over 8,000 images, the regime in which averaging was proposed. SGD, the constant rate and the cycles have
each their own rate: the best of three, equal trials, by the validation error of a seed that is not reported (NLL
where equal; of SGD's last weights, of the arms' SWA). The annealed run of half the length has SGD's. Then five other
seeds, on the test images. After an interruption it continues in --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from evidence_docs import Place

from polyak.reference_run import Run, load_recipe, train
from polyak.report.tables import Finals, format_estimate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence-long.jsonl"
TUNING_SEED = 100
RATES = (0.05, 0.1, 0.2)
CHOSEN_BY = {"sgd": "iterate", "swa": "swa", "cyclic": "swa"}  # whose validation error decides
QUICK = {"epochs": 8}

Records = list[dict[str, Any]]
