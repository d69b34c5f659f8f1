"""The small network that SWA is often taught with, and the model that a recipe names."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from polyak.errors import ArgumentError
from polyak.objects import load_object
from polyak.reference_run.data import Data
from polyak.reference_run.evaluation import loss_of
from polyak.reference_run.networks import NETWORKS
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.transformer import TRANSFORMERS
from polyak.tensors.modes import restored_modes


class Net(nn.Module):
    """Two 3x3 convolutions of 8 and 16 channels, a hidden layer of 128, the outputs.

    Each convolution is followed by BatchNorm if asked for, ReLU and 2x2 max-pooling. Input
    `(n, in_channels, image_size, image_size)`, output logits `(n, n_outputs)`. The usual version has
    a hidden layer for 16 x 3 x 3 values, which fits images of 18 to 21 pixels; here it is sized for
    `image_size` (28 pixels leave 5 x 5).

    Raises ArgumentError for images below 10 pixels, of which the two poolings leave nothing.

    >>> Net()(torch.zeros(2, 1, 28, 28)).shape, Net(image_size=18).hidden.in_features
    (torch.Size([2, 10]), 144)
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_outputs: int = 10,
        *,
        image_size: int = 28,
        batchnorm: bool = False,
    ) -> None:
        super().__init__()
        side = ((image_size - 2) // 2 - 2) // 2
        if side < 1:
            raise ArgumentError(
                f"image_size is {image_size}; expected 10 or more, because two convolutions and two "
                "poolings leave nothing of smaller images."
            )
        self.conv1 = nn.Conv2d(in_channels, 8, kernel_size=3)
        self.norm1 = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3)
        self.norm2 = nn.BatchNorm2d(16) if batchnorm else nn.Identity()
        self.hidden = nn.Linear(16 * side * side, 128)
        self.output = nn.Linear(128, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        # ReLU is monotonic, so pooling first gives the same at a quarter of the cost.
        features = relu(max_pool2d(self.norm1(self.conv1(images)), 2))
        features = relu(max_pool2d(self.norm2(self.conv2(features)), 2))
        logits: Tensor = self.output(relu(self.hidden(features.flatten(1))))
        return logits


def build_model(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's model for this data, on the CPU, with newly initialised weights.

    A custom function is called with `in_channels`, `n_outputs` and `image_size`, for words with `vocabulary`
    and `context`. Raises ArgumentError if it does not return a module, or the module's output is not
    `(n, n_outputs)`, for words `(n, context, vocabulary)`.
    """
    if recipe.task == "words":
        sizes = {"vocabulary": data.n_classes, "context": recipe.context}
    else:
        sizes = {
            "in_channels": data.n_channels,
            "n_outputs": data.n_classes,
            "image_size": data.image_size,
        }
    if not recipe.model and recipe.network == "taught":
        return Net(**sizes, batchnorm=recipe.batchnorm)
    if not recipe.model:
        return (NETWORKS | TRANSFORMERS)[recipe.network](**sizes)
    model = _called(recipe.model, sizes)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{recipe.model} returned a {type(model).__name__}; expected a torch.nn.Module."
        )
    _check_output(model, recipe.model, data)
    _check_training(model, recipe.model, data)
    return model


def _called(function: str, sizes: dict[str, int]) -> object:
    try:
        return load_object(function)(**sizes)
    except TypeError as error:
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ArgumentError(f"{function} could not be called with {given}: {error}.") from error


def _check_output(model: nn.Module, function: str, data: Data) -> None:
    inputs = data.train.inputs[:2]
    what = "images" if inputs.is_floating_point() else "windows"
    try:
        with restored_modes(model), torch.no_grad():
            output = model.eval()(inputs if inputs.is_floating_point() else inputs.long())
    except Exception as error:  # whatever its forward raises
        raise ArgumentError(
            f"The model of {function} does not take {what} of {tuple(inputs.shape[1:])}: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    expected = (*data.train.labels[:2].shape, data.n_classes)
    if found != expected:
        raise ArgumentError(
            f"The model of {function} has the output {found} for {len(inputs)} {what}; expected "
            f"logits {expected}, one for each class."
        )
    if not output.is_floating_point():
        raise ArgumentError(
            f"The model of {function} has an output of {output.dtype}; expected logits, of float32."
        )


def _check_training(model: nn.Module, function: str, data: Data) -> None:
    """Refuse what no step could train, by the gradients of one batch of a copy."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(
            f"The model of {function} has no parameter that requires a gradient; there is nothing to train."
        )
    inputs, labels = data.train.inputs[:2], data.train.labels[:2].long()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            tried = copy.deepcopy(model).train()
            loss = loss_of(tried, inputs if inputs.is_floating_point() else inputs.long(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever its forward and backward raise
        raise ArgumentError(
            f"The model of {function} gives logits in evaluation and cannot be trained: "
            f"{type(error).__name__}: {error}"
        ) from error
