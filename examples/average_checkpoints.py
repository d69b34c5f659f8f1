"""Train a little, keep checkpoints, and average them afterwards in three ways at once.

python examples/average_checkpoints.py        # works in a temporary folder
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import polyak


def train(folder: Path) -> torch.nn.Module:
    """Noisy steps around the solution of a regression; a checkpoint every 50."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 501):
        inputs = torch.randn(16, 10)
        targets = inputs.sum(1, keepdim=True) + torch.randn(16, 1)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        if step % 50 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, folder / f"checkpoint-{step}.pt")
    return model


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = train(folder)
        methods = {
            "swa": "swa:start=100",
            "ema": "ema:half_life=100",
            "last_200": "window:length=200",
        }
        outputs = {folder / f"{name}.safetensors": how for name, how in methods.items()}
        done = polyak.average_checkpoints(folder.glob("checkpoint-*.pt"), outputs)
        print(f"last weights: error {float((model.weight.detach() - 1).norm()):.3f}")
        for path, recipe in zip(done.outputs, done.recipes, strict=True):
            error = float((load_file(path)["weight"] - 1).norm())
            print(
                f"{path.stem}: error {error:.3f}, {recipe.effective_samples:.1f} effective samples"
            )


if __name__ == "__main__":
    main()
