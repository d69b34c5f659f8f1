"""Carrying a merge out: stage, continue what was interrupted, check, publish."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from polyak.checkpoints.merging.engine import Sink, run
from polyak.checkpoints.merging.journal import Hashes, Journal, check_written, is_complete
from polyak.checkpoints.merging.outputs import (
    Staged,
    check_space,
    leftovers,
    refuse_foreign,
    refuse_parts_in_one_file,
    staging_errors,
    staging_folder,
)
from polyak.checkpoints.merging.plan import ByteRuns, share_of_chunks
from polyak.checkpoints.merging.prepare import Merge
from polyak.checkpoints.merging.weights import UNHASHED, with_hashes
from polyak.checkpoints.reading.dcp import DcpCheckpoint
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.writing.layouts import OutputFile
from polyak.errors import OutputError, PolyakError, UsageError
from polyak.files import check_place, refuse_existing, take_lock, writing_errors

_DONE = "whole"  # a mark in the first staging folder: all data is on the disk and may be published


def execute(merge: Merge) -> bool:
    """Do the merge, or this process's part of it; whether the outputs are published now.

    Staged data is kept for `resume` after a crash or a full disk, and removed if an input was invalid.

    What a kill leaves: before the mark, staging folders whose journal says which chunks are done, and
    resuming does the others. After it, some outputs may be published and some not, and resuming only ends
    the publishing. The mark is in the first staging folder, which is removed last, so that it is there
    as long as anything is left to publish.
    """
    refuse_parts_in_one_file(merge.blueprints, merge.inputs[-1])
    staged = [Staged(one, merge.identity) for one in merge.blueprints]
    if _is_published(merge):
        return True
    with writing_errors(merge.blueprints[0].target):
        _check_targets(merge, staged)
    if (staged[0].folder / _DONE).exists():
        return _publish(staged)
    with writing_errors(merge.blueprints[0].target):
        check_space(merge.blueprints, merge.identity)
    try:
        return _stage(merge, staged)
    except PolyakError as error:
        if not isinstance(error, OutputError) and merge.options.share[1] == 1:
            for one in staged:
                one.discard()
        raise
    finally:
        for one in staged:
            one.close()


def check_outputs(merge: Merge) -> None:
    """Raise OutputError where the merge could not be written; nothing is touched.

    What a merge that was begun finds at its outputs may be its own; `execute` looks at that.
    """
    with writing_errors(merge.blueprints[0].target):
        _check_outputs(merge)


def _check_outputs(merge: Merge) -> None:
    refuse_parts_in_one_file(merge.blueprints, merge.inputs[-1])
    for one in merge.blueprints:
        check_place(one.target)
    begun = any(staging_folder(o.target, merge.identity).exists() for o in merge.blueprints)
    if begun or merge.options.resume:
        return
    for one in merge.blueprints:
        refuse_existing(one.target, overwrite=merge.options.overwrite)
        refuse_foreign(one)
    check_space(merge.blueprints, merge.identity)


def _stage(merge: Merge, staged: Sequence[Staged]) -> bool:
    keep = merge.options.resume and all(one.exists for one in staged)
    for one in staged:
        one.open()
    index, count = merge.options.share
    chunks = share_of_chunks(merge.plan, index, count)
    path = staged[0].folder / f"journal-{index + 1}of{count}"
    journal = Journal(path, len(merge.plan), len(staged), keep=keep)
    try:
        hashes = _hashes(merge) if count == 1 else None
        runs = [one.byte_runs(merge.plan) for one in staged]
        try:
            _merge(merge, runs, journal, chunks)
            _check_inputs(merge)
        except BaseException:
            if hashes:
                hashes.stop()
            raise
        if not _others_are_done(merge, staged[0], chunks):
            return False
        return _complete(merge, staged, hashes or _hashes(merge))
    finally:
        journal.close()


def _merge(
    merge: Merge, runs: Sequence[Sequence[ByteRuns[Sink]]], journal: Journal, chunks: range
) -> None:
    """Run the engine over the chunks that are still to do, keeping the journal."""
    files = _files(runs)
    progress, lock = merge.options.progress, threading.Lock()
    finished = sum(journal.is_done(index) for index in chunks)

    def done(index: int, checksums: Sequence[int]) -> None:
        nonlocal finished
        journal.mark(index, checksums)
        journal.sync_if_due(files)
        if progress is not None:
            with lock:
                finished += 1
                progress(finished, len(chunks))

    todo = (index for index in chunks if not journal.is_done(index))
    run(merge.job(runs), todo, merge.threads, done, checksums=merge.options.verify)
    if merge.options.verify or merge.options.share[1] > 1:  # else finishing syncs the files
        journal.sync(files)
    if merge.options.verify:
        written = cast("Sequence[Sequence[ByteRuns[OutputFile]]]", runs)
        check_written(merge.plan, written, journal, chunks)


def _complete(merge: Merge, staged: Sequence[Staged], hashes: Hashes | None) -> bool:
    """Write what is only known now, then move everything into place."""
    found = hashes.result() if hashes else {}
    _check_inputs(merge)
    try:
        for one in staged:
            one.finish(with_hashes(one.blueprint.metadata, found))
        with staging_errors(staged[0].folder):
            (staged[0].folder / _DONE).touch()
        return _publish(staged)
    except OutputError:
        # Another part that was done at the same moment may have published everything already.
        if all(one.blueprint.target.exists() and not one.folder.exists() for one in staged):
            return True
        raise


def _check_inputs(merge: Merge) -> None:
    for checkpoint in merge.all_inputs:
        checkpoint.check_unchanged()


def _publish(staged: Sequence[Staged]) -> bool:
    for one in staged:
        one.publish()
    for one in reversed(staged):  # the first holds the mark by which a killed publishing is resumed
        one.discard()
    return True


def _hashes(merge: Merge) -> Hashes | None:
    if not merge.options.verify:
        return None
    return Hashes([file for one in merge.inputs for file in one.files])


def _others_are_done(merge: Merge, first: Staged, mine: range) -> bool:
    """Whether all other parts have all their chunks on the disk."""
    _, count = merge.options.share
    parts = {i: share_of_chunks(merge.plan, i, count) for i in range(count)}
    return all(
        chunks == mine
        or is_complete(first.folder / f"journal-{i + 1}of{count}", chunks, len(merge.blueprints))
        for i, chunks in parts.items()
    )


def _check_targets(merge: Merge, staged: Sequence[Staged]) -> None:
    """Refuse what exists; deal with what other merges into the same outputs have left."""
    continuing = any(one.folder.exists() for one in staged)
    for one in staged:
        if not (continuing and (staged[0].folder / _DONE).exists()):
            refuse_existing(one.blueprint.target, overwrite=merge.options.overwrite)
            refuse_foreign(one.blueprint)
        foreign = [left for left in leftovers(one.blueprint.target) if left != one.folder]
        if foreign and merge.options.resume and not continuing:
            raise UsageError(
                f"{foreign[0]} was left by another merge: the inputs, the weights or polyak's version "
                "have changed since, so it cannot be continued. To start again, leave out resume=True."
            )
        if merge.options.share[1] == 1:
            for left in foreign if merge.options.resume else leftovers(one.blueprint.target):
                _remove_unless_held(left)


def _remove_unless_held(folder: Path) -> None:
    """Remove a leftover; OutputError where a running process holds its journal."""
    for journal in folder.glob("journal-*"):
        with journal.open("rb") as file:
            take_lock(file.fileno(), journal, "this output", shared=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_published(merge: Merge) -> bool:
    """Whether a resumed merge was already complete: its outputs exist, made in the same way."""
    if not merge.options.resume or merge.options.overwrite:
        return False
    expected: dict[str, object] = {t.name: (t.dtype, t.shape) for t in merge.alignment.tensors}
    options, newest = merge.options, merge.inputs[-1]
    if options.is_dcp:  # which holds tied tensors under all their names
        aliases = merge.alignment.ties.items()
        expected |= {alias: expected[name] for alias, name in aliases if name in expected}
    kept = options.key if isinstance(newest, DcpCheckpoint) and options.dcp_key is None else None
    key = options.dcp_key or kept if options.is_dcp else None
    return all(_holds(one.target, key, expected, dict(one.metadata)) for one in merge.blueprints)


def _holds(
    target: Path, key: str | None, tensors: dict[str, object], metadata: dict[str, str]
) -> bool:
    with suppress(PolyakError), open_checkpoint(target, key=key) as written:
        found = {name: (t.dtype, t.shape) for name, t in written.tensors.items()}
        said = _comparable(written.metadata)  # and more, where torch files hold scalars of the run
        return found == tensors and _comparable(metadata).items() <= said.items()
    return False


def _comparable(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without hashes, and without ties: each file of a folder lists its own."""
    metadata = {name: text for name, text in metadata.items() if name != "ties"}
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        inputs = json.loads(metadata["inputs"])
        for one in inputs:
            for path in one.get("sha256", {}):
                one["sha256"][path] = UNHASHED
        return {**metadata, "inputs": json.dumps(inputs)}
    return metadata


def _files(runs: Sequence[Sequence[ByteRuns[Sink]]]) -> list[OutputFile]:
    found = {id(sink): sink for output in runs for one in output for sink in one.sources}
    return [sink for sink in found.values() if isinstance(sink, OutputFile)]
