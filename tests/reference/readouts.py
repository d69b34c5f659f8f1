"""Read-outs of uncertainty in float64, one example after the other."""

import math


def brier(probabilities, labels):
    total = 0.0
    for p, y in zip(probabilities, labels, strict=True):
        total += sum((value - (k == y)) ** 2 for k, value in enumerate(p))
    return total / len(labels)


def entropy(p):
    return -sum(value * math.log(value) for value in p if value > 0)


def auroc(inside, outside):
    wins = sum((b > a) + 0.5 * (a == b) for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def ece_of_equal_mass(probabilities, labels, n_bins):
    """Bins begin at the values with the ranks n b / B; equal confidences stay together."""
    examples = sorted(
        (max(p), p.index(max(p)) == y) for p, y in zip(probabilities, labels, strict=True)
    )
    starts = [examples[len(examples) * b // n_bins][0] for b in range(1, n_bins)]
    bins = [[] for _ in range(n_bins)]
    for confidence, right in examples:
        bins[sum(start <= confidence for start in starts)].append((confidence, right))
    return sum(abs(sum(right for _, right in one) - sum(c for c, _ in one)) for one in bins) / len(
        examples
    )


def mixture(members):
    """The mean of distributions, its entropy, and the mutual information: one example."""
    mean = [sum(p[k] for p in members) / len(members) for k in range(len(members[0]))]
    expected = sum(map(entropy, members)) / len(members)
    return mean, entropy(mean), entropy(mean) - expected
