"""`polyak merge-adapters`: LoRA adapters of separate runs, as the sum of what they add."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polyak.cli.converters import MaybeWhole


def merge_adapters(
    *inputs: str,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    weights: str | None = None,
    rank: MaybeWhole = None,
    base: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Merge LoRA adapters, of separate runs too, into one that adds the mean of what they add.

    Args:
        inputs: Folders that PEFT wrote: LoRA, rsLoRA, DoRA, of any ranks and alphas.
        output: The folder of the merged adapter.
        weights: One per input, like 0.5,0.3,0.2; equal by default.
        rank: Of the result; by default what is exact, the sum of the ranks. The relative error of a
            smaller one is printed.
        base: The model that the adapters belong to; needed with DoRA alone.
        overwrite: Replace the output.

    """
    from rich.console import Console

    from polyak.checkpoints.merging.lora import merge_adapters as merge
    from polyak.cli.average import comma_separated

    given = None if weights is None else comma_separated(weights)
    done = merge(inputs, output, weights=given, rank=rank, base=base, overwrite=overwrite)
    exact = "exact" if done.relative_error < 1e-9 else f"relative error {done.relative_error:.2%}"
    worst = "" if exact == "exact" else f", at most {done.worst[1]:.2%} ({done.worst[0]})"
    Console(highlight=False).print(
        f"{done.output}: {len(inputs)} adapters, {done.modules} modules of rank {done.rank}, {exact}{worst}",
        soft_wrap=True,
        markup=False,
    )
