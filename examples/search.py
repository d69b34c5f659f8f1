"""Record a run, then ask the record which average is best, and when the run could have ended.

python examples/search.py [EPOCHS]        # by default 4; works in a temporary folder
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net
from polyak.report import write_search

BATCH = 64


def main(epochs: int = 4) -> None:
    torch.manual_seed(0)
    data = embedded_data()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = epochs * len(data.train) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        with polyak.Recorder(model, record, total=steps, intervals=32) as recorder:
            recorder.attach(optimizer)
            for _ in range(steps):
                picked = torch.randint(len(data.train), (BATCH,))
                loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        trajectory = polyak.Trajectory(record)
        evaluate = polyak.study.ScaledNLL([(data.validation.images, data.validation.labels)])
        best = trajectory.search(evaluate, model=model, last=model.state_dict())
        print(best)
        enough = trajectory.stop(evaluate, model=model, points=4)
        print(enough)
        page = write_search([best, enough], Path(folder) / "search.html")
        print(f"The page has {page.stat().st_size / 1000:.0f} kB.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
