"""The Lightning adapter in unusual trainers, several processes, and where it cannot work."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from polyak.errors import ArgumentError, UsageError

pytest.importorskip("lightning")
import logging

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner

from polyak.integrations.lightning import WeightAveraging

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PolyakWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(LightningModule):
    def __init__(self, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.lr = lr

    def training_step(self, batch, index):
        return (self.net(batch[0]) - 1).square().mean()

    def validation_step(self, batch, index):
        self.log("loss", self.net(batch[0]).mean(), on_step=True, on_epoch=True)

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Late(Module):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = Module().net


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x,) for x in inputs()])


def inputs():
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(3))


def data():
    return DataLoader(TensorDataset(inputs()), batch_size=4)


def statistics_of(module, batch):
    return module.net(batch[0])


def trainer(callback, *others, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in others),
    }
    if options.get("barebones"):
        defaults = {"max_epochs": 2, "accelerator": "cpu"}
    return Trainer(callbacks=[callback, *others], **{**defaults, **options})


def averaging(profile="swa", **options):
    return WeightAveraging(profile, update_bn=2, forward=statistics_of, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"inference_mode": False},
        {"check_val_every_n_epoch": 2},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
        {"limit_val_batches": 0},
    ],
    ids=str,
)
def test_unusual_trainers_average_every_step(options):
    module, callback = Module(), averaging({"a": "swa", "b": "ema:decay=0.5"})
    of = trainer(callback, **options)
    of.fit(module, data(), data())
    main = callback.average["a"]
    assert main.count == of.global_step > 0
    held = main.averaged_tensors()
    assert all(torch.equal(held[n], t) for n, t in module.state_dict().items())
    assert [type(c) for c in of.callbacks if "Clos" in type(c).__name__] == []


@pytest.mark.parametrize("kind", ["compiled", "late", "stream", "no validation"])
def test_unusual_modules_and_data(kind):
    module = Late() if kind == "late" else Module()
    if kind == "compiled":
        module.net = torch.compile(module.net, backend="eager")
    loader = DataLoader(Stream(), batch_size=4) if kind == "stream" else data()
    callback = averaging()
    of = trainer(callback)
    of.fit(module, loader, None if kind == "no validation" else data())
    assert callback.average.count == of.global_step == 8
    raw = callback.raw_weights()
    assert raw.keys() == module.state_dict().keys()
    assert not all(torch.equal(raw[n], t) for n, t in module.state_dict().items())
    (first, *_) = of.predict(module, data())
    module.eval()
    assert torch.equal(first, module.net(inputs()[:4]))


def test_beside_other_callbacks_and_in_the_middle_of_an_epoch(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callback = averaging()
    logger = CSVLogger(tmp_path)
    of = trainer(callback, LearningRateMonitor(), Timer(), saver, logger=logger)
    of.fit(Module(), data(), data())
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["averaging_state"]["n_averaged"] == 3
    assert saved["polyak"]["averages"]["average"]["count"] == 3
    raw, averaged = saved["current_model_state"], saved["state_dict"]
    assert not torch.equal(raw["net.0.weight"], averaged["net.0.weight"])
    # The average is in the file once: as the weights, and as the state to go on from.
    kept = saved["polyak"]["averages"]["average"]["tensors"]["net.0.weight"]
    assert kept.data_ptr() == averaged["net.0.weight"].data_ptr()


def test_the_tuner_leaves_no_trace():
    module, callback = Module(), averaging()
    of = trainer(callback)
    Tuner(of).lr_find(module, data(), num_training=5, update_attr=False)
    assert "on_save_checkpoint" not in vars(module)
    of.fit(module, data(), data())
    assert callback.average.count == 8


def test_a_finished_run_that_is_resumed_leaves_the_average_too(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="a")
    first = averaging()
    module = Module()
    trainer(first, saver).fit(module, data(), data())
    again = Module()
    trainer(averaging()).fit(again, data(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again.net[0].weight, module.net[0].weight)


def test_module_and_callback_can_be_copied_during_a_fit():
    copies = []

    class Copies(Callback):
        def on_validation_end(self, trainer, module):
            copies.append(copy.deepcopy(module))
            copies.append(pickle.loads(pickle.dumps(averaging())))

    callback = averaging()
    trainer(callback, Copies()).fit(Module(), data(), data())
    copied = copies[-2]
    copied.on_save_checkpoint({})  # its own
    assert copied.on_save_checkpoint.__self__ is copied
    copy.deepcopy(callback)


def test_update_bn_needs_a_way_to_run_the_module():
    with pytest.raises(ArgumentError, match=r"has no forward\(\)"):
        trainer(WeightAveraging("swa", update_bn=2)).fit(Module(), data())


def test_strategies_that_split_the_weights_are_refused():
    callback = averaging()
    of = SimpleNamespace(
        callbacks=[callback], strategy=FSDPStrategy()
    )  # a Trainer wants GPUs for it
    with pytest.raises(UsageError, match="FSDPStrategy"):
        callback.setup(of, Module(), "fit")


RANKS = """
    import sys, logging, warnings
    import torch
    sys.path.insert(0, {folder!r})
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from test_lightning_runs import Module, Callback, averaging, data, trainer

    class Compares(Callback):
        def on_train_end(self, trainer, module):
            mine = torch.cat([t.flatten().float() for t in module.state_dict().values()])
            theirs = trainer.strategy.all_gather(mine)
            assert torch.equal(theirs[0], theirs[1]), theirs
            average = [c for c in trainer.callbacks if hasattr(c, "average")][0].average
            assert average.count == trainer.global_step == 4

    if __name__ == "__main__":
        callback, module = averaging(), Module()
        before = module.net[0].weight.clone()
        of = trainer(callback, Compares(), strategy={strategy!r}, devices=2, use_distributed_sampler=True)
        of.fit(module, data(), data())
        assert not torch.equal(module.net[0].weight, before)
        print("ranks agree")
"""


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)]
)
def test_ranks_keep_one_average(strategy, tmp_path):
    folder = __file__.rpartition("/")[0]
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS.format(folder=folder, strategy=strategy)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks agree" in done.stdout


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("sys.modules['lightning'] = None", "pip install 'polyak[lightning]'"),
        (
            "import lightning; lightning.__version__ = '2.5.6'",
            "needs lightning 2.6 or newer; found 2.5.6",
        ),
    ],
)
def test_without_the_framework_one_sentence_says_so(made, said):
    code = f"import sys; {made}; import polyak.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said in done.stderr.splitlines()[-1]
    assert "MissingExtra" in done.stderr.splitlines()[-1]
