"""The Lightning adapter in a real Trainer: what is averaged, validated, saved and left in the module."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak.errors import ArgumentError, EmptyAverage, MismatchError, PolyakWarning, UsageError

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from polyak.integrations.lightning import WeightAveraging

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PolyakWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(LightningModule):
    """Notes each epoch's weights where averages are expected to be seen, and fails on request."""

    def __init__(self, *, norm=False):
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(4)] if norm else []
        self.net = nn.Sequential(nn.Linear(3, 4), *norms, nn.Tanh(), nn.Linear(4, 1))
        self.steps = []
        self.seen = {}
        self.fails_at = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, index):
        if self.fails_at == "validation" and not self.trainer.sanity_checking:
            raise KeyError("a failing validation")
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    test_step = validation_step

    def on_validation_epoch_end(self):
        self.note("epoch_end")

    def on_validation_end(self):
        self.note("end")

    def note(self, where):
        self.seen[where] = weights(self)

    def on_train_batch_end(self, *_):
        self.steps.append(weights(self))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05)


def weights(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def data(size=8, shuffle=False):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(32, n, generator=generator) for n in (3, 1))
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


def trainer(*callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fitted(callback, *others, module=None, ckpt_path=None, **options):
    module = module or Net()
    of = trainer(callback, *others, **options)
    of.fit(module, data(), data(), ckpt_path=ckpt_path)
    return of, module


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def mean(states):
    return {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}


def close(one, other):
    return all(torch.allclose(one[n], other[n], atol=1e-6) for n in other)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_real_steps_are_averaged_and_validation_sees_the_average(every):
    callback = WeightAveraging("swa", every=2 if every == 2 else 1)
    of, module = fitted(callback, accumulate_grad_batches=1 if every == 2 else every)
    if every == 3:  # 4 batches: 3 and 1
        assert callback.average.count == of.global_step == 4
        return
    taken = module.steps[1::2] if every == 2 else module.steps
    assert callback.average.count == len(taken)
    assert close(module.seen["epoch_end"], mean(taken))
    assert close(weights(module), mean(taken))
    assert same(module.seen["end"], module.seen["epoch_end"])
    assert same(callback.raw_weights(), module.steps[-1])


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"limit_train_batches": 3}])
def test_an_epoch_is_averaged_before_its_validation(options):
    callback = WeightAveraging("swa", per_epoch=True)
    _, module = fitted(callback, **options)
    n = len(module.steps) // 2
    assert callback.average.count == 2
    assert callback.average.unit == "epochs"
    assert close(module.seen["epoch_end"], mean([module.steps[n - 1], module.steps[-1]]))


def test_an_epoch_that_max_steps_cuts_short_is_left_out():
    callback = WeightAveraging("swa", per_epoch=True)
    fitted(callback, max_steps=6, max_epochs=-1)
    assert callback.average.count == 1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"start": 5}, 3),
        ({"start_epoch": 1}, 4),
        ({"start": 1, "per_epoch": True}, 1),
        ({"every": 2, "per_epoch": True}, 1),
    ],
)
def test_averaging_may_start_late(options, count):
    callback = WeightAveraging("swa", **options)
    _, module = fitted(callback)
    assert callback.average.count == count
    kept = module.steps[7:] if options.get("per_epoch") else module.steps[8 - count :]
    assert close(weights(module), mean(kept))


def test_an_average_that_never_started_never_touches_the_model():
    # Lightning's own puts the initial weights into validation, checkpoints and the trained module.
    plain = Net()
    trainer().fit(plain, data(), data())
    callback = WeightAveraging("swa", start=100)
    with pytest.warns(EmptyAverage):
        _, module = fitted(callback)
    assert same(weights(module), weights(plain))
    assert same(module.seen["epoch_end"], plain.seen["epoch_end"])
    assert same(callback.raw_weights(), weights(plain))


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_an_exception_gives_the_weights_back(error):
    # Lightning's own leaves the average in the module, and the weights that trained are lost.
    module = Net()
    callback = WeightAveraging("swa")
    if error is KeyError:
        module.fails_at = "validation"
    else:
        module.on_validation_epoch_end = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(error):
        fitted(callback, module=module, num_sanity_val_steps=0)
    assert same(weights(module), module.steps[-1])
    assert same(callback.raw_weights(), module.steps[-1])
    assert callback.average.count == 4
    assert "on_save_checkpoint" not in vars(module)
    callback.average.attach(module.configure_optimizers()).remove()  # no other hook is left


def test_fit_twice_is_fit_once():
    # Lightning's own begins anew, from the averaged weights.
    once, twice = WeightAveraging("ema:decay=0.9"), WeightAveraging("ema:decay=0.9")
    _, whole = fitted(once, max_epochs=4)
    _, parts = fitted(twice)
    fitted(twice, module=parts)
    assert twice.average.count == once.average.count == 16
    assert same(weights(parts), weights(whole))
    assert same(twice.raw_weights(), once.raw_weights())


