"""What `polyak average` can be told, in groups; each becomes what the library takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from polyak.checkpoints.merging.paths import PathLike
    from polyak.checkpoints.merging.recipes import How
    from polyak.checkpoints.merging.selection import Selection

_Flag = Parameter(negative="")
_Many = Parameter(negative="", consume_multiple=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Which of the checkpoints to take.

    Attributes:
        last: So many of the latest, by training step.
        steps: A range of training steps, FIRST:LAST, both included; either may be missing.
        every: Only those whose step is a multiple of this.
        best: So many with the best --metric.
        metric: eval_loss, val_accuracy, ...; min:NAME or max:NAME where the name does not say.
        scores: A CSV or JSONL file with the columns step (or file) and the metric. Without it
            trainer_state.json or Lightning's callback state is read.

    """

    last: int | None = None
    steps: str | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    scores: Path | None = None

    def selection(self) -> Selection:
        """As the library takes it."""
        from polyak.checkpoints.merging.selection import Selection

        return Selection(
            steps=_range(self.steps),
            every=self.every,
            best=self.best,
            metric=self.metric,
            scores=self.scores,
            last=self.last,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What to write, and how it is averaged.

    Attributes:
        output: A .safetensors file, a torch archive (.pt .pth .bin .ckpt), or a folder. Repeat
            --method and -o for several outputs in one pass.
        method: swa, ema:half_life=3000, ema:decay=0.999, power:std=0.1, window:length=10000,
            annealed:shape=linear|cosine|sqrt; times in training steps. swa unless given.
        weights: One weight per input in the order given, like 0.2,0.3,0.5, instead of --method.
        normalize: Divide the weights by their sum.

    """

    output: Annotated[
        list[Path], Parameter(name=["--output", "-o"], negative="", consume_multiple=False)
    ]
    method: Annotated[list[str], _Many] | None = None
    weights: Annotated[list[str], _Many] | None = None
    normalize: Annotated[bool, _Flag] = False

    def recipes(self) -> dict[PathLike, How]:
        """Output -> how; ArgumentError where their numbers differ."""
        if self.method and self.weights:
            raise ArgumentError("--method and --weights exclude each other.")
        hows: list[How] = [_numbers(text) for text in self.weights or ()]
        hows = hows or list(self.method or ["swa"])
        if len(hows) != len(self.output):
            raise ArgumentError(
                f"{len(hows)} methods and {len(self.output)} outputs; give one --method for each -o."
            )
        if len(set(self.output)) < len(self.output):
            raise ArgumentError("Two outputs have the same path.")
        return dict(zip(self.output, hows, strict=True))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What of the tensors.

    Attributes:
        dtype: What floating tensors are written as: float32, bfloat16, float16, float64.
        include: Average only the tensors that fit this pattern; may be repeated.
        exclude: Take the tensors that fit this pattern from the newest; may be repeated.
        base: A checkpoint to add weighted differences to: base + sum of weight x (input - base).
        key: Where the tensors lie inside nested dicts, with dots.
        shard_size: The size of a shard, where the output is a folder.

    """

    dtype: str | None = None
    include: Annotated[list[str], _Many] | None = None
    exclude: Annotated[list[str], _Many] | None = None
    base: str | None = None
    key: str | None = None
    shard_size: str = "5GB"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done.

    Attributes:
        max_memory: For buffers, above what Python and torch take.
        threads: As many as there are cores, unless given.
        part: I/N: one of N processes that share the work on a shared disk; the last one publishes.
        resume: Go on with a merge that was interrupted.
        verify: Hash the inputs while they are read, then read the output back and check it.
        overwrite: Replace outputs that exist.
        dry_run: Print the plan and stop.

    """

    max_memory: str = "128MiB"
    threads: int | None = None
    part: str | None = None
    resume: Annotated[bool, _Flag] = False
    verify: Annotated[bool, _Flag] = False
    overwrite: Annotated[bool, _Flag] = False
    dry_run: Annotated[bool, _Flag] = False


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights {text!r}: expected numbers like 0.2,0.3,0.5.") from None


def _range(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        bounds = (int(first) if first else None, int(last) if last else None)
    except ValueError:
        colon = ""
    if not colon:
        raise ArgumentError(f"--steps {text!r}: expected FIRST:LAST, like 1000:5000 or 1000:")
    return bounds
