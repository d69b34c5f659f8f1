"""`SWALR`: torch's, without the ways in which others' writing corrupts it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR as _TorchSWALR  # noqa: N811 - both have that name


class SWALR(_TorchSWALR):
    r"""Anneal each group's learning rate to `swa_lr` over `anneal_epochs` calls of `step()`.

    With :math:`\eta_0` the rate found at the first step and :math:`a(x)` either x or
    :math:`(1 - \cos \pi x) / 2`, the rate after n steps is
    :math:`a(t)\,\eta_{swa} + (1 - a(t))\,\eta_0`, :math:`t = \min(1, n / anneal\_epochs)`.

    torch's works :math:`\eta_0` out anew at each step from whatever the rate is by then; here it is
    remembered, so another writer of the rate in between leaves the curve as it was. The target is
    the scheduler's own, not the optimizer's: loading an optimizer's state does not replace it, and
    groups that are added later anneal to it too.

    Args:
        optimizer: whose rates are written.
        swa_lr: the final rate, one for all groups or one for each.
        anneal_epochs: the number of steps the annealing takes.
        anneal_strategy: "cos" or "linear".
        last_epoch: as in every torch scheduler.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        n_groups = len(optimizer.param_groups)
        self._targets = list(swa_lr) if isinstance(swa_lr, (list, tuple)) else [swa_lr] * n_groups
        self._starts: list[float | Tensor] = []
        super().__init__(optimizer, swa_lr, anneal_epochs, anneal_strategy, last_epoch)  # type: ignore[arg-type] # torch takes a list too

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step that was just begun; `get_last_lr()` tells those in force."""
        step = self._step_count - 1
        if self.anneal_epochs == 0:
            step = max(1, step)
        if step <= 1:
            self._starts = []  # it has not begun: what the rate is now is where it will start
        starts = self._starting_rates(step)
        alpha = self._alpha(step)
        return [
            target * alpha + start * (1 - alpha)
            for target, start in zip(self._all_targets(), starts, strict=True)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's, which has no memory of where it started."""
        self._starts = []
        super().load_state_dict(state_dict)
        if "_targets" not in state_dict:
            self._targets = [group["swa_lr"] for group in self.optimizer.param_groups]

    def _alpha(self, step: int) -> float:
        anneal: Any = self.anneal_func
        alpha: float = anneal(max(0, min(1, step / max(1, self.anneal_epochs))))
        return alpha

    def _starting_rates(self, step: int) -> list[float | Tensor]:
        """Where each group's annealing started; worked out, as torch does, where nobody noted it."""
        n_noted = len(self._starts)
        starts = list(self._starts)
        for group, target in zip(
            self.optimizer.param_groups[n_noted:], self._all_targets()[n_noted:], strict=True
        ):
            rate = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            came_later = n_noted > 0
            alpha = 0.0 if came_later else self._alpha(step - 1)
            starts.append(target if alpha == 1 else (rate - alpha * target) / (1 - alpha))
        if step >= 1:
            self._starts = starts
        return starts

    def _all_targets(self) -> list[float]:
        n_groups = len(self.optimizer.param_groups)
        while len(self._targets) < n_groups:
            self._targets.append(self._targets[-1])
        return self._targets
