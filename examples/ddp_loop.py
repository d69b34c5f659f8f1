"""A plain loop with DistributedDataParallel: three lines, marked "average". Here on two processes.

torchrun --nproc-per-node 2 examples/ddp_loop.py        # or python examples/ddp_loop.py, which does so
"""

import os
import subprocess
import sys

import torch
from torch import distributed, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import polyak


def main() -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(256, 1))
    batches = DataLoader(data, 16, sampler=DistributedSampler(data))
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    average = polyak.Average(model, polyak.EMA.from_half_life(10))  # average
    average.attach(optimizer)  # average

    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        for inputs, targets in batches:
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            optimizer.step()

        average.update_bn(batches)  # measured on the batches of both processes
        model.eval()
        with average.applied(), torch.no_grad():  # average
            loss = mse_loss(model(x), data.tensors[1])
        model.train()
    if distributed.get_rank() == 0:
        average.save("averaged.safetensors", overwrite=True)  # names without "module."
        print(f"{average.count} steps averaged, loss {loss:.3f}")

    # Every process has the same average, so nothing has to be sent.
    first = average.averaged_tensors()
    for name, tensor in first.items():
        distributed.broadcast(tensor, src=0)
        assert torch.equal(tensor, average.averaged_tensors()[name]), name
    distributed.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        main()
    else:
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([sys.executable, "-m", *launch, __file__], check=True, timeout=240)
