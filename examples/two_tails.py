"""Average without choosing a start: two-tailed averaging and SWAD beside the same training.

python examples/two_tails.py [EPOCHS]        # by default 3
"""

import sys

import torch
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net

BATCH = 64


def main(epochs: int = 3) -> None:
    torch.manual_seed(0)
    data = embedded_data()
    images, labels = data.test.images[:300], data.test.labels[:300]  # stands for a validation set
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    tails, swad = polyak.TwoTailed(model), polyak.SWAD(model)
    tails.attach(optimizer)
    swad.attach(optimizer)

    @torch.no_grad()
    def loss_of(network: torch.nn.Module) -> float:
        return float(cross_entropy(network(images), labels))

    for _ in range(epochs):
        for step, picked in enumerate(torch.randperm(len(data.train)).split(BATCH)):
            optimizer.zero_grad()
            cross_entropy(model(data.train.images[picked]), data.train.labels[picked]).backward()
            optimizer.step()
            if step % 10 == 9:
                tails.score(loss_of)
                swad.score(loss_of(model))
    print(f"The last weights: {loss_of(model):.4f}")
    for name, one in (("two-tailed averaging", tails), ("SWAD", swad)):
        with one.average.applied():
            print(f"{name}: {loss_of(model):.4f}, of {one.average.count} weights")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