def test_a_module_with_other_weights_begins_anew():
    callback = WeightAveraging("swa")
    _, module = fitted(callback)
    module.load_state_dict(Net().state_dict())
    with pytest.warns(PolyakWarning, match="no longer holds"):
        fitted(callback, module=module)
    assert callback.average.count == 8
    _, other = fitted(callback)
    assert callback.average.model is other


def test_a_checkpoint_holds_both_and_resumes_to_the_bit(tmp_path):
    for profile in ("swa", "ema:decay=0.9", "window:length=5"):
        folder = tmp_path / profile.partition(":")[0]
        saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_last=True)
        whole = WeightAveraging(profile, every=3)
        _, module = fitted(whole, saver, max_epochs=4)
        resumed = WeightAveraging(profile, every=3)
        _, again = fitted(resumed, module=Net(), max_epochs=4, ckpt_path=folder / "epoch=1.ckpt")
        assert same(weights(again), weights(module))
        assert same(resumed.raw_weights(), whole.raw_weights())
        last = torch.load(folder / "last.ckpt", weights_only=True)
        assert same(last["state_dict"], weights(module))
        assert same(last["current_model_state"], whole.raw_weights())


@pytest.mark.parametrize("only_weights", [False, True])
def test_the_monitored_score_is_that_of_the_file(tmp_path, only_weights):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_weights_only=only_weights)
    callback = WeightAveraging("swa")
    of, module = fitted(callback, best, max_epochs=3)
    fresh = trainer()
    for run in (of, fresh):
        found = run.test(Net(), data(), ckpt_path=best.best_model_path, verbose=False)
        assert found[0]["val_loss"] == best.best_model_score.item()
    found = of.validate(module, data(), ckpt_path="best", verbose=False)
    assert found[0]["val_loss"] == best.best_model_score.item()
    saved = torch.load(best.best_model_path, weights_only=True)
    assert ("current_model_state" in saved) is not only_weights
    assert ("polyak" in saved) is not only_weights


def test_lightnings_own_reads_our_checkpoints_and_we_read_its(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, callback in (
        (ours, WeightAveraging("ema:decay=0.9,keep_initial=true")),
        (theirs, EMAWeightAveraging(decay=0.9)),
    ):
        saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        fitted(callback, saver, num_sanity_val_steps=0)
    other = EMAWeightAveraging(decay=0.9)
    fitted(other, max_epochs=3, ckpt_path=ours / "epoch=1.ckpt")
    assert other._average_model.n_averaged == 12
    callback = WeightAveraging("ema:decay=0.9")
    fitted(callback, max_epochs=3, ckpt_path=theirs / "epoch=1.ckpt")
    assert callback.average.count == 12


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)
        elif epoch > 1:  # what resumes later: Lightning leaves the layers frozen
            self.make_trainable(module.net[0])


