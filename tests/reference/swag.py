"""SWAG in float64 from all captures, as the paper writes it."""

import math

import torch


class Twin:
    """Keeps every capture, by name, as float64 (complex values as pairs)."""

    def __init__(self, rank):
        self.rank = rank
        self.captures = []

    def capture(self, tensors):
        self.captures.append({n: wide(t).clone() for n, t in tensors.items()})

    def mean(self, name, n=None):
        return torch.stack([one[name] for one in self.captures[:n]]).mean(0)

    def variance(self, name):
        return torch.stack([one[name] for one in self.captures]).var(0, correction=0)

    def deviations(self, name):
        total = len(self.captures)
        last = range(max(0, total - self.rank), total) if self.rank else ()
        return [self.captures[n][name] - self.mean(name, n + 1) for n in last]

    def draw(self, names, generator, scale, dtype=torch.float32):
        columns = {name: self.deviations(name) for name in names}
        k = len(columns[names[0]])
        z2 = torch.randn(k, generator=generator, dtype=torch.float64)
        drawn = {}
        for name in names:
            variance, own = self.variance(name), columns[name]
            z1 = torch.randn(variance.shape, generator=generator, dtype=dtype).double()
            step = (variance / (2 if k else 1)).sqrt() * z1
            for factor, deviation in zip(z2, own, strict=True):
                step = step + factor * deviation / math.sqrt(2 * (k - 1))
            drawn[name] = self.mean(name) + math.sqrt(scale) * step
        return drawn


def wide(tensor):
    tensor = tensor.detach()
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def covariance(variance, deviations, scale):
    """Of a draw, for weights in one vector."""
    if not len(deviations):
        return scale * torch.diag(variance)
    columns = torch.stack(list(deviations), dim=1)
    return scale * (torch.diag(variance) / 2 + columns @ columns.T / (2 * (len(deviations) - 1)))
