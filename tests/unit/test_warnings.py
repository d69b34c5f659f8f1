"""Every warning of polyak names the line of the user's program that caused it, however deep it arose."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import io
import itertools
import pickle
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference.in_background import background
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import polyak
import polyak.swa_utils
from polyak.averaging import record_folder
from polyak.averaging import recorder as recorder_module
from polyak.checkpoints import select_checkpoints
from polyak.errors import EmptyAverage, PolyakWarning, StaleStatistics
from polyak.integrations.transformers import attach
from polyak.study.metrics import nll
from polyak.tensors import fused

SOURCE = Path(polyak.__file__).parent
CAUSE = "# the line that is to be named"
CASES = []


def case(category):
    """A small program that causes warnings, all of them in the line that says so."""
    return lambda program: CASES.append((program, category)) or program


class OwnNorm(nn.Module):
    """Running statistics that no pass over data can measure."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return (x - self.running_mean) * self.weight


def network(norm=None):
    return nn.Sequential(nn.Linear(3, 3), norm or nn.BatchNorm1d(3))


def updated(norm=None):
    average = polyak.Average(network(norm), polyak.SWA())
    average.update()
    return average


def first_only(model, x):
    return model[0](x)


def attached():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    polyak.Average(model, polyak.SWA()).attach(optimizer)
    return optimizer


def checkpoints(folder):
    paths = [folder / f"step-{step}.pt" for step in (1, 2)]
    for path in paths:
        torch.save(network().state_dict(), path)
    return paths


def recorder(folder, **options):
    made = polyak.Recorder(network(), folder / "record", interval=2, **options)
    made.update()
    return made


@case(PolyakWarning)
def draws_of_fewer_captures_than_the_rank(folder):
    swag = polyak.SWAG(nn.Linear(3, 3), rank=20)
    swag.update()
    swag.update()
    with swag.sample():  # the line that is to be named
        pass


@case(StaleStatistics)
def draws_with_the_statistics_of_other_weights(folder):
    swag = polyak.SWAG(network(), rank=0)
    swag.update()
    swag.update()
    with swag.sample():  # the line that is to be named
        pass


@case(PolyakWarning)
def clipping_what_an_average_on_the_host_may_be_reading(folder):
    with background():
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        polyak.Average(model, polyak.SWA(), device="cpu").attach(optimizer)
        optimizer.step()
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)
        optimizer.step()  # the line that is to be named


@case(PolyakWarning)
def recording_more_than_fits(folder):
    made = polyak.Recorder(network(), folder / "record", total=1e18, intervals=10**15, keep=10**14)
    made.update(1e9)  # the line that is to be named


@case(PolyakWarning)
def recording_without_extra_state(folder):
    model = network()
    model.append(WithState(3, 3))
    made = polyak.Recorder(model, folder / "record", interval=2)
    made.update()  # the line that is to be named


@case(PolyakWarning)
def recording_to_a_folder_that_is_gone(folder):
    made = recorder(folder)
    shutil.rmtree(folder / "record")
    made.update()
    made.update()  # the line that is to be named


@case(PolyakWarning)
def recording_what_is_not_finite(folder):
    made = recorder(folder)
    nn.init.constant_(made.model[0].weight, float("nan"))
    made.update()
    made.update()  # the line that is to be named


@case(PolyakWarning)
def recording_to_a_slow_disk(folder):
    made = recorder(folder)
    before, recorder_module.SLOW_SECONDS = recorder_module.SLOW_SECONDS, -1.0
    try:
        made.update()
        made.update()  # the line that is to be named
    finally:
        recorder_module.SLOW_SECONDS = before


@case(PolyakWarning)
def recording_neighbours_that_cannot_be_merged(folder):
    made = recorder(folder, keep=2)
    made.update()
    made.update()
    before, record_folder.RecordFolder.merge = record_folder.RecordFolder.merge, broken_merge
    try:
        made.update()
        made.update()  # the line that is to be named
    finally:
        record_folder.RecordFolder.merge = before


def broken_merge(self, interval, protected):
    raise OSError("no room")


