"""A loop as in timm's train.py: the lines with model_ema, and what stands in their place.

python examples/timm_loop.py        # without timm: the model and the loop are small ones of the same form
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import polyak


def validate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        return sum(cross_entropy(model(x), y).item() for x, y in loader) / len(loader)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 1, 8, 8)
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    loader = DataLoader(data, 32, shuffle=True)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = polyak.LRSchedule(optimizer, polyak.schedules.Cosine(0.05, 0.001).over(24))

    # model_ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    average = polyak.Average(model, polyak.EMA(decay=0.9))
    average.attach(optimizer)

    for epoch in range(3):
        model.train()
        for inputs, targets in loader:
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            # model_ema.update(model, step=num_updates): nothing, the optimizer's hook does it
            scheduler.step()

        # utils.distribute_bn(model_ema, args.world_size, args.dist_bn == "reduce")
        average.update_bn(loader)
        # ema_eval_metrics = validate(model_ema, loader_eval, ...)
        with average.applied():
            averaged = validate(model, loader)
        print(f"epoch {epoch}: loss {validate(model, loader):.3f}, of the average {averaged:.3f}")

        # saver = CheckpointSaver(model=model, optimizer=optimizer, model_ema=model_ema, ...)
        state = {"state_dict": model.state_dict(), "polyak": average.state_dict()}
        torch.save(state | {"state_dict_ema": average.averaged_tensors()}, folder / "last.pth.tar")

    assert average.count == 24
    state = torch.load(folder / "last.pth.tar")
    model.load_state_dict(state["state_dict_ema"])  # as timm does for evaluation
    assert abs(validate(model, loader) - averaged) < 1e-5
    resumed = polyak.Average(model, polyak.EMA(decay=0.9))
    resumed.load_state_dict(state["polyak"])
    assert resumed.count == 24


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
