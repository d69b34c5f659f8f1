"""`polyak inspect`: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from polyak.checkpoints.inspect import Inspection


def inspect(
    *files: str,
    key: str | None = None,
    values: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Print what is in checkpoints: tensors, shapes, dtypes, sizes, ties and metadata.

    Args:
        files: Files or folders: safetensors, torch files, npz, Transformers, DCP; also s3://, https://.
        key: Where the tensors are inside nested dicts, with dots.
        values: Also read every value: count NaNs and infinities, and compute norms.

    """
    from polyak.checkpoints.inspect import inspect_checkpoint

    if not files:
        from polyak.errors import ArgumentError

        raise ArgumentError("No file was given. Usage: polyak inspect FILE...")
    console = wide_console()
    for file in files:
        for part in _shown(inspect_checkpoint(file, key=key, values=values), values=values):
            console.print(part, markup=False, soft_wrap=isinstance(part, str))


def wide_console() -> Console:
    """A console that folds long names on a terminal only: a pipe gets one line per tensor."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=10_000)


def _shown(found: Inspection, *, values: bool) -> list[RenderableType]:
    """The parts, from the summary to the details."""
    step = "" if found.step is None else f", step {found.step}"
    summary = (
        f"{found.path}: {found.format}{step}, {len(found.tensors)} tensors, "
        f"{found.count:,} values, {size(found.nbytes)}"
    )
    parts: list[RenderableType] = [summary, _table(found, values=values)]
    parts += [f"  {alias} is tied to {name}" for alias, name in found.ties.items()]
    parts += [f"  {name} is state that is no tensor ({kind})" for name, kind in found.extra.items()]
    parts += [f"  {name} cannot be read: {why}" for name, why in found.refused.items()]
    parts += [f"  {key}: {text}" for key, text in sorted(found.metadata.items())]
    if values:
        bad = ", ".join(found.nonfinite)
        parts.append(f"  not finite: {bad}" if bad else "  every value is finite")
    return parts


def _table(found: Inspection, *, values: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for title in ("dtype", "shape"):
        table.add_column(title)
    for title in ("size", *(("NaN", "inf", "norm") if values else ())):
        table.add_column(title, justify="right")
    for entry in found.tensors:
        row = [
            entry.name,
            entry.dtype,
            "×".join(map(str, entry.shape)) or "scalar",
            size(entry.nbytes),
        ]
        if entry.values is not None:
            counts = entry.values
            row += [str(counts.nans), str(counts.infinities), f"{counts.norm:.6g}"]
        table.add_row(*map(Text, row))
    return table


def size(nbytes: int) -> str:
    """Bytes in the largest unit that keeps the number above one.

    >>> [size(nbytes) for nbytes in (17, 2_500, 13_000_000_000)]
    ['17 B', '2.5 kB', '13.0 GB']
    """
    amount = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