@pytest.mark.parametrize("thaw_first", [True, False])
@pytest.mark.parametrize("per_epoch", [True, False])
def test_a_run_resumes_after_layers_were_thawed(tmp_path, thaw_first, per_epoch):
    def run(**options):
        callback = WeightAveraging("swa", per_epoch=per_epoch)
        order = [Thaw(), callback] if thaw_first else [callback, Thaw()]
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        module = Net()
        trainer(*order, saver, max_epochs=4).fit(module, data(), data(), **options)
        return callback, module

    whole, module = run()
    resumed, again = run(ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.average.count == whole.average.count
    assert same(weights(again), weights(module))
    assert same(resumed.raw_weights(), whole.raw_weights())


def test_several_averages_are_validated_and_logged_by_name(tmp_path):
    callback = WeightAveraging({"swa": "swa", "short": "ema:decay=0.5"})
    stop = EarlyStopping("val/short/val_loss", patience=10)
    best = ModelCheckpoint(tmp_path, monitor="val/short/val_loss")
    of, module = fitted(stop, callback, best)
    logged = {name: value.item() for name, value in of.callback_metrics.items()}
    assert logged.keys() == {"val_loss", "val/short/val_loss"}
    assert isinstance(callback.average, polyak.Averages)
    with callback.average["short"].applied():
        (found,) = of.validate(module, data(), verbose=False)
    assert found["val_loss"] == pytest.approx(logged["val/short/val_loss"])
    (found,) = of.validate(module, data(), verbose=False)
    assert found["val_loss"] == pytest.approx(logged["val_loss"])
    assert close(weights(module), mean(module.steps))


@pytest.mark.parametrize("source", [4, data(), list(data()), tuple(data())])
def test_statistics_are_measured_on_the_average_and_training_does_not_notice(source):
    def run(**options):
        torch.manual_seed(5)
        module, callback = Net(norm=True), WeightAveraging("swa", **options)
        of = trainer(callback, val_check_interval=0.5)
        of.fit(module, data(shuffle=True), data())
        return callback, module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _ = run()
    callback, module = run(update_bn=source)
    assert same(callback.raw_weights(), plain.raw_weights())
    expected = copy.deepcopy(module)
    polyak.update_bn(expected, data())
    assert close(weights(module), weights(expected))


class Looks(Callback):
    """Looks at the weights in the hooks that run outside Lightning's own loan."""

    def on_validation_start(self, trainer, module):
        self.at_start = weights(module)

    def on_validation_end(self, trainer, module):
        self.at_end = weights(module)


@pytest.mark.parametrize("first", [True, False])
def test_no_order_of_callbacks_evaluates_raw_weights(first):
    looks, callback = Looks(), WeightAveraging("swa")
    order = [looks, callback] if first else [callback, looks]
    of = trainer(*order)
    module = Net()
    of.fit(module, data(), data())
    assert same(looks.at_start, module.seen["epoch_end"])
    assert same(looks.at_end, module.seen["epoch_end"])
    assert set(of.callbacks) == {looks, callback}


class Gan(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]


def test_of_several_optimizers_one_is_chosen():
    with pytest.raises(ArgumentError, match="2 optimizers"):
        fitted(WeightAveraging("swa"), module=Gan())
    with pytest.raises(ArgumentError, match="expected an index"):
        fitted(WeightAveraging("swa", optimizer=2), module=Gan())
    for chosen, include in ((0, "net.0.*"), ([0, 1], None)):
        callback = WeightAveraging("swa", optimizer=chosen, include=include)
        fitted(callback, module=Gan())
        assert callback.average.count == 8


@pytest.mark.parametrize(
    "other", [WeightAveraging("swa"), EMAWeightAveraging(), StochasticWeightAveraging(1e-2)]
)
def test_a_second_averaging_callback_is_refused(other):
    with pytest.raises(UsageError, match="another callback"):
        fitted(WeightAveraging("swa"), other)


@pytest.mark.parametrize("others", ["ema:decay=0.9", {"a": "swa", "b": "ema:decay=0.9"}])
def test_the_average_of_another_profile_is_refused(tmp_path, others):
    of, _ = fitted(WeightAveraging("swa"))
    of.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MismatchError):
        fitted(WeightAveraging(others), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_without_an_average_begins_one(tmp_path):
    of = trainer()
    of.fit(Net(), data())
    of.save_checkpoint(tmp_path / "a.ckpt")
    callback = WeightAveraging("swa")
    with pytest.warns(PolyakWarning, match="holds no average"):
        fitted(callback, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert callback.average.count == 4


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"start": -1},
        {"update_bn": True},
        {"start": 1, "start_epoch": 1},
        {"dtype": 3},
    ],
)
def test_options_out_of_their_domain_are_refused_at_once(options):
    with pytest.raises(ArgumentError):
        WeightAveraging("swa", **options)


def test_before_fit_there_is_no_average():
    callback = WeightAveraging("swa")
    trainer(callback).validate(Net(), data(), verbose=False)
    with pytest.raises(UsageError, match="no average yet"):
        _ = callback.average
    with pytest.raises(UsageError, match="no raw weights yet"):
        callback.raw_weights()


class Adapters(Net):
    """Saves what it likes, from its live weights."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {n: p for n, p in self.state_dict().items() if "net.2" in n}


def test_what_the_module_saves_itself_is_the_average(tmp_path):
    _, module = fitted(
        WeightAveraging("swa"), ModelCheckpoint(tmp_path, filename="a"), module=Adapters()
    )
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"net.2.weight", "net.2.bias"}
    assert torch.equal(saved["state_dict"]["net.2.weight"], module.net[2].weight)


@pytest.mark.parametrize("ours", [True, False])
def test_what_goes_wrong_with_lightnings_own_does_not_here(ours, tmp_path):
    def make(late=None):
        if ours:
            return WeightAveraging("ema:decay=0.9", start=late)
        return EMAWeightAveraging(decay=0.9, update_starting_at_step=late)

    callback = make()
    saver = ModelCheckpoint(tmp_path, filename="a", save_weights_only=True)
    _, module = fitted(callback, saver)
    left = weights(module)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    right = {
        "the module's epoch end is on the average": same(module.seen["epoch_end"], left),
        "a file of weights alone holds the average": same(saved, left),
        "the raw weights are kept": ours and same(callback.raw_weights(), module.steps[-1]),
    }
    trainer(callback).fit(module, data(), data())
    count = callback.average.count if ours else int(callback._average_model.n_averaged)
    right["a second fit goes on"] = count == 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyAverage)
        _, module = fitted(make(late=100))
    right["a late start leaves what trained"] = same(weights(module), module.steps[-1])
    assert set(right.values()) == {ours}, right
