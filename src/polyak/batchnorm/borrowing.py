"""Lending a model to a pass over data: whatever is changed comes back, also after an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase

from polyak.batchnorm.recording import Recorder

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def lent_layers(layers: Iterable[_NormBase]) -> Iterator[None]:
    """Scratch buffers during the pass: the layers' own are not touched until all has gone well."""
    lent = [(layer, layer.momentum, {k: layer._buffers[k] for k in BUFFERS}) for layer in layers]
    try:
        for layer, _, buffers in lent:
            layer._buffers.update({k: _clone(b) for k, b in buffers.items()})
        yield
    finally:
        for layer, momentum, buffers in lent:
            layer.momentum = momentum
            layer._buffers.update(buffers)


@contextmanager
def lent_forwards(recorders: Mapping[str, Recorder]) -> Iterator[None]:
    """Each recorder stands in for its layer's `forward`.

    Not a hook: this also sees calls of `layer.forward(x)` and the input as other hooks left it.
    """
    own = {recorder: recorder.layer.__dict__.get("forward") for recorder in recorders.values()}
    try:
        for recorder in own:
            recorder.layer.__dict__["forward"] = recorder
        yield
    finally:
        for recorder, forward in own.items():
            if forward is None:
                recorder.layer.__dict__.pop("forward", None)
            else:
                recorder.layer.__dict__["forward"] = forward


@contextmanager
def lent_randomness(model: Module) -> Iterator[None]:
    """The pass (a shuffling loader, say) leaves torch's generators where they were."""
    on_gpu = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    devices = {p.device for p in on_gpu if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def eagerly() -> AbstractContextManager[None]:
    """Compiled models run uncompiled: what was traced before cannot see the recorders."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it costs a second
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()
