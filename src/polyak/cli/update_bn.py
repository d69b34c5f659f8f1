"""`polyak update-bn`: the normalisation statistics of averaged weights in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polyak.cli.converters import MaybeWhole, NewFile


def update_bn(
    file: Path,
    *,
    model: str,
    data: str,
    output: Annotated[NewFile | None, Parameter(name=["--output", "-o"])] = None,
    limit: MaybeWhole = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Set the BatchNorm statistics in a file of averaged weights to those of the data.

    Args:
        file: A safetensors file or a torch archive, as polyak average writes them.
        model: package.module:function that builds the model; called without arguments.
        data: package.module:function that returns batches: an iterable of tensors, tuples or mappings.
        output: Where to write; by default the file itself.
        limit: Use at most this many batches.
        overwrite: Replace the output if it exists.

    """
    from rich.console import Console

    from polyak.batchnorm.update_file import update_bn_file
    from polyak.objects import call_object

    built, batches = call_object(model), call_object(data)
    layers = update_bn_file(file, built, batches, output=output, overwrite=overwrite, limit=limit)
    Console(highlight=False).print(
        f"{output or file}: updated the BatchNorm statistics of {len(layers)} layers",
        soft_wrap=True,
        markup=False,
    )
