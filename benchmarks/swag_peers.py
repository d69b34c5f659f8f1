"""What other implementations of SWAG draw, beside polyak's and the covariance of the paper.

pip download --no-deps -d wheels swa-gaussian==0.1.9 torch-uncertainty==0.13.0
python benchmarks/swag_peers.py wheels        # one JSON line per fact, a few seconds

Only the modules with the two classes are loaded, from the wheels: neither package needs to be
installed. What swa-gaussian imports beside is not used by `collect_model` and `sample`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import types
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

import polyak

N_DRAWS = 4000


def from_wheel(folder: Path, wheel: str, file: str, name: str) -> types.ModuleType:
    """A module out of a wheel, without its package."""
    for parent in (name.rpartition(".")[0].partition(".")[0], name.rpartition(".")[0]):
        sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = []
    with zipfile.ZipFile(next(folder.glob(wheel))) as archive:
        source = archive.read(file).decode()
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def peers(folder: Path) -> tuple[type, type]:
    gpytorch = types.ModuleType("gpytorch")
    lazy, distributions = types.ModuleType("gpytorch.lazy"), types.ModuleType("distributions")
    lazy.RootLazyTensor = lazy.DiagLazyTensor = lazy.AddedDiagLazyTensor = None
    distributions.MultivariateNormal = None
    sys.modules |= {"gpytorch": gpytorch, "gpytorch.lazy": lazy}
    sys.modules |= {"gpytorch.distributions": distributions}
    utils = types.ModuleType("swag.utils")
    utils.flatten = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
    utils.unflatten_like = lambda vector, likes: [
        part.view(like.shape)
        for part, like in zip(vector[0].split([t.numel() for t in likes]), likes, strict=True)
    ]
    sys.modules["swag.utils"] = utils
    theirs = from_wheel(
        folder, "swa_gaussian*", "swag/posteriors/swag.py", "swag.posteriors.swag"
    ).SWAG
    at = "torch_uncertainty/methods"
    from_wheel(folder, "torch_uncertainty*", f"{at}/swa.py", "torch_uncertainty.methods.swa")
    other = from_wheel(
        folder, "torch_uncertainty*", f"{at}/swag.py", "torch_uncertainty.methods.swag"
    )
    return theirs, other.SWAG


class Run:
    """The same captures in all three: weights that move by `size` of themselves, mostly together."""

    def __init__(self, kinds: tuple[type, type], model: nn.Module, size: float, n: int) -> None:
        torch.manual_seed(0)
        self.model = model
        self.swag_gaussian = kinds[0](
            lambda: copy.deepcopy(model), no_cov_mat=False, max_num_models=20
        )
        self.torch_uncertainty = kinds[1](copy.deepcopy(model), 0, 1, num_estimators=0)
        self.swag = polyak.SWAG(model, rank=20)
        start = [p.detach().clone() for p in model.parameters()]
        together = [torch.randn_like(p) for p in start]
        captures = []
        for epoch in range(1, n + 1):
            factor = torch.randn(())
            with torch.no_grad():
                for p, s, t in zip(model.parameters(), start, together, strict=True):
                    p.copy_(s * (1 + size * (factor * t + 0.3 * torch.randn_like(p))))
            self.swag_gaussian.collect_model(model)
            self.torch_uncertainty.core_model.load_state_dict(model.state_dict())
            self.torch_uncertainty.update_wrapper(epoch)
            self.swag.update()
            captures.append(vector(model.parameters()))
        self.captures = torch.stack(captures)
        self.variance = self.captures.var(0, correction=0)

    def draws(self) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {
            "swa-gaussian": [],
            "torch-uncertainty": [],
            "polyak": [],
        }
        for _ in range(N_DRAWS):
            self.swag_gaussian.sample(0.5, cov=True)
            found["swa-gaussian"].append(
                vector(getattr(module, name) for module, name, _ in self.swag_gaussian.params)
            )
            found["torch-uncertainty"].append(
                vector(self.torch_uncertainty.sample(1.0).parameters())
            )
            with self.swag.sample():
                found["polyak"].append(vector(self.model.parameters()))
        return {name: torch.stack(several) for name, several in found.items()}

    def squared_deviations(self) -> float:
        first = [one["0.weight"].double().item() for one in self.swag.state_dict()["deviations"]]
        return sum(d * d for d in first)


def vector(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def two_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def say(fact: str, **figures: float) -> None:
    print(json.dumps({"fact": fact} | {k: round(v, 4) for k, v in figures.items()}))


def small_variances(kinds: tuple[type, type]) -> None:
    model = nn.Linear(200, 100, bias=False)
    nn.init.uniform_(model.weight, 0.5, 1.5)
    run = Run(kinds, model, 1e-4, 20)
    true = run.variance.sqrt()
    _, theirs = run.swag_gaussian.export_numpy_params()
    stats, prefix = run.torch_uncertainty.swag_stats, run.torch_uncertainty.prfx
    other = vector([stats[f"{prefix}weight_sq_mean"] - stats[f"{prefix}weight_mean"] ** 2])
    own = vector([run.swag.state_dict()["variance"]["weight"]])
    found = {
        "swa-gaussian": (torch.as_tensor(theirs).double(), run.swag_gaussian.var_clamp),
        "torch-uncertainty": (other, run.torch_uncertainty.var_clamp),
        "polyak": (own, 0.0),
    }
    say("variances below 0", **{n: float((v < 0).double().mean()) for n, (v, _) in found.items()})
    ratios = {n: v.clamp(min=c).sqrt() / true for n, (v, c) in found.items()}
    say("std of a draw / true, median", **{n: float(r.median()) for n, r in ratios.items()})
    say("its largest error", **{n: float((r - 1).abs().max()) for n, r in ratios.items()})


def draws(kinds: tuple[type, type]) -> None:
    run = Run(kinds, two_weights(), 0.1, 20)
    drawn = run.draws()
    paper = run.variance[0].item() / 2 + run.squared_deviations() / (2 * 19)
    correlation = {n: float(torch.corrcoef(x.T)[0, 1]) for n, x in drawn.items()}
    say("correlation of two tensors", **correlation)
    say("variance / the paper's", **{n: float(x[:, 0].var()) / paper for n, x in drawn.items()})
    run = Run(kinds, two_weights(), 0.1, 5)
    scale = {"swa-gaussian": 0.5, "torch-uncertainty": 1.0, "polyak": 0.5}
    divisors = {
        n: run.squared_deviations() / (float(x[:, 0].var()) / scale[n] - run.variance[0].item())
        for n, x in run.draws().items()
    }
    say("5 captures of rank 20: divided by", **divisors)


def constant_weights(kinds: tuple[type, type]) -> None:
    model = nn.Linear(50, 50, bias=False)
    run = Run(kinds, model, 0.0, 5)
    run.swag_gaussian.sample(0.5, cov=True)
    noise = {
        "swa-gaussian": run.swag_gaussian.base.weight - model.weight,
        "torch-uncertainty": run.torch_uncertainty.sample(1.0).weight - model.weight,
    }
    with run.swag.sample():
        own = model.weight.detach().clone()
    noise["polyak"] = own - model.weight
    say("noise on weights that never moved", **{n: float(x.std()) for n, x in noise.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path)
    kinds = peers(parser.parse_args().wheels)
    warnings.simplefilter("ignore")  # 5 captures of rank 20 are meant
    small_variances(kinds)
    draws(kinds)
    constant_weights(kinds)
