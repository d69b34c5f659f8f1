"""The hardware of a run: device, memory format, precision, and what its bits depend on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyak.errors import ArgumentError


@dataclass(frozen=True)
class Hardware:
    """A device. Images are channels-last on all of them; a GPU computes in bfloat16 autocast.

    Bytes and labels become int64 there, as torch takes them.
    """

    device: torch.device

    @classmethod
    def named(cls, name: str) -> Hardware:
        """`cpu`, `cuda`, or `auto`: cuda if there is one. Raises ArgumentError for others."""
        if name not in ("auto", "cpu", "cuda"):
            raise ArgumentError(f"device is {name!r}; expected auto, cpu or cuda.")
        available = torch.cuda.is_available()
        if name == "cuda" and not available:
            raise ArgumentError("device is 'cuda', but torch finds none; use cpu or auto.")
        if not available or name == "cpu":
            return cls(torch.device("cpu"))
        return cls(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))  # torchrun's

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, channels-last."""
        # torch's stubs lack memory_format on Module.to; its documentation has it.
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def inputs(self, batch: Tensor) -> Tensor:
        """A batch of inputs on the device; images channels-last (twice as fast for small images)."""
        if batch.dim() != 4:
            return self.labels(batch)
        return batch.to(self.device, memory_format=torch.channels_last)

    def labels(self, batch: Tensor) -> Tensor:
        """A batch of labels on the device."""
        return batch.to(self.device, torch.int64)

    def precision(self) -> AbstractContextManager[object]:
        """Autocast to bfloat16 on a GPU, nothing on the CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def environment(self) -> dict[str, str]:
        """What must be equal for a resumed run to end in the same bits."""
        on_gpu = self.device.type == "cuda"
        return {
            "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
            "threads": str(torch.get_num_threads()),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        }

    def random_state(self) -> dict[str, Tensor]:
        """The state of torch's generators on the CPU and on the device."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Set the generators back to `random_state`."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
