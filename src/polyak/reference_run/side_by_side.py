"""Legs of a run in processes side by side: each worker trains one leg at a time and reports its epochs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import PolyakError, UsageError
from polyak.reference_run.data import load_data
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.ranks import Ranks
from polyak.reference_run.recipe import SHORT_ARMS, Recipe

if TYPE_CHECKING:
    from polyak.reference_run.loop import Board, Leg, Trainer

_SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in pieces


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    leg: Leg | None = None


def run_side_by_side(trainer: Trainer, board: Board, jobs: int) -> None:
    """Train all unfinished legs in at most `jobs` processes.

    The bits are those of one process: a leg depends on nothing but its seed, and on the state in which
    it leaves SGD, which is a file. The longest legs begin first, so that no process waits at the end.
    """
    recipe = trainer.recipe
    arms = sorted(recipe.arms, key=lambda arm: (arm in SHORT_ARMS, recipe.arms.index(arm)))
    waiting = sorted(board.unfinished(), key=lambda leg: (arms.index(leg.arm), leg.seed))
    workers = [_started(trainer) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.leg for worker in workers):
            for worker in workers:
                leg = next(filter(board.is_ready, waiting), None)
                if worker.leg is None and leg is not None:
                    waiting.remove(leg)
                    worker.leg = leg
                    worker.pipe.send(leg)
            _take_one(workers, board)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _started(trainer: Trainer) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    threads = torch.get_num_threads()
    process = _SPAWN.Process(target=_work, args=(theirs, trainer.recipe, trainer.folder, threads))
    process.daemon = True
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _take_one(workers: list[_Worker], board: Board) -> None:
    """Wait for a worker to say something, and act on it."""
    ready = connection.wait([worker.pipe for worker in workers if worker.leg])
    for worker in workers:
        if worker.pipe not in ready or worker.leg is None:
            continue
        try:
            message = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            raise UsageError(
                f"The process that trained seed {worker.leg.seed}, arm {worker.leg.arm}, ended with the "
                f"exit code {worker.process.exitcode}; -9 is what the system does when memory runs out. "
                "Finished epochs are kept. Resume with fewer --jobs."
            ) from None
        if isinstance(message, BaseException):
            raise message
        if message is None:
            worker.leg = None
        else:
            board.take(worker.leg, message)


def _work(pipe: Connection, recipe: Recipe, folder: Path, threads: int) -> None:
    """The life of a worker: legs come in, the records of each epoch go out, then None."""
    from polyak.reference_run.loop import Trainer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        trainer = Trainer(recipe, load_data(recipe), Hardware.named(recipe.device), Ranks(), folder)
        while True:
            for records in trainer.run(pipe.recv()):
                pipe.send(records)
            pipe.send(None)
    except (EOFError, BrokenPipeError):  # the parent has ended
        return
    except PolyakError as error:
        with suppress(BrokenPipeError):
            pipe.send(error)


def _end_with_parent() -> None:
    """A parent that was killed must not leave a writer behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
