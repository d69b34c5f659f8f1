"""`kill -9` at a few random moments, then resume: the bytes of an uninterrupted run."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_merge.py"


def test_killed_merges_resume_to_the_same_bytes():
    spec = importlib.util.spec_from_file_location("kill_merge", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.run(rounds=2, megabytes=8)