@case(EmptyAverage)
def applied(folder):
    average = polyak.Average(network(), polyak.SWA())
    with average.applied():  # the line that is to be named
        pass


@case(EmptyAverage)
def applied_in_an_exit_stack(folder):
    average = polyak.Average(network(), polyak.SWA())
    with contextlib.ExitStack() as stack:
        stack.enter_context(average.applied())  # the line that is to be named


@case(EmptyAverage)
def applied_as_a_decorator(folder):
    @polyak.Average(network(), polyak.SWA()).applied()
    def evaluate():
        pass

    evaluate()  # the line that is to be named


@case(EmptyAverage)
def applied_one_of_several(folder):
    averages = polyak.Averages(network(), {"swa": polyak.SWA()})
    with averages["swa"].applied():  # the line that is to be named
        pass


@case(EmptyAverage)
def lent(folder):
    average = polyak.Average(network(), polyak.SWA())
    average.lend()  # the line that is to be named


@case(EmptyAverage)
def copied_to(folder):
    average = polyak.Average(network(), polyak.SWA())
    average.copy_to(network())  # the line that is to be named


@case(EmptyAverage)
def measured(folder):
    average = polyak.Average(network(), polyak.SWA())
    average.update_bn([torch.randn(4, 3)])  # the line that is to be named


@case(StaleStatistics)
def saved(folder):
    average = updated()
    average.save(folder / "average.safetensors")  # the line that is to be named


@case(StaleStatistics)
def saved_for_torch(folder):
    average = updated()
    average.save(folder / "average.pt")  # the line that is to be named


@case(StaleStatistics)
def measured_with_a_norm_of_its_own(folder):
    average = updated(OwnNorm())
    average.update_bn([torch.randn(4, 3)])  # the line that is to be named


@case(StaleStatistics)
def applied_with_stale_statistics(folder):
    average = updated()
    with average.applied():  # the line that is to be named
        pass


@case(StaleStatistics)
def lent_with_stale_statistics(folder):
    average = updated()
    loan = average.lend()
    loan.give_back()  # the line that is to be named


@case(StaleStatistics)
def update_bn_that_misses_a_layer(folder):
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    data = [torch.randn(4, 3)]
    polyak.update_bn(model, data, forward=first_only)  # the line that is to be named


@case(StaleStatistics)
def update_bn(folder):
    model = network(OwnNorm())
    polyak.update_bn(model, [torch.randn(4, 3)])  # the line that is to be named


@case(StaleStatistics)
def swa_utils_update_bn(folder):
    model = network(OwnNorm())
    polyak.swa_utils.update_bn([torch.randn(4, 3)], model)  # the line that is to be named


@case(StaleStatistics)
def average_checkpoints(folder):
    paths = checkpoints(folder)
    outputs = {folder / "merged.safetensors": "swa"}
    polyak.average_checkpoints(paths, outputs)  # the line that is to be named


@case(PolyakWarning)
def select_checkpoints_beside_a_copy(folder):
    model = network().state_dict()
    for name in ("step-1", "best"):
        torch.save(model, folder / f"{name}.pt")
    select_checkpoints([folder])  # the line that is to be named


@case(StaleStatistics)
def iter_averaged_tensors(folder):
    tensors = polyak.iter_averaged_tensors(checkpoints(folder), "swa")
    for _ in tensors:  # the line that is to be named
        pass


@case(PolyakWarning)
def average_checkpoints_of_lightning(folder):
    state, told = nn.Linear(3, 3).state_dict(), {"pytorch-lightning_version": "2.6.6"}
    for step in (1, 2):
        told["hyper_parameters"] = {"path": Path("data")}
        torch.save({**told, "state_dict": state}, folder / f"step-{step}.ckpt")
    paths, target = [*folder.iterdir()], folder / "merged.ckpt"
    polyak.average_checkpoints(paths, target)  # the line that is to be named


