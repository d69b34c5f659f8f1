"""Train two networks from one start: the barrier between them, their plane, and how sharp each is.

python examples/landscape.py [EPOCHS]        # by default 1; works in a temporary folder
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net
from polyak.report import save_scan

BATCH = 64


def mean_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def main(epochs: int = 1) -> None:
    data = embedded_data()
    points = {}
    for name, order in (("one", 1), ("other", 2)):
        torch.manual_seed(0)
        model = Net(batchnorm=True)
        points.setdefault("start", {n: t.clone() for n, t in model.state_dict().items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(order)
        for _ in range(epochs):
            for picked in torch.randperm(len(data.train)).split(BATCH):
                loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        points[name] = {n: t.clone() for n, t in model.state_dict().items()}
    scored = polyak.study.ScaledNLL([(data.test.images[:200], data.test.labels[:200])])
    how = {"model": model, "data": [data.train.images[:100]]}
    ends = {name: points[name] for name in ("one", "other")}
    print(polyak.study.scan_line(ends, scored, points=5, **how))
    plane = polyak.study.scan_plane(points, scored, points=3, **how)
    few = [(data.train.images[:64], data.train.labels[:64])]
    for name in ends:
        model.load_state_dict(points[name])
        found = polyak.study.hessian_eigenvalues(model, mean_loss, few, iterations=8)
        print(f"Largest eigenvalue of the Hessian at {name}: {found}")
    with tempfile.TemporaryDirectory() as folder:
        save_scan(plane, Path(folder) / "plane.svg", ylabel="scaled NLL")
        print(f"{plane}\nA picture of {(Path(folder) / 'plane.svg').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
