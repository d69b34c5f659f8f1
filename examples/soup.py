"""Fine-tune the reference network at several rates and seeds, and make one network of them.

python examples/soup.py [EPOCHS]        # of the base, by default 3; works in a temporary folder
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from polyak.reference_run.data import Data, Split, embedded_data
from polyak.reference_run.models import Net
from polyak.study import make_soup

BATCH = 60
RATES = (0.02, 0.05)


def train(model: Net, data: Data, epochs: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for picked in torch.randperm(len(data.train)).split(BATCH):
            loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def losses(model: Net, split: Split) -> torch.Tensor:
    """The NLL of each image."""
    return cross_entropy(model(split.images), split.labels, reduction="none")


def main(epochs: int) -> None:
    data, base = embedded_data(), Net()
    train(base, data, epochs, 0.1, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed, rate in enumerate(RATES * 2):
            model = Net()
            model.load_state_dict(base.state_dict())
            train(model, data, 1, rate, seed)
            torch.save(model.state_dict(), folder / f"run-{seed}.pt")
        soups = {}
        for method in ("greedy", "learned", "uniform"):
            soups[method] = make_soup(
                folder.glob("run-*.pt"),
                folder / f"{method}.pt",
                lambda model: losses(model, data.validation),
                method=method,
                model=Net(),
                minimize=True,
                name="validation NLL",
            )
        print(soups["greedy"])
        for path in (
            soups["greedy"].ingredients[0].path,
            *(soup.output for soup in soups.values()),
        ):
            model = Net().eval()
            model.load_state_dict(torch.load(path))
            print(f"{Path(path).name}: test NLL {losses(model, data.test).mean():.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
