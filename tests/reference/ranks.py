"""Processes that are the ranks of one run, forked from this one, whose imports they share."""

from __future__ import annotations

import json
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from polyak.errors import PolyakWarning


def launch(target: Callable[..., None], n_ranks: int, *args: object) -> None:
    """Run `target(rank, n_ranks, *args)` in as many forked processes."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=target, args=(r, n_ranks, *args)) for r in range(n_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def become_rank(rank: int, n_ranks: int, port: int, **more: str) -> None:
    """What `torchrun` says to a process of one machine."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), **more)


def check_said(texts: Sequence[Mapping[str, str]], name: str) -> None:
    """Every rank has said "ok" of a check. Those that follow a failure have not been run."""
    for rank, said in enumerate(texts):
        text = said.get(name, "was not run: an earlier one has failed, or hangs")
        assert text == "ok", f"rank {rank} of {len(texts)}: {text}"


def said_in(folder: Path, n_ranks: int) -> list[dict[str, str]]:
    """What the ranks have written by `run_checks`."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n_ranks)]


def run_checks(checks: Mapping[str, Callable[[Path], None]], file: Path, folder: Path) -> None:
    """Run each in a folder of its own, and write what it has said: "ok" or the traceback."""
    said = {}
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", category=PolyakWarning)
    for name, check in checks.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            torch.distributed.barrier()
            check(folder / name)
            said[name] = "ok"
        except BaseException:
            said[name] = traceback.format_exc()
            break  # the ranks may have parted ways
        finally:
            file.write_text(json.dumps(said))


def whole(tensor: Any) -> Any:
    """A tensor with all its values, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
