"""The mean of checkpoints in float64, whole tensors at a time: ten obvious lines."""

import math

import torch


def weighted_sum(states, weights):
    """Name -> sum of weight x tensor, in float64."""
    return {
        name: sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        for name in states[0]
    }


def unit_in_last_place(value, dtype):
    """The distance to the next larger number of `dtype`, elementwise, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(value.double(), info.eps), exponent)


def within_bound(found, states, weights):
    """|found - exact| <= half ulp of the output + N 2^-24 sum |c x|, in every element and tensor."""
    exact = weighted_sum(states, weights)
    slack = weighted_sum(
        [{n: t.double().abs() for n, t in s.items()} for s in states], [abs(w) for w in weights]
    )
    for name, tensor in found.items():
        unit = 2.0**-53 if states[0][name].dtype == torch.float64 else 2.0**-24
        bound = unit_in_last_place(exact[name], tensor.dtype) / 2 + len(states) * unit * slack[name]
        error = (tensor.double() - exact[name]).abs()
        if not bool((error <= bound).all()):
            worst = float((error / bound.clamp(min=math.ulp(0.0))).max())
            raise AssertionError(f"{name}: {worst:.3f} of the bound")
    return True


def stored_checkpoints(folder, states, steps=None):
    """The states as `step-<n>.safetensors`; the paths."""
    from safetensors.torch import save_file

    paths = []
    for i, state in enumerate(states):
        paths.append(folder / f"step-{steps[i] if steps else (i + 1) * 100}.safetensors")
        save_file(state, paths[-1])
    return paths
