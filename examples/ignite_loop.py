"""Ignite: the average is attached to the optimizer; two handlers evaluate it, and Checkpoint saves it.

python examples/ignite_loop.py        # works in a temporary folder
"""

import tempfile

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import MeanSquaredError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak


def main(folder: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 4)
    batches = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    trainer = create_supervised_trainer(
        model, optimizer, nn.MSELoss(), gradient_accumulation_steps=2
    )
    evaluator = create_supervised_evaluator(model, {"loss": MeanSquaredError()})
    average = polyak.Average(model, polyak.EMA.from_half_life(5))  # average
    average.attach(optimizer)  # average: counts steps, where EMAHandler counts batches

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        with (
            average.applied()
        ):  # average: around the run, so that an exception gives the weights back
            evaluator.run(batches)

    saved = {"model": model, "optimizer": optimizer, "trainer": trainer, "average": average}
    saver = Checkpoint(saved, DiskSaver(folder, require_empty=False))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(batches, max_epochs=3)

    loss = evaluator.state.metrics["loss"]
    print(f"{average.count} steps averaged, loss of the average {loss:.3f}")
    assert average.count == 12  # of 24 batches
    at_the_end = average.averaged_tensors()
    with average.applied(), torch.no_grad():
        assert abs(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item() - loss) < 1e-5

    average.reset()
    Checkpoint.load_objects(saved, saver.last_checkpoint)  # resumes the average as well
    assert average.count == 12
    assert all(torch.equal(t, at_the_end[n]) for n, t in average.averaged_tensors().items())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
