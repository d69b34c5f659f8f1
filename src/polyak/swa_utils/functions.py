"""The four averaging functions of torch's module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyak.errors import ArgumentError
from polyak.tensors.blend import toward

Tensors = tuple[Tensor, ...] | list[Tensor]
AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Tensors, Tensors, Tensor | int], None]


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """A function that moves lists of tensors, in place: ``a = decay * a + (1 - decay) * w``.

    Integer and boolean tensors become those of `w`: a count has no average.

    Raises:
        ArgumentError: a decay outside [0, 1].

    """
    _check(decay)

    def ema_update(ema_param_list: Tensors, current_param_list: Tensors, _: Tensor | int) -> None:
        _move(ema_param_list, current_param_list, 1 - decay)

    return ema_update


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """A function that moves lists of tensors, in place: ``a += (w - a) / (num_averaged + 1)``.

    Integer and boolean tensors become those of `w`: a count has no average.
    """

    def swa_update(
        averaged_param_list: Tensors, current_param_list: Tensors, num_averaged: Tensor | int
    ) -> None:
        _move(averaged_param_list, current_param_list, 1 / (int(num_averaged) + 1))

    return swa_update


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """A function of one tensor: ``decay * a + (1 - decay) * w``.

    Raises:
        ArgumentError: a decay outside [0, 1].

    """
    _check(decay)

    @torch.no_grad()
    def ema_update(ema_param: Tensor, current_param: Tensor, _: Tensor | int) -> Tensor:
        return decay * ema_param + (1 - decay) * current_param

    return ema_update


def get_swa_avg_fn() -> AvgFn:
    """A function of one tensor: ``a + (w - a) / (num_averaged + 1)``."""

    @torch.no_grad()
    def swa_update(
        averaged_param: Tensor, current_param: Tensor, num_averaged: Tensor | int
    ) -> Tensor:
        return averaged_param + (current_param - averaged_param) / (num_averaged + 1)

    return swa_update


@torch.no_grad()
def _move(averages: Tensors, sources: Tensors, share: float) -> None:
    can_average = [a.is_floating_point() or a.is_complex() for a in averages]
    pairs = list(zip(averages, sources, can_average, strict=True))
    if moving := [(a, w) for a, w, can in pairs if can]:
        toward([a for a, _ in moving], [w for _, w in moving], share)
    for average, source, can in pairs:
        if not can:
            average.copy_(source)


def _check(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay is {decay}; expected a number from 0 to 1")
