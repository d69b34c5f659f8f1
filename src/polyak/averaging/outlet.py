"""What comes out of an average: lent to its model, copied, measured, written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from polyak.averaging import applying
from polyak.averaging.following import Following
from polyak.averaging.held import Held
from polyak.averaging.saving import save
from polyak.batchnorm import unmeasured_layers, update_bn
from polyak.errors import UsageError


class Outlet:
    """The half of `Average` that reads; nothing in it changes what has been averaged."""

    _following: Following
    _held: Held

    @property
    def model(self) -> Module:
        """The model that is followed."""
        return self._following.roster.model

    @contextmanager
    def applied(self, *, check: bool = False, in_place: bool = False) -> Iterator[Module]:
        """Let the model hold the average within the block, and its own weights again after it.

        Memory is lent, not copied: a microsecond or two per tensor. Copies are made only where the
        accumulators cannot serve as they are (another dtype or device, an open block, a window):
        as much as the live weights, in their dtype. `in_place=True` exchanges contents instead, so
        that every tensor stays where it is (CUDA graphs). A `state_dict()` of the model taken inside
        refers to the average's own memory.

        While nothing has been averaged the model stays as it is, with one EmptyAverage warning.
        Optimizer steps and updates inside raise UsageError, and so does applying another average of
        the same weights; the same one may be nested. With `check=True` a NaN or an infinity in the
        average raises NonFiniteError before anything is lent.
        """
        following, held = self._following, self._held
        if held.is_lent or self._is_empty("the model keeps its own weights", depth=5):
            yield self.model
            return
        following.refuse_during_loan("applied()")
        following.ready_to_read()
        if check:
            applying.refuse_nonfinite_average(following, held, "applied()")
        with applying.loan(following, held, owner=self, in_place=in_place):
            yield self.model

    def copy_to(self, model: Module) -> None:
        """Copy the average and its statistics into a model, this one or another of its kind, for good.

        Raises MismatchError, naming every tensor that does not fit, and NonFiniteError; nothing is
        copied then.
        """
        if self._is_empty("nothing was copied"):
            return
        self._following.refuse_during_loan("copy_to()")
        self._following.ready_to_read()
        applying.refuse_nonfinite_average(self._following, self._held, "copy_to()")
        applying.copy_into(model, applying.copies(self._following, self._held))

    def update_bn(self, batches: Iterable[Any], **options: Any) -> None:
        """Set the average's BatchNorm statistics to those of the data under the averaged weights.

        They stay with the average, for `applied`, `save` and `copy_to`, until its next update. Takes
        the options of `polyak.update_bn`. The model's own statistics are not touched.
        """
        if self._is_empty("there are no statistics to measure"):
            return
        if (layers := self._following.layers_to_refresh()) is not None:
            options.setdefault("layers", layers)
        with self.applied():
            update_bn(self.model, batches, **options)
        self._held.statistics_are_fresh = not unmeasured_layers(self.model)

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The state dict of the averaged model, as copies in the dtypes of the weights.

        Names are without the prefixes that wrappers add; tied weights appear under all their names.
        """
        self._following.ready_to_read()
        if self._held.is_empty():
            raise UsageError("There are no averaged tensors: nothing has been averaged yet.")
        return applying.copies(self._following, self._held)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the averaged model as safetensors, with what it is made of in the metadata.

        Warns (StaleStatistics) and records it where BatchNorm statistics are not the average's own.
        Raises OutputError if `path` exists and `overwrite` is False, or cannot be written;
        NonFiniteError, naming the tensors; UsageError while nothing has been averaged.
        """
        save(self._following, self._held, path, overwrite=overwrite)

    def _is_empty(self, consequence: str, depth: int = 4) -> bool:
        if not self._held.is_empty():
            return False
        if not self._held.said_empty:
            self._held.said_empty = True
            applying.warn_empty(self, consequence, depth)
        return True
