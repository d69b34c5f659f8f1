"""Train the reference network with a cyclic rate, keep a SWAG, and ask how sure it is.

python examples/swag.py [EPOCHS]        # by default 4
"""

import sys

import torch
from torch.nn.functional import cross_entropy

import polyak
from polyak import uncertainty
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net
from polyak.schedules import Constant, CyclicLinear, chain

BATCH = 64


def main(epochs: int = 4) -> None:
    torch.manual_seed(0)
    data = embedded_data()
    steps = len(data.train) // BATCH
    cycles = CyclicLinear(high=0.05, low=0.01, cycle=steps // 4)
    schedule = chain((epochs // 2 * steps, Constant(0.05)), (epochs * steps, cycles))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lr = polyak.LRSchedule(optimizer, schedule)

    swag = polyak.SWAG(model, rank=5)
    swag.attach(optimizer, at=lr)  # at the end of every cycle
    for _ in range(epochs * steps):
        picked = torch.randint(len(data.train), (BATCH,))
        loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr.step()
    print(swag)

    images, labels = data.test.images, data.test.labels
    batches = images.split(500)
    upside_down = images.flip(-2).split(500)
    generator = torch.Generator().manual_seed(0)
    for name, members in (
        ("last weights", model),
        ("SWA", swag.averaged_tensors()),
        ("SWAG", swag),
    ):
        prediction = polyak.predict(members, batches, draws=10, generator=generator, model=model)
        unlike = polyak.predict(members, upside_down, draws=10, generator=generator, model=model)
        scores = {key: round(value, 3) for key, value in prediction.scores(labels).items()}
        told_apart = uncertainty.auroc(prediction.entropy, unlike.entropy)
        print(f"{name:12} {scores}, told from upside down (AUROC) {told_apart:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
