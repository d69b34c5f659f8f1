"""Small models of the kinds that averages must get right."""

import torch
from torch import nn


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class Complex(nn.Module):
    """A complex parameter, and one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    "batchnorm": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    "channels last": lambda: nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last),
    "tied": Tied,
    "bfloat16": lambda: nn.Linear(3, 4).bfloat16(),
    "float16": lambda: nn.Linear(3, 4).half(),
    "float64": lambda: nn.Linear(3, 4).double(),
    "complex": Complex,
}
