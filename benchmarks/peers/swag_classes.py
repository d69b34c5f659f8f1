"""The SWAG of swa-gaussian (the authors') and of torch-uncertainty, from wheels in the folder SWAG_WHEELS.

Only the modules with the classes are loaded: neither package needs to be installed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from swag_peers import from_wheel, peers, vector
from torch import Tensor, nn

from peers import Peer, Posterior


class _FromWheel(Peer):
    distribution = ""
    place: int

    def __init__(self) -> None:
        folder = Path(os.environ["SWAG_WHEELS"])
        self.folder, self.kind = folder, peers(folder)[self.place]
        wheel = next(folder.glob(f"{self.distribution}-*.whl"))
        self._version = wheel.name.split("-")[1]

    @property
    def version(self) -> str:
        return self._version


class _Authors(Posterior):
    def __init__(self, kind: Any, utils: Any, model: nn.Module) -> None:
        self.model, self.utils = model, utils
        self.swag = kind(lambda: copy.deepcopy(model), no_cov_mat=False, max_num_models=20)

    def collect(self) -> None:
        self.swag.collect_model(self.model)

    def deviations(self) -> Tensor:
        _, variances = self.swag.export_numpy_params()
        return torch.as_tensor(variances).double().clamp(min=self.swag.var_clamp).sqrt()

    def draws(self, count: int) -> Tensor:
        drawn = []
        for _ in range(count):
            self.swag.sample(cov=True)
            drawn.append(vector(getattr(module, name) for module, name, _ in self.swag.params))
        return torch.stack(drawn)

    def drawn(self, batches: list[Tensor]) -> nn.Module:
        self.swag.sample(cov=True)
        self.utils.bn_update([(batch, None) for batch in batches], self.swag, "cpu")
        return self.swag.base


class _OfMethods(Posterior):
    def __init__(self, kind: Any, model: nn.Module) -> None:
        self.model, self.epoch = model, 0
        self.swag = kind(copy.deepcopy(model), 0, 1, num_estimators=1)

    def collect(self) -> None:
        self.epoch += 1
        self.swag.core_model.load_state_dict(self.model.state_dict())
        self.swag.update_wrapper(self.epoch)

    def deviations(self) -> Tensor:
        kept, prefix = self.swag.swag_stats, self.swag.prfx
        variances = [
            kept[f"{prefix}{name}_sq_mean"] - kept[f"{prefix}{name}_mean"] ** 2
            for name, _ in self.model.named_parameters()
        ]
        return vector(variances).clamp(min=self.swag.var_clamp).sqrt()

    def draws(self, count: int) -> Tensor:
        return torch.stack(
            [vector(self.swag.sample(self.swag.scale).parameters()) for _ in range(count)]
        )

    def drawn(self, batches: list[Tensor]) -> nn.Module:
        self.swag.bn_update(batches, device=None)
        return self.swag.samples[0]


class SwaGaussian(_FromWheel):
    name, distribution, place = "swa-gaussian", "swa_gaussian", 0

    def swag(self, model: nn.Module) -> Posterior:
        utils = from_wheel(self.folder, "swa_gaussian*", "swag/utils.py", "swag.utils")
        return _Authors(self.kind, utils, model)


class TorchUncertainty(_FromWheel):
    name, distribution, place = "torch-uncertainty", "torch_uncertainty", 1

    def swag(self, model: nn.Module) -> Posterior:
        return _OfMethods(self.kind, model)
