"""The networks that a recipe can name, but for the small one of `models`: plain torch, a class each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import relu


class ResidualNet(nn.Module):
    """A small residual network with BatchNorm: 72,890 parameters for grey images of 10 classes.

    A 3x3 convolution of stride 2 to 16 channels, then two residual blocks of stride 2 to 32 and 64
    channels, the mean over the pixels, and a linear layer. Input `(n, in_channels, image_size,
    image_size)`, any size; output logits `(n, n_outputs)`. At a constant rate its iterate is noisy
    and its average is not.

    >>> net = ResidualNet()
    >>> net(torch.zeros(2, 1, 28, 28)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 10]), 72890)
    """

    def __init__(self, in_channels: int = 1, n_outputs: int = 10, *, image_size: int = 28) -> None:
        super().__init__()
        del image_size  # the mean over the pixels fits all sizes
        self.conv = nn.Conv2d(in_channels, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_Block(16, 32), _Block(32, 64))
        self.output = nn.Linear(64, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        features = self.blocks(relu(self.norm(self.conv(images))))
        logits: Tensor = self.output(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, the first of stride 2, beside a 1x1 convolution."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """The sum of both ways."""
        inner = relu(self.norm1(self.conv1(features)))
        return relu(self.norm2(self.conv2(inner)) + self.shortcut(features))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"residual": ResidualNet}
"""By the name in a recipe."""
