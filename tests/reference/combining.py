"""TIES, DARE, Model Stock and SLERP in float64, whole tensors at a time, as the papers write them."""

import torch


def deltas(base, inputs):
    return [x.double() - base.double() for x in inputs]


def ties(base, inputs, density, scale=1.0, weights=None):
    weights = weights or [1.0] * len(inputs)
    kept = []
    for delta in deltas(base, inputs):
        count = max(1, int(density * delta.numel()))
        least = delta.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(delta.abs() >= least, delta, 0.0))
    return base.double() + scale * elected(kept, weights)


def elected(kept, weights):
    sign = torch.where(sum(w * d for w, d in zip(weights, kept, strict=True)) >= 0, 1.0, -1.0)
    agree = [(d.sign() == sign).double() * w for w, d in zip(weights, kept, strict=True)]
    total = sum(agree)
    summed = sum(a * d for a, d in zip(agree, kept, strict=True))
    return torch.where(total > 0, summed / total.clamp(min=1e-300), 0.0)


def dare(base, inputs, masks, density, scale=1.0, weights=None, elect=False):
    weights = weights or [1 / len(inputs)] * len(inputs)
    kept = [m * d / density for m, d in zip(masks, deltas(base, inputs), strict=True)]
    merged = (
        elected(kept, weights) if elect else sum(w * d for w, d in zip(weights, kept, strict=True))
    )
    return base.double() + scale * merged


def cosine(one, other):
    return float((one * other).sum() / (one.norm() * other.norm()))


def stock_share(base, inputs):
    found, count = deltas(base, inputs), len(inputs)
    pairs = [cosine(found[i], found[j]) for i in range(count) for j in range(i)]
    mean = max(0.0, sum(pairs) / len(pairs))
    return count * mean / (1 + (count - 1) * mean)


def model_stock(base, inputs):
    t, count = stock_share(base, inputs), len(inputs)
    return (1 - t) * base.double() + t * sum(x.double() for x in inputs) / count


def slerp(base, inputs, t):
    first, second = deltas(torch.zeros_like(inputs[0]) if base is None else base, inputs)
    angle = torch.acos(torch.tensor(cosine(first, second), dtype=torch.float64))
    arc = (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)
    return arc if base is None else base.double() + arc
