"""`polyak soup`: several fine-tunes of one model made into one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from polyak.cli.average import notices
from polyak.cli.converters import Flag, Many, MaybeWhole, New
from polyak.cli.inspect import size
from polyak.cli.scorer import Scorer

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.study.soup_plan import Planned


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Made:
    """What is made.

    Attributes:
        output: A .safetensors file, a torch archive (.pt .pth .bin .ckpt), or a folder.
        method: greedy adds one after the other, the best first, unless the score falls; uniform is the mean
            of all; learned takes the coefficients from the scores and the distances; model-stock needs
            --base.
        base: The checkpoint that the fine-tunes began from, for model-stock.
        key: Where the tensors are inside nested dicts, with dots.
        dtype: Of floating tensors as written: float32, bfloat16, float16, float64.
        include: Mix only the tensors that fit this pattern; may be repeated.
        exclude: Take the tensors that fit this pattern from the last; may be repeated.
        shard_size: The size of a shard, where the output is a folder; 5GB by default.
        max_memory: For buffers, above what Python and torch take.
        threads: By default one per core, at most 16.
        overwrite: Replace the output if it exists.
        dry_run: Print the plan and stop.

    """

    output: Annotated[New, Parameter(name=["--output", "-o"])]
    method: Literal["greedy", "uniform", "learned", "model-stock"] = "greedy"
    base: str | None = None
    key: str | None = None
    dtype: str | None = None
    include: Annotated[list[str], Many] | None = None
    exclude: Annotated[list[str], Many] | None = None
    shard_size: str = "5GB"
    max_memory: str = "128MiB"
    threads: MaybeWhole = None
    overwrite: Annotated[bool, Flag] = False
    dry_run: Annotated[bool, Flag] = False

    def options(self) -> dict[str, Any]:
        """Those of the library that say how weights are merged."""
        return {
            "base": self.base,
            "key": self.key,
            "dtype": self.dtype,
            "include": self.include or (),
            "exclude": self.exclude or (),
            "shard_size": self.shard_size,
            "max_memory": self.max_memory,
            "threads": self.threads,
            "overwrite": self.overwrite,
        }


_SCORER = Scorer()


def soup(*inputs: str, made: Made, scorer: Scorer = _SCORER) -> None:
    """Make fine-tunes of one model into one that is as cheap to run.

    Args:
        inputs: Checkpoints, folders of them, globs, as polyak average takes them.
        made: What is made.
        scorer: How weights are judged.

    """
    from rich.console import Console

    from polyak.checkpoints.merging.options import MergeOptions
    from polyak.checkpoints.merging.selection import find_checkpoints
    from polyak.maths.numbers import for_terminal, significant
    from polyak.study.evaluator import Judging
    from polyak.study.soup import run_soup
    from polyak.study.soup_plan import planned

    console = Console(highlight=False, soft_wrap=True, markup=False)
    options = MergeOptions(**made.options())
    evaluate = scorer.evaluation() if scorer.is_named else None
    with ExitStack() as opened, notices(console):
        found = find_checkpoints(inputs, key=made.key)
        for checkpoint in found.kept:
            opened.enter_context(checkpoint)
        if made.dry_run:
            scored = evaluate is not None
            with planned(found.kept, made.output, options, made.method, scored=scored) as plan:
                _print_plan(console, found.left_out, plan)
            return
        judging = Judging(**scorer.judging())
        done = run_soup(
            found.kept,
            made.output,
            evaluate,
            options,
            judging,
            method=made.method,
            announce=partial(_print_plan, console, found.left_out),
            progress=lambda what, score: console.print(
                f"  {what}: {for_terminal(significant(score, 6))}"
            ),
        )
    console.print(str(done))


def _print_plan(console: Console, left_out: dict[str, str], planned: Planned) -> None:
    plan = planned.plan
    for path in plan.ingredients:
        console.print(f"Ingredient: {path}")
    for path, why in left_out.items():
        console.print(f"Left out: {path}: {why}")
    relative = planned.spread and planned.spread.relative[0]
    if relative is not None:
        console.print(f"Spread of the ingredients (RMS, of their mean): {relative:.2%}")
    shown = [size(n) for n in (plan.bytes_read, plan.bytes_written, plan.bytes_beside)]
    asked = f"at most {plan.evaluations} evaluations" if plan.evaluations else "no evaluation"
    console.print(
        f"{plan.method} soup of {len(plan.ingredients)}: {asked}, at most {shown[0]} to read, {shown[1]} to "
        f"write, {shown[2]} beside the output meanwhile"
    )
