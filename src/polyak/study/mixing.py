"""Mixes of ingredients in files that go again: the running mean of a soup, and weighted ones.

A mean of n is that of n - 1 and one more, so trying an ingredient reads this one alone. Nothing is subtracted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from polyak.checkpoints.merging.average import (
    MergeResult,
    average_checkpoints,
    iter_averaged_tensors,
)
from polyak.checkpoints.merging.cast import cast, widened
from polyak.checkpoints.merging.deltas import ModelStock
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.outputs import begun_anew
from polyak.checkpoints.merging.rules import StockShare
from polyak.checkpoints.merging.weights import OutputWeights, metadata_of
from polyak.checkpoints.reading.extra_state import is_extra, tensors_in
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.files import take_lock, writing_errors
from polyak.study.evaluator import Subject

Kind = Literal["sum", "model-stock", "grown"]

_SAMPLED, _TENSORS = 512, 256  # bytes of a tensor, and of how many, that its content is told by


@dataclass(frozen=True, eq=False)
class Ingredient:
    """An opened input. content: changes whenever the file does, and is the same wherever it is."""

    checkpoint: Checkpoint
    content: str

    @property
    def path(self) -> str:
        """As it was given."""
        return self.checkpoint.path

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())


@dataclass(frozen=True, eq=False)
class Mix:
    """What is mixed: a weighted sum, their Model Stock, or a mean that grows by one ingredient at a time."""

    ingredients: tuple[Ingredient, ...]
    coefficients: tuple[float, ...]
    kind: Kind = "sum"

    @property
    def content(self) -> str:
        """What it is made of, and how."""
        parts = zip(self.coefficients, self.ingredients, strict=True)
        lines = [f"{coefficient!r} {one.content}" for coefficient, one in parts]
        return "\n".join([*lines, self.kind])

    def share_of(self, one: Ingredient) -> float:
        """Its coefficient; 0 if it is left out."""
        return dict(zip(self.ingredients, self.coefficients, strict=True)).get(one, 0.0)


def mean_of(ingredients: Sequence[Ingredient], kind: Kind = "sum") -> Mix:
    """Their mean, or their Model Stock."""
    return Mix(tuple(ingredients), (1 / len(ingredients),) * len(ingredients), kind)


def told_by(checkpoint: Checkpoint) -> str:
    """What tells its content from others without reading all of it: names, times of change, samples."""
    digest = hashlib.sha256()
    tensors = list(checkpoint.tensors.values())
    for number, tensor in enumerate(tensors):
        digest.update(f"{tensor!r}".encode())
        if number % -(-len(tensors) // _TENSORS) == 0 and tensor.nbytes:
            sample = bytearray(min(_SAMPLED, tensor.nbytes))
            tensor.read_into((tensor.nbytes - len(sample)) // 2 // 8 * 8, memoryview(sample))
            digest.update(sample)
    for file in checkpoint.files:
        changed = "" if "://" in file.path else Path(file.path).stat().st_mtime_ns
        digest.update(f"{file.size} {changed}".encode())
    return digest.hexdigest()


class Mixing:
    """Makes mixes beside the output, in its form, in float32 at least; a context, after which they are gone."""

    def __init__(self, output: Path, options: MergeOptions, told: str) -> None:
        """told: changes with all that makes a mix another one, beside its ingredients and their shares."""
        self._output, self._options, self._told = output, options, told
        self._folder = output.absolute().parent / f".{output.name}.soup"
        self._read: dict[str, int] = {}
        self.stock: StockShare | None = None  # of the Model Stock that was made

    @property
    def reads(self) -> int:
        """How often the ingredient that was read most often was read in full."""
        return max(self._read.values(), default=0)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While mixes are made; what a killed process has left is continued."""
        with ExitStack() as stack:
            lock = self._locked()
            stack.callback(os.close, lock)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            yield

    def _locked(self) -> int:
        """A lock on the folder, which a process that ends removes: then it is made again."""
        while True:
            with writing_errors(self._folder):
                self._folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError), ExitStack() as stack:
                lock = os.open(self._folder, os.O_RDONLY)
                stack.callback(os.close, lock)
                take_lock(lock, self._folder, "this output")
                if os.path.samestat(os.fstat(lock), self._folder.stat()):
                    stack.pop_all()
                    return lock

    def subject(self, mix: Mix, what: str) -> Subject:
        """The mix, to be evaluated; made when it is needed."""
        content = f"{mix.content}\n{self._told}"
        return Subject(
            what, content, lambda into: _tensors(self.made(mix)), lambda: self._file(mix)
        )

    def single(self, one: Ingredient) -> Subject:
        """An ingredient as it is."""

        def tensors(into: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            self.count([one])
            return _named(one.checkpoint)

        return Subject(one.path, one.content, tensors, lambda: self._own_file(one), refresh=False)

    def made(self, mix: Mix) -> Path:
        """The file, or folder, of a mix."""
        path = self._path(mix)
        is_known = mix.kind != "model-stock" or self.stock is not None
        if path.exists() and is_known:
            return path
        if mix.kind == "grown":
            self._grow(mix.ingredients)
        elif mix.kind == "sum":
            inputs = [widened(one.checkpoint) for one in mix.ingredients]
            self.count(mix.ingredients)
            self._average(inputs, path, _unnamed(mix.coefficients))
        else:
            dtypes = {t.dtype for one in mix.ingredients for t in one.checkpoint.tensors.values()}
            dtype = "float64" if "F64" in dtypes else "float32"
            self._write_stock(mix, path, dtype, overwrite=True)
        return path

    def share_of(self, one: Ingredient, mix: Mix) -> float:
        """What the mix has of it; of a Model Stock over all values."""
        share = mix.share_of(one)
        return share if self.stock is None else share * self.stock.average

    def notes(self) -> list[str]:
        """What there is to know of how it was mixed."""
        return [] if self.stock is None else [f"Model Stock: {self.stock}."]

    def keep(self, *mixes: Mix) -> None:
        """Remove all others."""
        wanted = {self._path(mix).name for mix in mixes}
        for entry in self._folder.iterdir():
            if entry.name not in wanted:
                _remove(entry)

    def publish(self, mix: Mix, label: str) -> None:
        """Write the output: the mix in the dtypes of its ingredients, unless another was asked for."""
        options = self._options
        dtypes = {n: t.dtype for n, t in mix.ingredients[-1].checkpoint.tensors.items()}
        weights = OutputWeights(mix.coefficients, label)
        inputs = [one.checkpoint for one in mix.ingredients]
        said = metadata_of(weights, inputs, options, {})
        with open_checkpoint(self.made(mix)) as made:
            self._average(
                [cast(made, dtypes)],
                self._output,
                OutputWeights((1.0,), metadata=said),
                dtype=options.dtype,
                overwrite=options.overwrite,
            )

    def publish_unscored(self, mix: Mix, label: str) -> None:
        """Write the output at once."""
        dtype, overwrite = self._options.dtype, self._options.overwrite
        if mix.kind == "model-stock":
            self._write_stock(mix, self._output, dtype, overwrite=overwrite)
            return
        self.count(mix.ingredients)
        inputs = [one.checkpoint for one in mix.ingredients]
        weights = OutputWeights(mix.coefficients, label)
        self._average(inputs, self._output, weights, dtype=dtype, overwrite=overwrite)

    def _grow(self, ingredients: Sequence[Ingredient]) -> None:
        """From the longest beginning that is there, one ingredient after the other."""
        made = [mean_of(ingredients[:count], "grown") for count in range(1, len(ingredients) + 1)]
        there = max((n for n, mix in enumerate(made) if self._path(mix).exists()), default=-1)
        for number in range(there + 1, len(made)):
            with ExitStack() as stack:
                inputs = [replace(widened(ingredients[number].checkpoint), step=None)]
                weights = [1.0]
                if number:
                    running = stack.enter_context(open_checkpoint(self._path(made[number - 1])))
                    inputs.insert(0, replace(running, step=None))
                    weights = [number / (number + 1), 1 / (number + 1)]
                self.count([ingredients[number]])
                self._average(inputs, self._path(made[number]), _unnamed(weights))
            if 0 < number < len(made) - 1:
                _remove(self._path(made[number - 1]))

    def _write_stock(self, mix: Mix, path: Path, dtype: Any, **more: Any) -> None:
        self.count(mix.ingredients)
        self.count(mix.ingredients)
        inputs = [one.checkpoint for one in mix.ingredients]
        stock = ModelStock()
        done = self._average(inputs, path, stock, dtype=dtype, base=self._options.base, **more)
        self.stock = done.stock[0]

    def _average(
        self, inputs: Sequence[Checkpoint], path: Path, method: Any, **more: Any
    ) -> MergeResult:
        options = self._options
        filters: dict[str, Any] = {"include": options.include, "exclude": options.exclude}
        with warnings.catch_warnings(), begun_anew("make the soup again"):
            warnings.simplefilter(
                "ignore"
            )  # what there is to warn of was said before the first mix
            return average_checkpoints(
                inputs,
                path,
                method=method,
                shard_size=options.shard_size,
                max_memory=options.max_memory,
                threads=options.threads,
                **(filters if len(inputs) > 1 else {}),
                **more,
            )

    @contextmanager
    def _file(self, mix: Mix) -> Iterator[Path]:
        yield self.made(mix)

    @contextmanager
    def _own_file(self, one: Ingredient) -> Iterator[Path]:
        """The input's own path, where it has the form that mixes have: torch files may hold more than weights."""
        path, form = Path(one.path), self._output.suffix.lower()
        is_same = path.suffix.lower() == form in (".safetensors", "") and "://" not in one.path
        if is_same and self._options.key is None:
            self.count([one])
            yield path
            return
        converted = self._folder / f"single{self._output.suffix}"
        _remove(converted)
        self.count([one])
        self._average([one.checkpoint], converted, OutputWeights((1.0,)))
        yield converted
        _remove(converted)

    def _path(self, mix: Mix) -> Path:
        name = hashlib.sha256(f"{mix.content}\n{self._told}".encode()).hexdigest()[:16]
        return self._folder / f"mix-{name}{self._output.suffix}"

    def count(self, ingredients: Sequence[Ingredient]) -> None:
        """Note that they are read once more."""
        for one in ingredients:
            self._read[one.path] = self._read.get(one.path, 0) + 1


def _unnamed(coefficients: Sequence[float]) -> OutputWeights:
    """The weights of a file that says nothing about its inputs."""
    return OutputWeights(tuple(coefficients), metadata={"polyak": "mix"})


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with open_checkpoint(path) as opened:
        yield from _named(opened)


def weights_in(checkpoint: Checkpoint) -> list[str]:
    """The names of what is a tensor of the model, and no extra state."""
    kept = tensors_in(checkpoint.extra)
    return [name for name in checkpoint.tensors if name not in kept and not is_extra(name)]


def _named(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    wanted = set(weights_in(checkpoint))
    for name, tensor in iter_averaged_tensors([checkpoint], "swa"):
        if name in wanted:
            yield name, tensor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
