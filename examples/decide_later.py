"""Record a run of the reference network, and decide afterwards which average to take of it.

python examples/decide_later.py [EPOCHS]        # by default 4; works in a temporary folder
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net

BATCH = 64
CANDIDATES = ("swa", "ema:half_life=60", "power:std=0.1", "annealed:shape=sqrt")


def main(epochs: int = 4) -> None:
    torch.manual_seed(0)
    data = embedded_data()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        steps = epochs * len(data.train) // BATCH
        with polyak.Recorder(model, record, total=steps) as recorder:
            recorder.attach(optimizer)
            for _ in range(steps):
                picked = torch.randint(len(data.train), (BATCH,))
                loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        trajectory = polyak.Trajectory(record)
        print(trajectory.plan("ema:half_life=60"))
        images, labels = data.validation.images, data.validation.labels
        for profile in (*CANDIDATES, f"window:length={steps // 4}"):
            model.load_state_dict(trajectory.average(profile))
            with torch.no_grad():
                score = float(cross_entropy(model(images), labels))
            print(f"{profile:24} validation loss {score:.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
