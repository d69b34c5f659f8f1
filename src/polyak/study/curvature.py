"""The Hessian's extreme eigenvalues, by Lanczos on products of the Hessian with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak.batchnorm.update import restored_rng, uncompiled
from polyak.errors import ArgumentError, NonFiniteError, PolyakError, UsageError, require
from polyak.maths.arguments import at_least_one, number
from polyak.maths.numbers import decimals, for_terminal, plus_minus, rounded
from polyak.study.filling import Weights, fill, own_weights
from polyak.study.frame import Frame, anchors_of
from polyak.study.losses import Loss, check_loss, loss_of
from polyak.tensors.modes import restored_modes
from polyak.tensors.names import require_module

_ROUNDING = 10

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True)
class Curvature:
    r"""Extreme eigenvalues of a symmetric matrix, the wanted ones first.

    values: (k,). errors: (k,) bounds, $|\lambda - \theta_i| \le |H v_i - \theta_i v_i|$, and ten roundings of the
    dtype of the products: each value is within its error of some eigenvalue. vectors: (k, P), of length 1, in the order of the trainable parameters of
    `named_parameters()`. products: how many products with the matrix it took. converged: whether all errors
    are within the tolerance.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: Tensor
    products: int
    converged: bool

    def __str__(self) -> str:
        rows = map(_with_error, self.values, self.errors)
        short = "" if self.converged else ", not converged: allow more iterations"
        return for_terminal(f"{', '.join(rows)} ({self.products} products{short})")


def _with_error(value: float, error: float) -> str:
    """With the decimals that the error leaves, six digits at most."""
    digits = min(decimals(error, 1), decimals(value, 6))
    return f"{rounded(value, digits)} {plus_minus(error, digits)}"


def hessian_eigenvalues(  # noqa: PLR0913 - keyword-only arguments do not count
    model: Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    k: int = 1,
    which: Which = "largest",
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Curvature:
    r"""The Hessian's extreme eigenvalues at the model's weights, for the mean loss over all examples.

    $H v = \nabla (\nabla L \cdot v)$ by a double backward pass, summed over the batches: one product costs about two
    gradients of all the data. Lanczos with full reorthogonalisation keeps `iterations` vectors of all P
    trainable parameters. The model is in evaluation mode: BatchNorm uses its running statistics, which make the
    loss a function of the weights alone, and dropout is off. Its weights, buffers, gradients, modes and
    torch's random state are as before afterwards.

    Args:
        model: At the weights in question.
        loss: `loss(model, batch)`, a scalar, the mean over the batch, or one value for each example.
        batches: Data that can be read again: a list or a DataLoader that does not shuffle or augment. A batch
            counts by its number of examples.
        k: How many eigenvalues.
        which: "largest" or "smallest" algebraically, or of the largest "magnitude".
        iterations: At most so many products.
        tolerance: Stop when all errors are below it, as a fraction of the largest magnitude.
        generator: Of the first vector, on the CPU; by default one with seed 0.

    An eigenvalue that is there several times may be found once: its vectors are one space. Exact when
    `iterations` reaches P. Source: Lanczos 1950; Paige 1972 for the errors; the use here Yao et al. 2020, arXiv
    1912.07145 (PyHessian), which has no bound.

    Raises:
        ArgumentError: An option outside its domain, no trainable parameters, more eigenvalues than those, or a
            loss that is neither a scalar nor 1-D.
        NonFiniteError: The loss or a product is not finite.
        UsageError: An operation of the model has no second derivative.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> found = hessian_eigenvalues(model, lambda m, x: m(x).square().mean(), [torch.diag(torch.tensor([1.0, 3.0]))])
    >>> [round(v, 4) for v in found.values]  # of X^T X with two examples
    [9.0]

    """
    require_module(model, "hessian_eigenvalues")
    check_loss(loss, batches)
    with _untouched(model):
        product, size, device, dtype = _products(model, loss, batches)
        start = torch.randn(
            size, generator=generator or torch.Generator().manual_seed(0), dtype=torch.float64
        )
        return lanczos(
            product,
            start.to(device, dtype),
            k=k,
            which=which,
            iterations=iterations,
            tolerance=tolerance,
        )


def curvatures(
    inputs: Sequence[Weights],
    model: Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    key: str | None = None,
    **options: Any,
) -> Iterator[tuple[str, Curvature]]:
    """`hessian_eigenvalues` at each of several checkpoints of the model, by name; it gets its own weights back.

    Raises MismatchError, naming every difference, where one does not fit.
    """
    anchors = anchors_of(inputs, key=key, model=model)
    require(bool(anchors), "There is no input; name one checkpoint or more.")
    require_module(model, "hessian_eigenvalues")
    frames = [Frame([anchor], model) for anchor in anchors]  # all of them are checked first
    with own_weights(model):
        for anchor, frame in zip(anchors, frames, strict=True):
            fill(model, frame.subject(anchor.name, [1.0]).tensors)
            yield anchor.name, hessian_eigenvalues(model, loss, batches, **options)


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    k: int = 1,
    which: Which = "largest",
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Curvature:
    """Extreme eigenvalues of a symmetric matrix of which only products with vectors (P,) are known.

    start: (P,), the first vector. The rest as for `hessian_eigenvalues`.
    """
    at_least_one("k", k)
    at_least_one("iterations", iterations)
    require(
        which in ("largest", "smallest", "magnitude"),
        f"which is {which!r}; expected 'largest', 'smallest' or 'magnitude'.",
    )
    require(
        0 < number("tolerance", tolerance) < 1,
        f"tolerance is {tolerance:g}; expected a fraction above 0 and below 1.",
    )
    size = len(start)
    require(k <= size, f"k is {k}; there are {size} parameters, so at most {size} eigenvalues.")
    most = min(size, max(iterations, k))
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    length = _length(start)
    require(
        0 < length < math.inf, "start is zero or not finite; expected a vector with a direction."
    )
    vector = start / length
    while True:
        basis.append(vector)
        image = product(vector)
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteError("A product with the Hessian is not finite. Check the weights.")
        diagonal.append(float(vector.double() @ image.double()))
        rest = _orthogonal(image, basis)
        length = _length(rest)
        values, inside, errors, scale = _ritz(diagonal, beside, length, k, which)
        closed = length <= 10 * torch.finfo(start.dtype).eps * max(scale, 1e-300)
        done = len(diagonal) >= k and not closed and max(errors) <= tolerance * scale
        if done or len(diagonal) == most:
            break
        # A closed space holds no more than one copy of each eigenvalue: go on from outside of it.
        rest = _orthogonal(_fresh(len(diagonal), rest), basis) if closed else rest
        beside.append(0.0 if closed else length)
        vector = rest / _length(rest)
    rounding = _ROUNDING * torch.finfo(start.dtype).eps * scale  # of products: no residual shows it
    return Curvature(
        tuple(values), tuple(error + rounding for error in errors), inside.to(start) @ torch.stack(basis), len(diagonal),
        max(errors) <= tolerance * scale,
    )  # fmt: skip


def _ritz(
    diagonal: Sequence[float], beside: Sequence[float], length: float, k: int, which: Which
) -> tuple[list[float], Tensor, list[float], float]:
    """Of the tridiagonal matrix: what is wanted, vectors (k, m), residuals; the largest magnitude of all."""
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside, dtype=torch.float64)
    small = small + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(small)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    picked = key.argsort(stable=True)[:k]
    chosen = vectors[:, picked].T
    errors = (length * chosen[:, -1].abs()).tolist()
    return values[picked].tolist(), chosen, errors, float(values.abs().max())


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """What of it is orthogonal to the basis; twice, because once leaves what rounding has left."""
    for _ in range(2):
        for known in basis:
            vector = vector - (known @ vector) * known
    return vector


