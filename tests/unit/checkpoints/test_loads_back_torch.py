"""Torch files that a merge writes are loaded by torch, by Lightning, and in the order of the newest."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from polyak.batchnorm import update_bn_file
from polyak.checkpoints import average_checkpoints, open_checkpoint, select_checkpoints
from polyak.errors import PolyakWarning

pytestmark = pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")


class Tied(nn.Module):
    """Names in no alphabetical order, of several dtypes, and a tie between the first and the last."""

    def __init__(self):
        super().__init__()
        self.zeta = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 4).to(torch.bfloat16)
        self.alpha = nn.Linear(4, 5, bias=False)
        self.alpha.weight = self.zeta.weight


class Versioned(nn.Linear):
    """A layer whose layout has changed: it loads the old one by another name."""

    _version = 7

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata.get("version") == 7
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def saved(tmp_path, model, wrap=lambda state: state, suffix="pt", **options):
    """Three files of a model that is moved in between: their paths and state dicts."""
    paths, states = [], []
    for step in (100, 200, 300):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        states.append(copy.deepcopy(dict(model.state_dict())))
        paths.append(tmp_path / f"step-{step}.{suffix}")
        torch.save(wrap(model.state_dict()), paths[-1], **options)
    return paths, states


def means(states):
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0)
        if newest.is_floating_point() and "running" not in name
        else newest
        for name, newest in states[-1].items()
    }


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (Tied, lambda state: state),
        (Tied, lambda state: {"epoch": 3, "model": state}),  # fairseq, timm, most loops
        (lambda: nn.Sequential(nn.Linear(2, 3), Versioned(3, 1)), lambda state: state),
        (
            lambda: nn.ModuleDict({"module": Tied()}),
            lambda state: {"state_dict": state},
        ),  # as of DDP
    ],
    ids=["tied", "nested", "versioned", "ddp"],
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_state_dict_keeps_order_versions_and_ties(tmp_path, make, wrap, as_zip):
    torch.manual_seed(0)
    model = make()
    paths, states = saved(tmp_path, model, wrap, _use_new_zipfile_serialization=as_zip)
    average_checkpoints(paths, tmp_path / "averaged.pt")
    written = torch.load(tmp_path / "averaged.pt")
    assert [*written] == [*model.state_dict()]
    versions = {k: v for k, v in written._metadata.items() if k != "polyak"}
    assert versions == dict(model.state_dict()._metadata)
    fresh = make()
    assert fresh.load_state_dict(written)
    for name, tensor in means(states).items():
        torch.testing.assert_close(written[name].double(), tensor.double(), atol=0.02, rtol=0.01)
    with open_checkpoint(tmp_path / "averaged.pt") as opened, open_checkpoint(paths[0]) as first:
        assert opened.order == first.order
        assert opened.ties == first.ties
        assert {"", "polyak"} & opened.versions.keys() == {""}
    tied = [name for name in written if name.endswith(("zeta.weight", "alpha.weight"))]
    assert len({written[name].data_ptr() for name in tied}) == bool(tied)


def test_the_order_is_the_newest_files(tmp_path):
    torch.save(
        {"b": torch.ones(2), "a": torch.ones(3), "n": torch.tensor(1)}, tmp_path / "step-1.pt"
    )
    torch.save(
        {"a": torch.ones(3), "n": torch.tensor(2), "b": torch.ones(2)}, tmp_path / "step-2.pt"
    )
    average_checkpoints(tmp_path.glob("step-*"), tmp_path / "averaged.pt")
    assert [*torch.load(tmp_path / "averaged.pt")] == ["a", "n", "b"]


class Counting(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self):
        return {"names": {"b", "a"}, "scale": torch.full((2,), 3.0)}

    def set_extra_state(self, state):
        self.found = state


@pytest.mark.parametrize("as_zip", [True, False])
def test_entries_of_lightning_stay_beside_extra_state(tmp_path, as_zip):
    def wrap(state):
        return {
            "pytorch-lightning_version": "2.6.1",
            "state_dict": state,
            "hyper_parameters": {"kinds": {"y", "x"}, "table": torch.arange(3)},
            "callbacks": {"x": 1},
        }

    model = nn.Sequential(Counting(2, 2), nn.Linear(2, 1))
    paths, _ = saved(tmp_path, model, wrap, "ckpt", _use_new_zipfile_serialization=as_zip)
    average_checkpoints(paths, tmp_path / "averaged.ckpt")
    written = torch.load(tmp_path / "averaged.ckpt", weights_only=False)
    assert [*written] == ["pytorch-lightning_version", "state_dict", "hyper_parameters"]
    assert written["hyper_parameters"]["kinds"] == {"x", "y"}
    assert written["hyper_parameters"]["table"].tolist() == [0, 1, 2]
    model.load_state_dict(written["state_dict"])
    assert model[0].found["names"] == {"a", "b"}
    assert model[0].found["scale"].tolist() == [3, 3]


def test_a_file_that_lightning_did_not_write_stays_a_state_dict(tmp_path):
    paths, _ = saved(tmp_path, Tied(), lambda s: {"state_dict": s, "epoch": 2}, suffix="ckpt")
    average_checkpoints(paths, tmp_path / "averaged.ckpt")
    assert [*torch.load(tmp_path / "averaged.ckpt")] == [*Tied().state_dict()]


LIGHTNING = {
    "epoch": 2, "global_step": 12, "pytorch-lightning_version": "2.6.6", "state_dict": None,
    "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"X": {"best": torch.tensor(1.0)}},
    "optimizer_states": [{"state": {0: torch.ones(4)}}], "lr_schedulers": [],
    "hparams_name": "kwargs", "mine": {"words": ["a", "b"], "size": (1, 2.5), "on": True},
}  # fmt: skip


def lightning_file(state, more):
    return {**LIGHTNING, "state_dict": state, **more}


def test_what_only_code_could_rebuild_is_left_out_and_named_once(tmp_path):
    parameters = {
        "width": 4, "tags": {"x", "y"}, "fixed": frozenset("z"), "class_weights": torch.tensor([[1.0, 2.5]]),
        "layers": [1, [2, {"deep": None}]], "where": Path("data"), "kind": nn.ReLU,
        "several": [1, Path("data")],
    }  # fmt: skip
    more = {"hyper_parameters": parameters, "ema": {"w": torch.ones(2)}, 3: "not text"}
    paths, _ = saved(tmp_path, Tied(), lambda state: lightning_file(state, more), suffix="ckpt")
    with pytest.warns(PolyakWarning, match="leaves out what only the code") as caught:
        average_checkpoints(paths, tmp_path / "averaged.ckpt")
    said = [str(one.message) for one in caught if "leaves out" in str(one.message)]
    assert len(said) == 1
    for name in ("where", "kind", "several.1", "ema.w (a tensor)"):
        assert name in said[0], name
    written = torch.load(tmp_path / "averaged.ckpt")  # weights only, as torch has it by default
    assert [*written] == [
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "hparams_name", "mine",
        "hyper_parameters", "ema",
    ]  # fmt: skip
    assert written["mine"] == LIGHTNING["mine"]
    kept = written["hyper_parameters"]
    assert torch.equal(kept.pop("class_weights"), parameters["class_weights"])
    assert kept == {
        "width": 4, "tags": {"x", "y"}, "fixed": {"z"}, "layers": [1, [2, {"deep": None}]],
    }  # fmt: skip
    assert [*written["state_dict"]] == [*Tied().state_dict()]
    with pytest.warns(PolyakWarning):
        average_checkpoints(paths, tmp_path / "averaged.ckpt", resume=True)  # done already
    average_checkpoints(paths, tmp_path / "bare.pt")
    assert [*torch.load(tmp_path / "bare.pt")] == [*Tied().state_dict()]
    assert [one.step for one in select_checkpoints([tmp_path / "averaged.ckpt"])] == [12]


def test_a_set_is_written_in_the_order_that_it_was_read_in(tmp_path):
    more = {"hyper_parameters": {"words": {f"word {i}" for i in range(20)}}}
    paths, _ = saved(tmp_path, nn.Linear(2, 2), lambda s: lightning_file(s, more), suffix="ckpt")
    code = "import sys, polyak; polyak.average_checkpoints(sys.argv[2:], sys.argv[1])"
    for name in ("one", "two"):  # sets of strings have another order in every process
        subprocess.run(
            [sys.executable, "-c", code, f"{tmp_path}/{name}.ckpt", *map(str, paths)], check=True
        )
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "two.ckpt").read_bytes()


def test_values_that_refer_to_each_other_are_copied_in_bounded_work(tmp_path):
    shared = ["x"]
    for _ in range(30):  # 2**30 values if each reference were followed
        shared = [shared, shared]
    endless = {}
    endless["itself"] = endless
    more = {"hyper_parameters": {"shared": shared, "endless": endless, "width": 3}}
    paths, _ = saved(tmp_path, nn.Linear(2, 2), lambda s: lightning_file(s, more), suffix="ckpt")
    with pytest.warns(PolyakWarning, match="more values than a configuration has"):
        average_checkpoints(paths, tmp_path / "averaged.ckpt")
    assert torch.load(tmp_path / "averaged.ckpt")["state_dict"]


def lightning_module():
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self, width, activation="relu", class_weights=None, options=None):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
            )
            self.scale = class_weights

        def loss(self, batch):
            return ((self.net(batch[0]) - batch[1]).square() * self.scale).mean()

        def training_step(self, batch, _):
            return self.loss(batch)

        def test_step(self, batch, _):
            self.log("test_loss", self.loss(batch))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["vocabulary"] = {"a": 1}

        def on_load_checkpoint(self, checkpoint):
            self.vocabulary = checkpoint["vocabulary"]

    return lightning, Model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights_only", [False, True])
def test_lightning_loads_and_tests_an_average_of_its_files(tmp_path, weights_only):
    lightning, kind = lightning_module()
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.randn(32, 2))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    keeper = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}-{step}", save_top_k=-1, save_weights_only=weights_only
    )
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[keeper], default_root_dir=tmp_path, **quiet
    )
    settings = {"class_weights": torch.tensor([1.0, 3.0]), "options": {"depth": [1, 2]}}
    trainer.fit(kind(5, **settings), loader)
    paths = sorted(tmp_path.glob("*.ckpt"))
    average_checkpoints(paths, tmp_path / "averaged.ckpt")
    weights = means([torch.load(path, weights_only=False)["state_dict"] for path in paths])
    loaded = kind.load_from_checkpoint(tmp_path / "averaged.ckpt")
    assert loaded.hparams.width == 5
    assert loaded.hparams.options == {"depth": [1, 2]}
    assert loaded.vocabulary == {"a": 1}
    assert [*loaded.state_dict()] == [*weights]
    expected = kind(5, **settings)
    expected.load_state_dict(weights)
    x = torch.randn(4, 3)
    torch.testing.assert_close(loaded.eval().net(x), expected.eval().net(x), atol=1e-6, rtol=1e-5)
    evaluator = lightning.Trainer(enable_checkpointing=False, **quiet)
    wanted = evaluator.test(expected, loader, verbose=False)[0]["test_loss"]
    tested = evaluator.test(
        kind(5, **settings), loader, ckpt_path=tmp_path / "averaged.ckpt", verbose=False
    )
    assert tested[0]["test_loss"] == pytest.approx(wanted, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PolyakWarning)
        refreshed = expected
        refreshed.forward = refreshed.net.forward
        update_bn_file(tmp_path / "averaged.ckpt", refreshed, [batch[0] for batch in loader])
    again = kind.load_from_checkpoint(tmp_path / "averaged.ckpt")
    assert again.hparams.options == {"depth": [1, 2]}
    assert not torch.equal(again.net[1].running_mean, loaded.net[1].running_mean)
