#!/usr/bin/env bash
# torch 2.13.0: second derivatives of samples from Beta and Dirichlet
#
# Guess:   What has no second derivative says so: the samples' gradient is a function marked `once_differentiable`, whose
#          purpose is an error when it is differentiated twice, and samples from Gamma raise NotImplementedError.
# Reality: The error is raised by `backward()` alone, and only if the samples enter the loss nonlinearly.
#          `torch.autograd.grad` follows the paths that lead to its inputs, on which the node that would raise does not
#          lie: with `allow_unused=True` the second derivative is None, `torch.autograd.functional.hessian` and `hvp`
#          return zeros, and in a sum with anything else the samples' part is missing. No warning.
# Matters: Newton steps, Laplace approximations, gradient penalties and curvature of a loss with such a sample are
#          those of the other terms alone. Here the Hessian in the first parameter is 2, that of the penalty; with
#          the mean's -2b / (a + b)^3 it is 1.952. The same holds for all functions that packages mark so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" -W error - > "$folder/seen" <<'PYTHON'
import torch
from torch.autograd.functional import hessian, hvp
from torch.distributions import Beta, Gamma

torch.set_num_threads(1)
b = torch.tensor(3.0)


def mean_of_samples(a):
    torch.manual_seed(0)
    return Beta(a.expand(200_000), b.expand(200_000)).rsample().mean()


def squared(a):
    torch.manual_seed(0)
    return Beta(a.expand(200_000), b.expand(200_000)).rsample().square().mean()


def gamma(a):
    torch.manual_seed(0)
    return Gamma(a.expand(200_000), b.expand(200_000)).rsample().mean()


def attempt(what, call):
    try:
        print(what, call())
    except (RuntimeError, NotImplementedError) as error:
        print(what, f"{type(error).__name__}:", str(error).partition(".")[0])


a = torch.tensor(2.0, requires_grad=True)
first = torch.autograd.grad(mean_of_samples(a), a)[0].item()
print(f"gradient of the mean: {first:.2f}, that is b / (a + b)^2: {b / (a.detach() + b) ** 2:.2f}")
print(f"its derivative, -2b / (a + b)^3: {-2 * b / (a.detach() + b) ** 3:.3f}")
one = torch.tensor(1.0)
attempt("hessian, Beta:", lambda: hessian(mean_of_samples, a.detach()).item())
attempt("hessian, Beta + a^2:", lambda: hessian(lambda a: mean_of_samples(a) + a**2, a.detach()).item())
attempt("hessian, Beta squared + a^2:", lambda: hessian(lambda a: squared(a) + a**2, a.detach()).item())
attempt("hvp, Beta squared + a^2:", lambda: hvp(lambda a: squared(a) + a**2, a.detach(), one)[1].item())
attempt("hessian, Gamma + a^2:", lambda: hessian(lambda a: gamma(a) + a**2, a.detach()).item())


def backward_twice(loss):
    a.grad = None
    (gradient,) = torch.autograd.grad(loss(a) + a**2, a, create_graph=True)
    gradient.backward()
    return a.grad.item()


attempt("backward of the gradient, Beta + a^2:", lambda: backward_twice(mean_of_samples))
attempt("backward of the gradient, Beta squared + a^2:", lambda: backward_twice(squared))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
gradient of the mean: 0.12, that is b / (a + b)^2: 0.12
its derivative, -2b / (a + b)^3: -0.048
hessian, Beta: 0.0
hessian, Beta + a^2: 2.0
hessian, Beta squared + a^2: 2.0
hvp, Beta squared + a^2: 2.0
hessian, Gamma + a^2: NotImplementedError: the derivative for '_standard_gamma_grad' is not implemented
backward of the gradient, Beta + a^2: 2.0
backward of the gradient, Beta squared + a^2: RuntimeError: trying to differentiate twice a function that was marked with @once_differentiable
SEEN
