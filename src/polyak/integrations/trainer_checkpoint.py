"""What an average adds to a Trainer's checkpoint: its state, and of sharded models `averaged/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import Module

from polyak import Average, Averages, sharded
from polyak.errors import FormatError, NonFiniteError, PolyakError, warn

FOLDER = "averaged"  # in each checkpoint: the averaged model, as the Trainer saves models,
STATE = "average.pt"  # and what is needed to continue averaging, beside optimizer.pt;
SHARDED_STATE = "average"  # of a sharded model a distributed checkpoint, beside optimizer_0


def shards(trainer: Any) -> bool:
    """Whether the Trainer shards its model with FSDP2: every process then has a part of all in here."""
    return bool(getattr(trainer.accelerator, "is_fsdp2", False))


def save_state(trainer: Any, average: Average | Averages, checkpoint: Path) -> None:
    """Write what is needed to continue; every process of a sharded model writes its part."""
    one, together = checkpoint / STATE, checkpoint / SHARDED_STATE
    if trainer.args.should_save:  # of an earlier run, in the other form
        one.unlink(missing_ok=True)
        shutil.rmtree(together, ignore_errors=True)
    if shards(trainer):
        from torch.distributed.checkpoint.state_dict_saver import save

        trainer.accelerator.wait_for_everyone()
        save({"average": average.state_dict()}, checkpoint_id=together)
    elif trainer.args.should_save:
        torch.save(average.state_dict(), one)


def load_state(average: Average | Averages, checkpoint: Path) -> bool:
    """Continue from the state in a checkpoint; False if there is none."""
    file = checkpoint / STATE
    if (checkpoint / SHARDED_STATE / ".metadata").exists():
        sharded.load(average, checkpoint / SHARDED_STATE)
        return True
    if not file.exists():
        return False
    try:
        average.load_state_dict(_read(file))
    except PolyakError as error:
        raise type(error)(f"{file}: {error}") from None
    return True


def save_shards(trainer: Any, average: Average, folder: Path) -> None:
    """Write the average of a sharded model as a folder for `from_pretrained`, without gathering it.

    Of adapters the folder is one of PEFT's: they are small, and gathered.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        with average.applied():
            trainer._save(str(folder), state_dict=_trained(trainer.model))
        return
    with TemporaryDirectory() as beside:  # configuration, tokenizer, code
        trainer._save(beside, state_dict={})
        try:
            average.save(folder, shards=True, carry=beside, overwrite=True)
        except NonFiniteError as error:  # not worth losing the training
            warn(f"{folder} was not written. {error}")


def versions(trainer: Any, model: Module) -> list[Any]:
    """What changes if a tensor is written to, converted or moved."""
    if shards(trainer):
        for module in model.modules():  # gathered parameters are others
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()
    with torch.no_grad():
        found = [
            (id(t), t.to_local() if hasattr(t, "to_local") else t)
            for t in chain(model.parameters(), model.buffers())
        ]
    return [(i, t.dtype, t.device, 0 if t.is_inference() else t._version) for i, t in found]


@contextmanager
def ignoring_adapter(model: Any, folder: Path) -> Iterator[None]:
    """The Trainer takes a folder with an adapter in a checkpoint for a further adapter of the model."""
    load = getattr(model, "load_adapter", None)
    if load is None:
        yield
        return

    def load_others(path: Any, *args: Any, **kwargs: Any) -> Any:
        return None if Path(path) == folder else load(path, *args, **kwargs)

    model.load_adapter = load_others
    try:
        yield
    finally:
        del model.load_adapter


def _trained(model: Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise FormatError(f"It is damaged, or attach() did not write it: {error}") from None
