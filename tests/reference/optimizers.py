"""Optimizers around optimizers, of every shape that libraries have, in a few lines each."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer


def problem():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def gradients(model):
    model.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()


class SlowWeights(Optimizer):
    """Lookahead; torch's constructor runs, so its own hooks fire."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.pull()
        return loss

    def pull(self):
        parameters = [p for g in self.param_groups for p in g["params"]]
        for slow, p in zip(self.slow, parameters, strict=True):
            slow.lerp_(p.data, 0.5)
            p.data.copy_(slow)


class HooklessSlowWeights(SlowWeights):
    """As libraries have it: no constructor of torch's, and empty dicts where hooks would be."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Clipped:
    """No optimizer of torch's at all, and the one inside has a name of its own."""

    def __init__(self, wrapped):
        self.wrapped = wrapped

    def step(self):
        self.wrapped.step()
        with torch.no_grad():
            for group in self.wrapped.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.1, 0.1)


class Delegating:
    """Passes everything on, `step` included."""

    def __init__(self, inner):
        self.__dict__["inner"] = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class DelegatingClipped(Delegating):
    def step(self):
        self.inner.step()
        for group in self.inner.param_groups:
            for p in group["params"]:
                p.data.mul_(0.5)


class Each(Optimizer):
    """Several optimizers behind one step."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


class ClippedSGD(SGD):
    """A subclass: the hooks fire in its `step` and, where SGD itself is in use, in `super().step()`."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.clamp_(-0.1, 0.1)


class SelfMade(Optimizer):
    """An optimizer without torch's constructor, and with nothing inside."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=0.1)


class DuckTyped:
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def zero_grad(self):
        pass

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=0.1)


def slotted(model):
    class Slotted:
        __slots__ = ("__dict__", "optimizer")

        def __init__(self):
            self.optimizer = SGD(model.parameters(), lr=0.1)

        def step(self):
            self.optimizer.step()
            for p in model.parameters():
                p.data.clamp_(-0.1, 0.1)

    return Slotted()


def replaced_step(model):
    """A method of the instance in place of the class's, as monkey-patching does it."""
    optimizer = SGD(model.parameters(), lr=0.1)
    step = optimizer.step

    def clipped():
        step()
        for p in model.parameters():
            p.data.clamp_(-0.1, 0.1)

    optimizer.step = clipped
    return optimizer


WRAPPERS = {
    "hooks fire": lambda m: SlowWeights(SGD(m.parameters(), lr=0.1)),
    "no constructor": lambda m: HooklessSlowWeights(SGD(m.parameters(), lr=0.1)),
    "no optimizer": lambda m: Clipped(SGD(m.parameters(), lr=0.1)),
    "delegating": lambda m: Delegating(SGD(m.parameters(), lr=0.1)),
    "delegating with a step": lambda m: DelegatingClipped(SGD(m.parameters(), lr=0.1)),
    "two deep": lambda m: Clipped(HooklessSlowWeights(Adam(m.parameters(), lr=0.1))),
    "one that delegates in one that pulls": lambda m: SlowWeights(
        Each(SGD([m.weight], lr=0.1), SGD([m.bias], lr=0.2))
    ),
    "several": lambda m: Each(SGD([m.weight], lr=0.1), Adam([m.bias], lr=0.1)),
    "a subclass": lambda m: ClippedSGD(m.parameters(), lr=0.1),
    "a subclass inside": lambda m: SlowWeights(ClippedSGD(m.parameters(), lr=0.1)),
    "self-made": lambda m: SelfMade(m.parameters()),
    "duck-typed": lambda m: DuckTyped(m.parameters()),
    "slots": slotted,
    "step replaced on the instance": replaced_step,
}


class Sharpness(Optimizer):
    """SAM: a step in two halves, the optimizer inside in the second."""

    def __init__(self, parameters, correct=False):
        super().__init__(parameters, {})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)
        self.correct = correct

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad)

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if self.correct:  # WSAM
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class TwoHalves(SelfMade):
    """Without an optimizer inside: no hook sees its halves."""

    def __init__(self, parameters):
        Optimizer.__init__(self, parameters, {})

    def ascent_step(self):
        pass

    def descent_step(self):
        super().step()

    def update_step(self, parameter):
        """With arguments: a part of the work, not of the step."""


class Modes:
    """A schedule-free optimizer with its mode in an attribute; and one that writes through `.data`."""

    def __init__(self, base):
        self.base, self.train_mode = base, True

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self):
        self.base.zero_grad()

    def step(self):
        self.base.step()

    def eval(self):
        if self.train_mode:
            for p in self.param_groups[0]["params"]:
                p.data.mul_(2.0)
        self.train_mode = False

    def train(self):
        if not self.train_mode:
            for p in self.param_groups[0]["params"]:
                p.data.div_(2.0)
        self.train_mode = True