@case(PolyakWarning)
def written_to_in_place(folder):
    average = polyak.Average(nn.Linear(3, 3), polyak.SWA())
    average.update()
    loan = average.lend(in_place=True)
    nn.init.zeros_(average.model.weight)
    loan.give_back()  # the line that is to be named


@case(PolyakWarning)
def loaded_from_narrower_values(folder):
    average = polyak.Average(nn.Linear(3, 3).bfloat16(), polyak.SWA())
    average.update()
    average.save(folder / "average.pt")
    average.load(folder / "average.pt")  # the line that is to be named


class WithState(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self):
        return {"step": 3}

    def set_extra_state(self, state):
        pass


@case(PolyakWarning)
def saved_without_extra_state(folder):
    average = polyak.Average(WithState(3, 3), polyak.SWA())
    average.update()
    average.save(folder / "average.safetensors")  # the line that is to be named


@case(PolyakWarning)
def merged_without_extra_state(folder):
    torch.save(WithState(3, 3).state_dict(), folder / "a.pt")
    polyak.average_checkpoints([folder / "a.pt"], folder / "out")  # the line that is to be named


@case(PolyakWarning)
def merged_without_the_state_of_training(folder):

    state = {"model": network().state_dict(), "step": 3, "optimizer": {"rate": torch.ones(1)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a single process
        dcp.save(state, checkpoint_id=folder / "step-3")
    step, out = folder / "step-3", folder / "out"
    polyak.average_checkpoints([step], out, format="dcp")  # the line that is to be named


@case(PolyakWarning)
def merged_unrelated_networks(folder):
    for step in (1, 2):
        torch.manual_seed(step)
        torch.save({"w": torch.randn(100, 100)}, folder / f"step-{step}.pt")
    inputs = folder.glob("*.pt")
    polyak.average_checkpoints(inputs, folder / "out.pt")  # the line that is to be named


@case(PolyakWarning)
def attached_to_one_of_two_optimizers(folder):
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    polyak.Average(model, polyak.SWA()).attach(first)  # the line that is to be named


class TwoHalves(torch.optim.SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


@case(PolyakWarning)
def attached_to_steps_that_no_hook_sees(folder):
    model = network()
    optimizer = TwoHalves(model.parameters(), lr=0.1)
    polyak.Average(model, polyak.SWA()).attach(optimizer)  # the line that is to be named


@case(PolyakWarning)
def attached_in_evaluation_mode(folder):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.train, optimizer.eval, optimizer.train_mode = print, print, False
    optimizer.state[model[0].weight]["z"] = torch.zeros(3, 3)
    polyak.Average(model, polyak.SWA()).attach(optimizer)  # the line that is to be named


@case(PolyakWarning)
def optimizer_copied(folder):
    optimizer = attached()
    copy.copy(optimizer)  # the line that is to be named


@case(PolyakWarning)
def optimizer_deep_copied(folder):
    optimizer = attached()
    copy.deepcopy(optimizer)  # the line that is to be named


@case(PolyakWarning)
def optimizer_deep_copied_in_a_dict(folder):
    run = {"step": 1, "parts": [attached()]}
    copy.deepcopy(run)  # the line that is to be named


@case(PolyakWarning)
def optimizer_pickled(folder):
    optimizer = attached()
    pickle.dumps(optimizer)  # the line that is to be named


@case(PolyakWarning)
def optimizer_pickled_in_python(folder):
    optimizer = attached()
    pickle._dumps(optimizer)  # the line that is to be named


@case(PolyakWarning)
def optimizer_saved(folder):
    optimizer = attached()
    torch.save({"optimizer": optimizer}, io.BytesIO())  # the line that is to be named


class Spoiling(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, **objects):
        with torch.no_grad():
            model.weight[0, 0] = float("nan")


class Regression(nn.Linear):
    def forward(self, x, labels):
        return {"loss": (super().forward(x) - labels).square().mean()}


@case(PolyakWarning)
def trained_to_a_nan(folder):
    arguments = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    data = [{"x": torch.ones(3), "labels": torch.ones(1)}] * 8
    trainer = Trainer(Regression(3, 1), arguments, train_dataset=data, callbacks=[Spoiling()])
    attach(trainer, polyak.SWA(), before_next_step=True)
    trainer.train()  # the line that is to be named


@case(PolyakWarning)
def a_triton_that_is_broken(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DEVICES", {"cpu"})
        patch.setattr(fused, "_failures", {})
        patch.setattr(fused, "_warned", set())
        patch.setitem(
            sys.modules, "triton", types.ModuleType("triton")
        )  # without all that it offers
        patch.delitem(sys.modules, "polyak.tensors.kernels", raising=False)
        fused._kernels.cache_clear()
        polyak.Average(network(), polyak.SWA()).update()  # the line that is to be named


def caught(program, folder):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        program(folder)
    return [warning for warning in found if issubclass(warning.category, PolyakWarning)]


def in_lightning(program, folder):
    """A module that has been fitted and saved without averaging, and a trainer that averages."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from polyak.integrations.lightning import WeightAveraging

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", PolyakWarning)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 0}
    module = BoringModel()
    plain = Trainer(max_epochs=1, default_root_dir=folder, **quiet)
    plain.fit(module)
    plain.save_checkpoint(folder / "plain.ckpt")
    trainer = Trainer(
        callbacks=[WeightAveraging("swa")], max_epochs=2, default_root_dir=folder, **quiet
    )
    program(trainer, module)


@case(PolyakWarning)
def lightning_resumed_without_an_average(folder):
    def program(trainer, module):
        trainer.fit(module, ckpt_path=folder / "plain.ckpt")  # the line that is to be named

    in_lightning(program, folder)


@case(PolyakWarning)
def lightning_module_with_other_weights(folder):
    def program(trainer, module):
        trainer.fit(module)
        torch.nn.init.zeros_(module.layer.weight)
        trainer.fit(module)  # the line that is to be named

    in_lightning(program, folder)


@case(PolyakWarning)
def probabilities_where_logits_belong(folder):
    shares = torch.rand(4, 3).softmax(1)
    nll(shares, torch.zeros(4).long())  # the line that is to be named


@case(StaleStatistics)
def search_of_a_model_with_statistics(folder):
    model = network()
    with polyak.Recorder(model, folder / "record", interval=1) as recorder:
        for _ in range(4):
            recorder.update()
    trajectory = polyak.Trajectory(folder / "record")
    trajectory.search(lambda state: 0.0, minimize=True)  # the line that is to be named


@pytest.mark.parametrize(("program", "category"), CASES, ids=lambda c: c.__name__)
def test_a_warning_names_the_line_that_caused_it(program, category, tmp_path):
    lines, first = inspect.getsourcelines(program)
    number = next(first + n for n, line in enumerate(lines) if CAUSE in line)
    found = caught(program, tmp_path)
    assert {warning.category for warning in found} == {category}
    assert {(warning.filename, warning.lineno) for warning in found} == {(__file__, number)}


def test_every_warning_of_polyak_is_among_them(tmp_path):
    said = []
    for n, (program, _) in enumerate(CASES):
        (tmp_path / str(n)).mkdir()
        said += [str(warning.message) for warning in caught(program, tmp_path / str(n))]
    for path in sorted(SOURCE.rglob("*.py")):
        if path.parent.name == "integrations":
            continue  # caused inside a framework's loop; each adapter's tests cause its own
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "warn":
                text = wording(call.args[0], tree)
                assert any(text in message for message in said), f"{path}:{call.lineno}: {text}"


def test_no_other_way_of_warning_is_used():
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "errors.py":
            assert "warnings.warn" not in path.read_text(encoding="utf-8"), path


def wording(message, tree):
    """The longest piece of a message that is the same in every such warning."""
    used = {node.id for node in ast.walk(message) if isinstance(node, ast.Name)}
    constants = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and {ast.unparse(t) for t in node.targets} & used
    ]
    texts = [
        node.value
        for node in itertools.chain.from_iterable(map(ast.walk, [message, *constants]))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return max((piece for text in texts for piece in re.split(r"\{\w*\}", text)), key=len)
