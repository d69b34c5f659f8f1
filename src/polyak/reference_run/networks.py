"""The networks that a recipe can name, but for the small one of `models`: plain torch, a class each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

from polyak.errors import ArgumentError


class ResidualNet(nn.Module):
    """A small residual network with BatchNorm: 72,890 parameters for grey images of 10 classes.

    A 3x3 convolution of stride 2 to 16 channels, then two residual blocks of stride 2 to 32 and 64
    channels, the mean over the pixels, and a linear layer. Input `(n, in_channels, image_size,
    image_size)`, any size; output logits `(n, n_outputs)`. At a constant rate its iterate is noisy
    and its average is not.

    >>> import torch
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


class _PreActivated(nn.Module):
    """A 3x3 convolution to 16 channels, three groups of blocks, BatchNorm, ReLU, mean and linear.

    The groups have `n`, 2 n and 4 n channels; each but the first begins with stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        n_outputs: int,
        block: type[_PreBasic | _PreBottleneck],
        n: int,
        repeats: int,
    ) -> None:
        super().__init__()
        self.conv = _conv3(in_channels, 16)
        blocks, n_in = [], 16
        for group, n_out in enumerate((n, 2 * n, 4 * n)):
            for i in range(repeats):
                blocks.append(block(n_in, n_out, 2 if group and not i else 1))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(n_in)
        self.output = nn.Linear(n_in, n_outputs)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        features = relu(self.norm(self.blocks(self.conv(images))))
        logits: Tensor = self.output(features.mean((2, 3)))
        return logits


class WideResNet(_PreActivated):
    """Wide residual network, as WRN-28-10 (Zagoruyko and Komodakis 2016, arXiv 1605.07146), no dropout.

    `depth` is 6 n + 4: three groups of n blocks of 16, 32 and 64 times `width` channels.

    >>> import torch
    >>> net = WideResNet(3, 10, depth=16, width=4)
    >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(2, 3, 32, 32)).shape
    (2748890, torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_outputs: int = 10,
        *,
        depth: int,
        width: int,
        image_size: int = 32,
    ) -> None:
        del image_size
        super().__init__(in_channels, n_outputs, _PreBasic, 16 * width, (depth - 4) // 6)


class PreResNet(_PreActivated):
    """Residual network with pre-activation (He et al. 2016, arXiv 1603.05027) for small images.

    `depth` is 6 n + 2 with blocks of two 3x3 convolutions, or 9 n + 2 with `bottleneck`, blocks of a 1x1,
    a 3x3 and a 1x1 convolution to four times as many channels.

    >>> import torch
    >>> net = PreResNet(3, 10, depth=20)
    >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(2, 3, 32, 32)).shape
    (272282, torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_outputs: int = 10,
        *,
        depth: int,
        bottleneck: bool = False,
        image_size: int = 32,
    ) -> None:
        del image_size
        block, times, layers = (_PreBottleneck, 4, 9) if bottleneck else (_PreBasic, 1, 6)
        super().__init__(in_channels, n_outputs, block, 16 * times, (depth - 2) // layers)


class VGG16(nn.Module):
    """VGG-16 for small images (Simonyan and Zisserman 2014, arXiv 1409.1556), with dropout.

    Thirteen 3x3 convolutions with five 2x2 poolings, then layers of 512, 512 and the outputs, as in the
    experiments on SWA; with BatchNorm after each convolution if asked for. Images of up to 32 pixels.

    >>> import torch
    >>> sum(p.numel() for p in VGG16().parameters()), VGG16(1)(torch.zeros(2, 1, 28, 28)).shape
    (15245130, torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_outputs: int = 10,
        *,
        batchnorm: bool = False,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if image_size > 32:
            raise ArgumentError(
                f"image_size is {image_size}; vgg16 takes images of up to 32 pixels."
            )
        layers: list[nn.Module] = []
        for n, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(repeats):
                layers.append(nn.Conv2d(in_channels, n, 3, padding=1))
                layers += [nn.BatchNorm2d(n), nn.ReLU()] if batchnorm else [nn.ReLU()]
                in_channels = n
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        hidden = [
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
        ]
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, n_outputs))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class _PreBasic(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice; where the shape changes, a 1x1 convolution beside."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(n_in), _conv3(n_in, n_out, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(n_out), _conv3(n_out, n_out)
        self.shortcut = _shortcut(n_in, n_out, stride)

    def forward(self, features: Tensor) -> Tensor:
        """The sum of both ways."""
        active = relu(self.norm1(features))
        inner: Tensor = self.conv2(relu(self.norm2(self.conv1(active))))
        return inner + (features if self.shortcut is None else self.shortcut(active))


class _PreBottleneck(nn.Module):
    """As `_PreBasic`, with 1x1, 3x3 and 1x1 convolutions, the first two to a quarter of the channels."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        n = n_out // 4
        self.norm1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, n, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(n), _conv3(n, n, stride)
        self.norm3, self.conv3 = nn.BatchNorm2d(n), nn.Conv2d(n, n_out, 1, bias=False)
        self.shortcut = _shortcut(n_in, n_out, stride)

    def forward(self, features: Tensor) -> Tensor:
        """The sum of both ways."""
        active = relu(self.norm1(features))
        middle = self.conv2(relu(self.norm2(self.conv1(active))))
        inner: Tensor = self.conv3(relu(self.norm3(middle)))
        beside: Tensor = features if self.shortcut is None else self.shortcut(active)
        return inner + beside


def _conv3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)


def _shortcut(n_in: int, n_out: int, stride: int) -> nn.Conv2d | None:
    return nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False) if n_in != n_out else None


def _initialise(model: nn.Module) -> None:
    """Convolutions as He et al. 2015 (arXiv 1502.01852), by their outputs; no biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "residual": ResidualNet,
    "wrn-16-4": partial(WideResNet, depth=16, width=4),
    "wrn-28-10": partial(WideResNet, depth=28, width=10),
    "preresnet-20": partial(PreResNet, depth=20),
    "preresnet-110": partial(PreResNet, depth=110),
    "preresnet-164": partial(PreResNet, depth=164, bottleneck=True),
    "vgg16": VGG16,
    "vgg16-bn": partial(VGG16, batchnorm=True),
}
"""By the name in a recipe."""
