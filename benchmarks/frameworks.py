"""What averaging adds to a real run in a framework, beside what people use there: time and memory.

    python benchmarks/frameworks.py [--only lightning] [--steps 60] [--rounds 7] [--width 512]

Each framework runs the same training without an average, with polyak's adapter, and with its own callback or
the usual copy. The runs take turns in one process. Time is the CPU time that a step takes longer than in the run
without, after the first steps; memory is what is alive more at the end of the last step.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from timing import figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak

WARM = 5  # steps before time is taken
DECAY = 0.999
NEVER = 10**6  # a step that no run comes to


class Watch:
    """The time of a step, and the bytes that are alive after the last one."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0

    def step(self) -> None:
        self._done += 1
        if self._done == WARM:
            self._begun = time.process_time()
        if self._done == self._steps:
            self.seconds = (time.process_time() - self._begun) / (self._steps - WARM)
            self.alive = alive()


Run = Callable[[Watch, int, int], None]
ARMS: dict[str, Callable[[], dict[str, Run]]] = {}  # frameworks, and their runs by name


def arm(function: Callable[[], dict[str, Run]]) -> Callable[[], dict[str, Run]]:
    ARMS[function.__name__] = function
    return function


def network(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(24)))


@arm
def lightning() -> dict[str, Run]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

    from polyak.integrations.lightning import WeightAveraging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.net = network(width)

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Watches(Callback):
        def __init__(self, watch: Watch) -> None:
            self._watch = watch

        def on_train_batch_end(self, *_) -> None:
            self._watch.step()

    def run(make: Callable[[], Any]) -> Run:
        def call(watch: Watch, steps: int, width: int) -> None:
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                callbacks=[*make(), Watches(watch)],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Module(width), DataLoader(TensorDataset(torch.zeros(steps, width))))

        return call

    return {
        "none": run(list),
        "polyak": run(lambda: [WeightAveraging(polyak.EMA(decay=DECAY))]),
        "own": run(lambda: [EMAWeightAveraging(decay=DECAY)]),
        "polyak_not_begun": run(lambda: [WeightAveraging(polyak.EMA(decay=DECAY), start=NEVER)]),
        "own_not_begun": run(
            lambda: [EMAWeightAveraging(decay=DECAY, update_starting_at_step=NEVER)]
        ),
    }


@arm
def transformers() -> dict[str, Run]:
    from transformers import (  # fmt: skip
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from polyak.integrations.transformers import attach

    class DeepCopy(TrainerCallback):
        """As in many repositories: one kernel per parameter."""

        def on_train_begin(self, args, state, control, model, **objects):
            self.average = copy.deepcopy(model)

        @torch.no_grad()
        def on_step_end(self, args, state, control, model, **objects):
            for kept, live in zip(self.average.parameters(), model.parameters(), strict=True):
                kept.mul_(DECAY).add_(live, alpha=1 - DECAY)

    class Watches(TrainerCallback):
        def __init__(self, watch: Watch) -> None:
            self._watch = watch

        def on_step_end(self, *args, **objects):
            self._watch.step()

    def run(add: Callable[[Trainer], Any]) -> Run:
        def call(watch: Watch, steps: int, width: int) -> None:
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4}
            ids = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
            row = torch.arange(16)
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    folder, max_steps=steps, per_device_train_batch_size=1, use_cpu=True, report_to=[],
                    disable_tqdm=True, save_strategy="no", logging_strategy="no",
                )  # fmt: skip
                trainer = Trainer(
                    LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=4)),
                    arguments,
                    train_dataset=[{"input_ids": row, "labels": row}] * 8,
                )
                add(trainer)
                trainer.add_callback(Watches(watch))
                with redirect_stdout(io.StringIO()):
                    trainer.train()

        return call

    return {
        "none": run(lambda trainer: None),
        "polyak": run(lambda trainer: attach(trainer, polyak.EMA(decay=DECAY))),
        "deepcopy": run(lambda trainer: trainer.add_callback(DeepCopy())),
    }


@arm
def accelerate() -> dict[str, Run]:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from ema_pytorch import EMA

    from polyak.integrations.accelerate import track

    def run(make: Callable[[Any, nn.Module, Any], Callable[[], None]]) -> Run:
        def call(watch: Watch, steps: int, width: int) -> None:
            accelerator, model = Accelerator(cpu=True), network(width)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model, optimizer = accelerator.prepare(model, optimizer)
            update = make(accelerator, model, optimizer)
            for _ in range(steps):
                accelerator.backward(model(torch.zeros(1, width)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                update()
                watch.step()

        return call

    def ours(accelerator, model, optimizer):
        average = polyak.Average(model, polyak.EMA(decay=DECAY))
        average.attach(optimizer)
        tracking = track(accelerator, average)
        return lambda: tracking and None

    def of_diffusers(accelerator, model, optimizer):
        average = EMAModel(model.parameters(), decay=DECAY, foreach=True)
        return lambda: average.step(model.parameters())

    def of_ema_pytorch(accelerator, model, optimizer):
        options = {"update_every": 1, "update_after_step": 0, "include_online_model": False}
        return EMA(model, beta=DECAY, **options).update

    return {
        "none": run(lambda *_: lambda: None),
        "polyak": run(ours),
        "diffusers": run(of_diffusers),
        "ema_pytorch": run(of_ema_pytorch),
    }


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: gradients are freed and made again at each step, and whether that goes
    back to the system, to be faulted in again, depends on what else is alive: more than an average costs."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_mmap_max, 0)


def alive() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(runs: dict[str, Run], rounds: int, steps: int, width: int) -> dict[str, list[Watch]]:
    """Each run once a round, in rotating order, after one round that does not count."""
    names, watches = list(runs), {name: [] for name in runs}
    for index in range(rounds + 1):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            watch = Watch(steps)
            runs[name](watch, steps, width)
            if index:
                watches[name].append(watch)
    return watches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(ARMS), action="append")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    for framework in options.only or ARMS:
        watches = measured(ARMS[framework](), options.rounds, options.steps, options.width)
        plain = watches.pop("none")
        added = {
            name: [one.seconds - none.seconds for one, none in zip(of, plain, strict=True)]
            for name, of in watches.items()
        }
        figure(
            framework,
            none_ms_per_step=statistics.median(one.seconds for one in plain) * 1e3,
            **{f"{n}_adds_ms_per_step": statistics.median(s) * 1e3 for n, s in added.items()},
            **{
                f"polyak_to_{name}": statistics.median(
                    ours / theirs for ours, theirs in zip(added["polyak"], of, strict=True)
                )
                for name, of in added.items()
                if name != "polyak"
            },
            **{
                f"{n}_adds_mib": (of[-1].alive - plain[-1].alive) / 2**20
                for n, of in watches.items()
            },
        )


if __name__ == "__main__":
    main()