def _length(vector: Tensor) -> float:
    """In float64: of 10^8 values of float32 torch's norm on a CPU is 1% short, by a naive sum (2.13.0)."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _fresh(number_of: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(number_of)
    return torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)


def _products(
    model: Module, loss: Loss, batches: Iterable[Any]
) -> tuple[Callable[[Tensor], Tensor], int, torch.device, torch.dtype]:
    """The product with the Hessian, the number of parameters, and where vectors are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    require(bool(parameters), "The model has no parameters that train, so there is no Hessian.")
    if odd := sorted({str(p.dtype) for p in parameters if not p.is_floating_point()}):
        raise ArgumentError(f"Parameters are {', '.join(odd)}; the Hessian is one of real numbers.")
    device = parameters[0].device
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)

    def product(vector: Tensor) -> Tensor:
        parts = _like(vector, parameters)
        total, count = torch.zeros_like(vector), 0
        for batch in batches:
            summed, size = loss_of(loss, model, batch, device)
            total += _hessian_times(summed, parameters, parts).to(total)
            count += size
        require(count > 0, "The data has no batches; expected some to take the loss of.")
        return total / count

    return product, sum(p.numel() for p in parameters), device, dtype


def _hessian_times(loss: Tensor, parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    # A gradient of 1 that needs one itself: of a constant, a function that is differentiable once leaves no mark.
    one = torch.ones_like(loss, requires_grad=True)
    try:
        gradient = torch.autograd.grad(
            loss, parameters, one, create_graph=True, materialize_grads=True, allow_unused=True
        )
        slope = torch.stack([(g * v).sum() for g, v in zip(gradient, parts, strict=True)]).sum()
        _refuse_ends(slope)
        found: Sequence[Tensor] = [torch.zeros_like(p) for p in parameters]
        if slope.requires_grad:  # a loss that is linear has no curvature
            found = torch.autograd.grad(
                slope, parameters, materialize_grads=True, allow_unused=True
            )
    except RuntimeError as error:
        if isinstance(error, PolyakError) or "out of memory" in str(error):
            raise
        raise _no_second_derivative(str(error).splitlines()[0]) from error
    return torch.cat([part.detach().reshape(-1) for part in found])


def _refuse_ends(slope: Tensor) -> None:
    """Raise UsageError where the graph ends in torch's mark of a function that is differentiable once.

    `autograd.grad` does not get there, because nothing that it is asked for lies behind, and returns zeros.
    """
    seen, waiting = set(), [slope.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise _no_second_derivative("A function of it is marked as once_differentiable.")
        waiting += [following for following, _ in node.next_functions]


def _no_second_derivative(why: str) -> UsageError:
    return UsageError(
        f"The loss cannot be differentiated twice: {why} Use operations that have a second derivative: attention "
        "without a fused kernel, recurrent layers outside of cuDNN, a model that is not compiled."
    )


def _like(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view_as(p).to(p) for part, p in zip(parts, parameters, strict=True)]


@contextmanager
def _untouched(model: Module) -> Iterator[None]:
    """In evaluation mode, with attention that can be differentiated twice; as before afterwards."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with (
            restored_modes(model), restored_rng(model), uncompiled(), torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # fmt: skip
            model.eval()
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
