"""PEFT: its functions for deltas, and `add_weighted_adapter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peers import NotOffered, Peer, State


class Peft(Peer):
    name = "peft"

    def combine(self, method: str, base: State | None, runs: list[State], **how: Any) -> State:
        from peft.utils import merge_utils

        functions = {"ties": merge_utils.ties, "dare": merge_utils.dare_linear}
        if method not in functions or base is None:
            raise NotOffered
        weights = torch.full((len(runs),), 1.0 if method == "ties" else 1 / len(runs))
        return {
            name: start
            + functions[method](
                [run[name].float() - start.float() for run in runs], weights, how["density"]
            ).to(start.dtype)
            for name, start in base.items()
        }

    def mean_of_adapters(self, base: nn.Module, folders: list[str]) -> Tensor:
        from peft import PeftModel

        names = [f"run{number}" for number in range(len(folders))]
        model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        weights = [1 / len(folders)] * len(folders)
        model.add_weighted_adapter(names, weights, "mean", combination_type="cat")
        return model.base_model.model[0].get_delta_weight("mean")
