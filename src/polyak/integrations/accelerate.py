"""Accelerate: an average that is saved and loaded with the rest of the training state.

Nothing else needs an adapter: `average.attach` finds the steps inside Accelerate's optimizer and the
schedule inside its scheduler, and `applied()` works on the model beneath its wrappers.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch

from polyak import Average, Averages, sharded
from polyak.errors import ArgumentError, FormatError, MissingExtra, PolyakError, UsageError, require

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

_SHARDED = (
    "{} keeps the weights in forms of its own, which track() cannot save. {}verage the checkpoints that it "
    "writes: polyak.average_checkpoints, or `polyak average`."
)
_REFUSED = {
    "DEEPSPEED": "DeepSpeed steps its own copies of the weights, in accelerator.backward(), where no hook "
    "sees it. With its stages 0 to 2 call average.update() after accelerator.backward(loss) if "
    "model.was_step_applied() (in your own loop: after engine.step()), and save average.state_dict() "
    "on each process beside its checkpoint. Stage 3 shards the weights: average its checkpoints.",
    "FSDP": _SHARDED.format(
        "FSDP1", "Pass FullyShardedDataParallelPlugin(fsdp_version=2) to the Accelerator, or a"
    ),
    "MEGATRON_LM": _SHARDED.format("Megatron-LM", "A"),
}

_WRITTEN = (
    " Accelerate has written the model and the optimizer before it asked: {} holds the average as the "
    "weights that train, so remove it."
)
_LOADED = "The model and the optimizer have been loaded, as Accelerate loads them first with FSDP2."

# What each accelerator carries already: name -> average.
_carried: WeakKeyDictionary[Any, dict[str, Average | Averages]] = WeakKeyDictionary()


class Tracking:
    """What `track` returns: the average is saved and loaded until `remove`, or the end of a `with`."""

    def __init__(
        self,
        accelerator: Accelerator,
        average: Average | Averages,
        name: str,
        missing: Literal["raise", "start"],
    ) -> None:
        self.average, self.name = average, name
        self._missing = missing
        self._rank, self._ranks = accelerator.process_index, accelerator.num_processes
        self._accelerator = accelerator
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """No longer save and load it; it stays attached to its optimizer. A second call does nothing."""
        if self._hooks:
            del _carried[self._accelerator][self.name]
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        if self.average.lent:
            raise UsageError(
                "save_state() inside applied(): it would save the average as the weights that train. "
                "Leave the `with` block first; to save the averaged model, call average.save()."
                f"{_WRITTEN.format(folder) if _is_fsdp2(self._accelerator) else ''}"
            )
        if _shards(self._accelerator, self.average):
            from torch.distributed.checkpoint.state_dict_saver import save

            together = Path(folder, self.name)
            if self._rank == 0 and (together / ".metadata").exists():  # perhaps of more processes
                shutil.rmtree(together)
            self._accelerator.wait_for_everyone()
            save({self.name: self.average.state_dict()}, checkpoint_id=together)
            return
        torch.save(self.average.state_dict(), self._file(folder, self._rank))
        if self._rank == 0:  # a checkpoint of more processes was here
            for file in Path(folder).iterdir():
                other = re.fullmatch(rf"{re.escape(self.name)}_(\d+)\.pt", file.name)
                if other and int(other[1]) >= self._ranks:
                    file.unlink()

    def _load(self, models: list[Any], folder: str) -> None:
        if not self._accelerator._models:
            raise UsageError(
                "load_state() before prepare(): Accelerate restores what it has prepared, and the weights "
                f"that {self.name!r} belongs to would not be loaded. Call accelerator.prepare(model, "
                "optimizer, ...) first."
            )
        try:
            self._find_and_read(folder)
        except PolyakError as error:
            late = f" {_LOADED}" if _is_fsdp2(self._accelerator) else ""
            raise type(error)(f"{error}{late}") from None

    def _find_and_read(self, folder: str) -> None:
        # Saved by fewer processes: those of a whole model hold the same weights, as rank 0 does.
        files = [self._file(folder, rank) for rank in (self._rank, 0)]
        found = next((file for file in files if file.exists()), None)
        if Path(folder, self.name, ".metadata").exists():
            sharded.load(self.average, Path(folder, self.name), key=self.name)
        elif found is not None:
            self._read(found)
        elif self._missing == "start":
            self.average.reset()
        else:
            raise ArgumentError(
                f"{folder} holds no average {self.name!r}: there is no {files[-1].name}. Nothing was "
                "loaded. Was it saved before track(), or under another name? Pass missing='start' to "
                "begin a new average from its weights."
            )

    def _read(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError):
            raise FormatError(
                f"{file} is damaged, or track() did not write it. Nothing was loaded."
            ) from None
        try:
            self.average.load_state_dict(state)
        except PolyakError as error:
            raise type(error)(f"{file}: {error}") from None

    def _file(self, folder: str, rank: int) -> Path:
        return Path(folder) / f"{self.name}_{rank}.pt"


def track(
    accelerator: Accelerator,
    average: Average | Averages,
    name: str = "average",
    *,
    missing: Literal["raise", "start"] = "raise",
) -> Tracking:
    """Save and load an average with `accelerator.save_state()` and `accelerator.load_state()`.

    Every process writes its own file into the checkpoint, `<name>_<process>.pt`, and continues from it
    bitwise; on more processes than before the others continue from the first one's. Of a sharded model
    (FSDP2, tensor parallelism) all write together a distributed checkpoint, `<name>/`, which any number of
    processes continues from. Automatic naming and rotation of checkpoints apply to it. Attach the average as always: `average.attach(optimizer)`,
    with the optimizer that `prepare` returned or the one it was given.

    Args:
        accelerator: the Accelerator of this run.
        average: an `Average` or `Averages` of a model that it prepares.
        name: of the file; one per average where an accelerator has several.
        missing: what to do with a checkpoint without this average: "raise", or "start" to forget what
            was averaged and begin anew from the weights that are loaded.

    Returns a `Tracking`, with `remove()`: for a second training with the same accelerator, which keeps
    hooks and so the average and its model through `free_memory()`.

    Raises ArgumentError for arguments of another kind, a name that is no file's, or an accelerator with
    DeepSpeed, FSDP1 or Megatron-LM; UsageError if the name or the average is tracked already; MissingExtra
    without Accelerate. `load_state` raises ArgumentError if the average is not there, MismatchError if it
    is a different one (another profile, other tensors) and FormatError for a damaged file, before anything
    is loaded (with FSDP2 Accelerate loads model and optimizer first); `save_state` raises UsageError inside
    `applied()`.

    >>> import accelerate, polyak, tempfile, torch
    >>> from polyak.integrations.accelerate import track
    >>> accelerator = accelerate.Accelerator(cpu=True)
    >>> model = torch.nn.Linear(2, 1)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> average = polyak.Average(model, polyak.SWA())
    >>> attached, tracked = average.attach(optimizer), track(accelerator, average)
    >>> optimizer.step()
    >>> folder = accelerator.save_state(tempfile.mkdtemp())
    >>> optimizer.step()
    >>> accelerator.load_state(folder)
    >>> average.count
    1

    """
    _check(accelerator, average, name, missing)
    carried = _carried.setdefault(accelerator, {})
    if name in carried:
        raise UsageError(
            f"An average {name!r} is tracked already, and both would write the same file. Pass another "
            "name=, or call remove() on what track() returned for that one."
        )
    if before := next((other for other, one in carried.items() if one is average), None):
        raise UsageError(f"This average is tracked already, as {before!r}.")
    carried[name] = average
    return Tracking(accelerator, average, name, missing)


def _check(accelerator: Any, average: Any, name: Any, missing: Any) -> None:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingExtra.of("accelerate", "accelerate", "Tracking an average") from None
    require(
        isinstance(accelerator, Accelerator) and isinstance(average, Average | Averages),
        "track() takes an Accelerator and an Average or Averages; found "
        f"{type(accelerator).__name__} and {type(average).__name__}.",
    )
    require(
        isinstance(name, str) and name.isprintable() and name != "" and Path(name).name == name,
        f"name is {name!r}; expected the name of a file, without folders.",
    )
    require(missing in ("raise", "start"), f"missing is {missing!r}; expected 'raise' or 'start'.")
    refused = _REFUSED.get(accelerator.distributed_type.value)
    if refused and not _is_fsdp2(accelerator):
        raise ArgumentError(refused)


def _is_fsdp2(accelerator: Any) -> bool:
    return bool(getattr(accelerator, "is_fsdp2", False))


def _shards(accelerator: Any, average: Average | Averages) -> bool:
    """Whether processes hold parts of the weights. FSDP2 shows plain ones after a forward pass."""
    model = average.model if isinstance(average, Average) else next(iter(average.values())).model
    return _is_fsdp2(accelerator) or any(hasattr(p, "placements") for p in model.parameters())
