"""SWAG: what its draws are, against the paper's covariance of the same captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from checks import Result, below, check, near

SUBJECT = "SWAG"


def _captured(peer: Any, model: nn.Module, moves: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The peer's SWAG of a model whose weights are 1 + these moves, and the captures in float64."""
    swag, captures = peer.swag(model), []
    for move in moves:
        flat = 1 + move
        with torch.no_grad():
            for p, part in zip(
                model.parameters(),
                flat.split([p.numel() for p in model.parameters()]),
                strict=True,
            ):
                p.copy_(part.view_as(p))
        swag.collect()
        captures.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    return swag, torch.stack(captures)


def _covariance(captures: torch.Tensor) -> torch.Tensor:
    """The paper's: half the variances, and the products of deviations from the running mean, over 2 (K - 1)."""
    counts = torch.arange(1, len(captures) + 1, dtype=torch.float64)[:, None]
    deviations = (captures - captures.cumsum(0) / counts)[-20:]
    products = deviations.T @ deviations / (2 * (len(deviations) - 1))
    return captures.var(0, correction=0).diag() / 2 + products


def _two_weights() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))


def _moves(captures: int) -> torch.Tensor:
    torch.manual_seed(0)
    together = torch.randn(captures, 1)
    return 0.1 * (together + 0.3 * torch.randn(captures, 2))


def _variance(peer: Any, captures: int) -> Result:
    swag, seen = _captured(peer, _two_weights(), _moves(captures))
    found = swag.draws(1000).var(0)
    return near(float((found / _covariance(seen).diag()).mean()), 1.0, 0.15)


@check(SUBJECT, "weights of size 1 that move by 1e-4: each standard deviation is theirs, within 2%")
def small(peer: Any) -> Result:
    torch.manual_seed(0)
    swag, seen = _captured(peer, nn.Linear(50, 40, bias=False), 1e-4 * torch.randn(20, 2000))
    ratio = swag.deviations() / seen.std(0, correction=0)
    return below(float((ratio - 1).abs().max()), 0.02, "relative error")


@check(SUBJECT, "weights that never move get no noise")
def constant(peer: Any) -> Result:
    swag, _ = _captured(peer, nn.Linear(5, 4, bias=False), torch.zeros(5, 20))
    return below(float((swag.draws(20) - 1).abs().max()), 1e-12, "noise of")


@check(SUBJECT, "two weights that moved together are drawn together (one z2 for all tensors)")
def together(peer: Any) -> Result:
    swag, seen = _captured(peer, _two_weights(), _moves(20))
    true = _covariance(seen)
    correlation = float(true[0, 1] / (true[0, 0] * true[1, 1]).sqrt())
    return near(float(torch.corrcoef(swag.draws(1000).T)[0, 1]), correlation, 0.2)


@check(SUBJECT, "draws of the default scale have the paper's covariance (ratio 1, within 15%)")
def scale(peer: Any) -> Result:
    return _variance(peer, 20)


@check(
    SUBJECT,
    "5 captures of rank 20: their covariance, beside that of 20 captures, is the paper's (ratio 1)",
)
def unfilled(peer: Any) -> Result:
    few, seen = _captured(peer, _two_weights(), _moves(5))
    many, all_seen = _captured(peer, _two_weights(), _moves(20))
    ratios = [
        swag.draws(1000).var(0).sum() / _covariance(captures).trace()
        for swag, captures in ((few, seen), (many, all_seen))
    ]
    return near(float(ratios[0] / ratios[1]), 1.0, 0.2)


@check(SUBJECT, "BatchNorm statistics of a draw: uneven batches (128, 128, 2), within 1e-5")
def statistics(peer: Any) -> Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    swag, _ = _captured(peer, model, 0.1 * torch.randn(5, 15))
    data = torch.randn(258, 3)
    data[256:] += 10
    drawn = swag.drawn(list(data.split([128, 128, 2])))
    drawn = getattr(drawn, "module", drawn)
    exact = data.double() @ drawn[0].weight.detach().double().T
    error = (drawn[1].running_var / exact.var(0) - 1).abs().max()
    return below(float(error), 1e-5, "relative error")
