"""SWAD's algorithm 1 as it is printed, with every weight kept; and two-tailed averaging likewise."""

from __future__ import annotations

import numpy as np


def swad_window(losses, n_start, n_end, tolerance):
    """(t_s, t_e), counted from 1; the loop of the paper's algorithm 1 over evaluations i."""
    begins, limit = None, None
    loss_at = dict(enumerate(losses, 1))
    for i in loss_at:
        if limit is None:
            if i - n_start + 1 < 1:
                continue
            several = [loss_at[i - j] for j in range(n_start)]
            if loss_at[i - n_start + 1] == min(several):
                begins, limit = i - n_start + 1, tolerance / n_start * sum(several)
        elif i - n_end + 1 >= 1 and limit < min(loss_at[i - j] for j in range(n_end)):
            return begins, i - n_end
    return begins, None


def swad_mean(segments, losses, n_start, n_end, tolerance):
    """The mean in float64 of all weights; segments[i] are those before evaluation i + 1."""
    begins, ends = swad_window(losses, n_start, n_end, tolerance)
    if begins is None:
        return np.mean(segments[len(losses) - 1], axis=0)
    inside = segments[begins - 1 : ends or len(losses)]
    return np.mean(np.concatenate(inside), axis=0)


def two_tailed_begins(weights, every, score):
    """Melis's algorithm 1 with all weights kept: where the long average begins after each evaluation."""
    long, short, begins = 0, 0, []
    for now in range(every, len(weights) + 1, every):
        if score(weights[short:now].mean(axis=0)) <= score(weights[long:now].mean(axis=0)):
            long, short = short, now
        begins.append(long)
    return begins
