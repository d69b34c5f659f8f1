"""Train the reference network on its images, keep a checkpoint per epoch, and average them afterwards.

python examples/average_checkpoints.py [EPOCHS]        # 6 by default; works in a temporary folder
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import polyak
from polyak.batchnorm import update_bn_file
from polyak.errors import StaleStatistics
from polyak.reference_run.data import Data, embedded_data
from polyak.reference_run.models import Net

BATCH = 60


def train(folder: Path, data: Data, epochs: int) -> None:
    """SGD at a constant, high rate: each checkpoint is one noisy point around the solution."""
    torch.manual_seed(0)
    model = Net(batchnorm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, epochs + 1):
        for picked in torch.randperm(len(data.train)).split(BATCH):
            loss = cross_entropy(model(data.train.images[picked]), data.train.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        step = epoch * len(data.train) // BATCH
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, folder / f"checkpoint-{step}.pt")


def test_error(state: dict[str, torch.Tensor], data: Data) -> float:
    """Percent of the test images."""
    model = Net(batchnorm=True).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        wrong = model(data.test.images).argmax(1) != data.test.labels
    return 100 * float(wrong.float().mean())


def main(epochs: int) -> None:
    data = embedded_data()
    methods = {
        "all": "swa",
        "later half": f"window:length={epochs * len(data.train) // BATCH // 2}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train(folder, data, epochs)
        outputs = {folder / f"{name}.safetensors": how for name, how in methods.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleStatistics)  # update_bn_file follows
            done = polyak.average_checkpoints(folder.glob("checkpoint-*.pt"), outputs)
        newest = torch.load(done.inputs[-1], weights_only=True)["model"]
        print(f"newest checkpoint: test error {test_error(newest, data):.1f} %")
        for path, recipe in zip(done.outputs, done.recipes, strict=True):
            update_bn_file(path, Net(batchnorm=True), data.train.batches(500))
            error = test_error(load_file(path), data)
            count = recipe.effective_samples
            print(f"{path.stem}, {count:.0f} effective samples: test error {error:.1f} %")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
