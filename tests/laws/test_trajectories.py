"""A small real run: averages made afterwards are as close to the live ones as the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak.reference_run.data import embedded_data

STEPS, ENDS = 1600, (400, 800, 1000, 1200, 1600)
PROFILES = {
    "ema-10%": "ema:half_life=110",
    "ema-5%": "ema:half_life=55",
    "power": "power:std=0.1",
    "window": "window:length=330",
}


def flat(tensors):
    return torch.cat([tensors[n].double().flatten() for n in sorted(tensors)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small classifier of images at a constant rate, its record, and what the live averages were."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    data = embedded_data().train
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    live = polyak.Averages(model, PROFILES)
    live.attach(optimizer)
    found = {}
    with polyak.Recorder(model, folder, total=STEPS, intervals=64) as recorder:
        recorder.attach(optimizer)
        for step in range(1, STEPS + 1):
            picked = torch.randint(len(data.labels), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[picked]), data.labels[picked]).backward()
            optimizer.step()
            if step in ENDS:
                last = flat({n: p.detach() for n, p in model.named_parameters()})
                found[step] = (last, {n: flat(a.averaged_tensors()) for n, a in live.items()})
    return polyak.Trajectory(folder), found


def test_the_planned_error_holds_in_19_of_20_pairs(run):
    trajectory, found = run
    quotients = []
    for end, (last, live) in found.items():
        for name, profile in PROFILES.items():
            plan = trajectory.plan(profile, end)
            made = flat(trajectory.average(profile, end))
            error = (made - live[name]).norm() / (live[name] - last).norm()
            quotients.append(float(error) / plan.error)
    assert len(quotients) == 20
    assert sum(q <= 1.5 for q in quotients) >= 19, quotients
    assert sum(quotients) / len(quotients) > 0.3, quotients  # and it is no upper bound
