"""polyak's callback behind the names of Lightning's, for Lightning's own tests of them."""

from __future__ import annotations

import pytest
import torch

from polyak import EMA, SWA
from polyak.integrations import lightning as adapter


def RunIf(*, min_cuda_gpus=0, mps=False, standalone=False, skip_windows=False):  # noqa: N802
    lacks = torch.cuda.device_count() < min_cuda_gpus or mps or standalone
    return pytest.mark.skipif(lacks, reason="needs another machine")


class _Model:
    """What the tests read of Lightning's second module."""

    def __init__(self, average):
        self.n_averaged = average.count
        self.module = average.model


class WeightAveraging(adapter.WeightAveraging):
    """`should_update` decides; a swap is one half of a loan, a copy is what is left in the module."""

    def __init__(self, device=None, use_buffers=True, avg_fn=None, **options):
        decay = getattr(avg_fn, "decay", None)
        profile = SWA() if decay is None else EMA(decay=decay, keep_initial=True)
        super().__init__(profile, **options)
        self._latest = 0

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None

    @property
    def _average_model(self):
        return None if self._averages is None else _Model(self._main)

    def on_train_start(self, trainer, pl_module):
        self._restore()
        self._latest = max(self._latest, trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
        step = trainer.global_step
        if step > self._latest and self.should_update(step_idx=step - 1):
            self._all.update()
        self._latest = max(self._latest, step)

    def on_train_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch
        if epoch > self._epoch and self.should_update(epoch_idx=epoch):
            self._all.update()
        self._epoch = epoch

    def on_train_epoch_start(self, trainer, *args):
        pass

    def _swap_models(self):
        pass

    def _copy_average_to_current(self):
        pass

    def on_validation_start(self, trainer, pl_module):
        super().on_validation_start(trainer, pl_module)
        self._swap_models()

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self._swap_models()

    def _finish(self, module):
        super()._finish(module)
        self._copy_average_to_current()


class EMAWeightAveraging(WeightAveraging):
    def __init__(
        self,
        device=None,
        use_buffers=True,
        decay=0.999,
        update_every_n_steps=1,
        update_starting_at_step=None,
        update_starting_at_epoch=None,
    ):
        super().__init__()
        self._profiles = dict.fromkeys(self._profiles, EMA(decay=decay, keep_initial=True))
        self._every_n = update_every_n_steps
        self._step, self._start = update_starting_at_step, update_starting_at_epoch

    def should_update(self, step_idx=None, epoch_idx=None):
        if step_idx is not None:
            return step_idx >= (self._step or 0) and step_idx % self._every_n == 0
        return self._start is not None and epoch_idx >= self._start
