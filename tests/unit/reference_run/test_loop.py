"""The loop: what a run leaves, and that stopping it anywhere changes no bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from polyak.errors import (
    ArgumentError,
    FormatError,
    NonFiniteError,
    OutputError,
    UsageError,
)
from polyak.maths.profiles import EMA, Window
from polyak.reference_run.evaluation import logits_of
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.loop import plan, train
from polyak.reference_run.models import Net
from polyak.reference_run.run import Run

N_STEPS = 4  # 200 images in batches of 50


def results(folder):
    kept = [folder / "metrics.jsonl", *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture
def finished(short, tmp_path):
    return train(short, tmp_path / "alone")


def test_what_a_run_leaves(finished, short):
    assert finished.recipe == short
    assert finished.is_finished()
    assert len(finished.epochs(seed=1)) == len(plan(short)) / 2
    assert [(f["seed"], f["arm"], f["weights"]) for f in finished.finals()][:8] == [
        (0, "sgd", "iterate"),
        (0, "sgd", "ema"),
        *((0, arm, kind) for arm in ("swa", "cyclic") for kind in ("iterate", "ema", "swa")),
    ]
    final = finished.finals()[-1]
    assert sum(final["reliability"]["count"]) == 60
    assert final["nll_scaled"] > 0
    epoch = finished.epochs(arm="swa")[0]
    assert (epoch["epoch"], epoch["step"], epoch["rate"], epoch["averaged"]) == (4, 16, 0.05, True)
    assert set(epoch["evaluations"]) == {"iterate", "ema", "swa"}
    assert finished.averaged_epochs("swa") == finished.averaged_epochs("cyclic") == [3, 4]


def test_every_arm_takes_the_same_number_of_steps(finished, short):
    last = {(r["seed"], r["arm"]): r["step"] for r in finished.records() if r["kind"] == "epoch"}
    assert set(last.values()) == {short.epochs * N_STEPS}


def test_the_averaged_model_is_the_mean_of_the_weights_taken(finished, few_images):
    taken = [finished.weights(0, "swa", f"epoch-{epoch:03d}") for epoch in (3, 4)]
    average = load_file(finished.folder / "swa.safetensors")
    for name, tensor in average.items():
        assert torch.allclose(tensor, sum(t[name] for t in taken) / 2, atol=1e-7), name
    model = finished.model()
    model.load_state_dict(average)
    logits = logits_of(model, few_images.test, Hardware.named("cpu"))
    wrong = 100 * (logits.argmax(1) != few_images.test.labels).double().mean()
    final = next(f for f in finished.finals() if (f["arm"], f["weights"]) == ("swa", "swa"))
    assert float(wrong) == pytest.approx(final["error"])


def test_the_averaged_model_says_what_it_is_made_of(finished):
    with safe_open(finished.folder / "swa.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["profile"] == "swa"
    assert metadata["count"] == "2"
    assert metadata["unit"] == "captures"
    assert metadata["batchnorm"] == "none"


def test_arms_share_the_run_up_to_the_branch(finished):
    entering = finished.weights(0, "swa", "epoch-003")
    assert all(
        torch.equal(t, entering[n]) for n, t in finished.weights(0, "cyclic", "epoch-003").items()
    )


@pytest.mark.parametrize("record_intervals", [40, 3])
def test_every_arm_is_recorded_from_the_first_step_of_its_seed(short, tmp_path, record_intervals):
    recipe = dataclasses.replace(short, record_intervals=record_intervals, seeds=1)
    run = train(recipe, tmp_path / "run")
    for arm in recipe.arms:
        record = run.trajectory(0, arm)
        assert (record.start, record.end, record.missing) == (0, 16, ())
        assert len(record.intervals) == min(record_intervals, 16)
        if record_intervals == 40:  # an interval for each step: the EMA of all arms is in it
            made = record.average(EMA.from_half_life(recipe.ema_half_life * N_STEPS))
            for name, tensor in run.weights(0, arm, "ema").items():
                assert torch.allclose(made[name], tensor, atol=1e-6), (arm, name)
    before = Window(16 / 3)
    same = [run.trajectory(0, arm).average(before, 16 / 3) for arm in recipe.arms]
    assert all(torch.equal(t, same[2][n]) for n, t in same[0].items())


def test_no_record_if_none_is_wanted(short, tmp_path):
    run = train(dataclasses.replace(short, record_intervals=0, seeds=1), tmp_path / "run")
    assert not (run.folder / "record").exists()
    with pytest.raises(ArgumentError, match=r"There is no folder .*swa"):
        run.trajectory(0, "swa")


def test_stopping_after_any_record_changes_no_bit(finished, short, tmp_path):
    expected = results(finished.folder)
    n_records = len(finished.records())

    def stop_after(n):
        seen = []

        def watch(record, done):
            seen.append(record)
            if len(seen) == n:
                raise KeyboardInterrupt

        return watch

    folder = tmp_path / "stopped"
    stops = 0
    for n in [1, 1, 2, 3, 1, 1, 4, 2, 1, 3, n_records]:
        try:
            train(short, folder, resume=True, watch=stop_after(n))
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 9
    assert results(folder) == expected


def test_stopping_in_the_middle_of_an_epoch_changes_no_bit(finished, short, tmp_path, monkeypatch):
    from polyak.reference_run.arm import Arm

    expected, step = results(finished.folder), Arm._step
    for place, n_steps in enumerate((2, 13, 30)):
        left = [n_steps]

        def stopping(self, *args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return step(self, *args)

        folder = tmp_path / f"stopped-{place}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Arm, "_step", stopping)
            train(short, folder)
        train(short, folder, resume=True)
        assert results(folder) == expected


def test_dropout_and_batchnorm_resume_to_the_bit(short, tmp_path, monkeypatch):
    class Dropping(torch.nn.Sequential):
        def __init__(self, **sizes):
            super().__init__(Net(**sizes, batchnorm=True), torch.nn.Dropout(0.2))

    monkeypatch.setattr("polyak.reference_run.models.load_object", lambda spelling: Dropping)
    recipe = dataclasses.replace(short, model="any:thing", seeds=1, shift=1)
    expected = results(train(recipe, tmp_path / "alone").folder)

    def stop(record, done):
        raise KeyboardInterrupt

    for _ in range(len(plan(recipe))):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", resume=True, watch=stop)
    train(recipe, tmp_path / "stopped", resume=True)
    assert results(tmp_path / "stopped") == expected


def test_batchnorm_averages_are_saved_with_refreshed_statistics(short, tmp_path):
    run = train(dataclasses.replace(short, batchnorm=True, seeds=1), tmp_path / "run")
    with safe_open(run.folder / "swa.safetensors", "pt") as file:
        assert file.metadata()["batchnorm"] == "refreshed"
    average, last = run.weights(0, "swa", "swa"), run.weights(0, "swa", "iterate")
    assert not torch.equal(average["norm1.running_mean"], last["norm1.running_mean"])
    model = run.model()
    model.load_state_dict(average)


def test_torchs_random_state_is_given_back(short, tmp_path):
    torch.manual_seed(77)
    before = torch.get_rng_state()
    train(dataclasses.replace(short, seeds=1, arms=("sgd",)), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_becomes_nan_keeps_what_was_finished(short, tmp_path):
    recipe = dataclasses.replace(short, swa_rate=1e9, seeds=1)
    with pytest.raises(NonFiniteError, match=r"Seed 0, arm swa, epoch 4: .*Lower the rate"):
        train(recipe, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert [f["weights"] for f in run.finals()] == ["iterate", "ema"]
    assert not run.is_finished()
    assert run.weights(0, "sgd", "iterate").keys() == Net().state_dict().keys()
    with pytest.raises(NonFiniteError):  # the same again, not something else
        train(recipe, tmp_path / "run", resume=True)


def test_a_model_that_does_not_fit_leaves_no_folder(short, tmp_path):
    recipe = dataclasses.replace(short, model="torch.nn:Identity")
    with pytest.raises(ArgumentError, match="expected logits"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_one_message(finished):
    path = finished.folder / "weights" / "seed-0" / "swa-average-swa.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"swa-average-swa\.safetensors is damaged"):
        finished.weights(0, "swa", "swa")


def test_everyone_who_may_read_the_run_may_read_its_model(finished):
    recipe, model = (finished.folder / name for name in ("recipe.toml", "swa.safetensors"))
    assert model.stat().st_mode == recipe.stat().st_mode


def test_resuming_with_other_threads_is_refused(short, tmp_path):
    threads = torch.get_num_threads()
    train(dataclasses.replace(short, arms=("sgd",), seeds=1), tmp_path / "run")
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UsageError, match=f"threads: {threads} then, {threads + 1} now"):
            train(dataclasses.replace(short, arms=("sgd",), seeds=1), tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(threads)


def test_resuming_from_a_damaged_checkpoint_is_refused(finished, short):
    path = finished.folder / "checkpoints" / "seed-1-cyclic.polyak"
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="checksum"):
        train(short, finished.folder, resume=True)


def test_resuming_a_finished_run_changes_nothing(finished, short):
    before = results(finished.folder)
    train(short, finished.folder, resume=True)
    assert results(finished.folder) == before
    with pytest.raises(OutputError, match="is not empty"):
        train(short, finished.folder)


def test_the_reader_says_what_is_missing(finished, tmp_path):
    with pytest.raises(ArgumentError, match="is not a run"):
        Run(tmp_path)
    with pytest.raises(ArgumentError, match=r"seed-1.*does not exist"):
        finished.weights(1, "sgd", "iterate")
    with (finished.folder / "metrics.jsonl").open("a") as file:
        file.write('{"cut')
    assert len(finished.records()) == len(plan(finished.recipe)) + len(finished.finals())
    (finished.folder / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(FormatError, match="is damaged"):
        finished.records()


def test_the_records_are_read_once(finished, monkeypatch):
    records = finished.records()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", None)
        assert finished.records() == records
    with (finished.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "later"}\n')
    assert finished.records() == [*records, {"kind": "later"}]


def test_metrics_are_plain_json(finished):
    for line in (finished.folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["kind"] in ("epoch", "final")


def test_a_seed_gives_the_same_however_many_there_are(finished, short, tmp_path):
    one = train(dataclasses.replace(short, seeds=1), tmp_path / "one")
    assert one.records() == [r for r in finished.records() if r["seed"] == 0]
    assert dataclasses.replace(short, device="cpu") == short


def test_an_unknown_device(short, tmp_path):
    with pytest.raises(ArgumentError, match="expected auto, cpu or cuda"):
        train(dataclasses.replace(short, device="tpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arms_do_not_touch_each_other(finished, short, tmp_path):
    without_swa = train(
        dataclasses.replace(short, seeds=1, arms=("sgd", "cyclic")), tmp_path / "two"
    )
    assert without_swa.epochs(arm="cyclic") == finished.epochs(arm="cyclic")
    assert without_swa.epochs(arm="sgd") == finished.epochs(arm="sgd")


def test_weights_that_diverge_in_the_last_step_are_noticed_too(short, tmp_path, monkeypatch):
    from polyak.reference_run.arm import Arm

    trained = Arm.train_epoch

    def diverging(self, epoch):
        loss = trained(self, epoch)
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(Arm, "train_epoch", diverging)
    with pytest.raises(NonFiniteError, match="Seed 0, arm sgd, epoch 1: The logits hold NaN"):
        train(short, tmp_path / "run")


@pytest.fixture
def with_control(short):
    """The residual network, annealed in half of the budget too; averaging begins after the branch."""
    fields = {
        "arms": ("sgd", "half", "swa"),
        "network": "residual",
        "branch_at": 0.5,
        "warmup_epochs": 1,
    }
    return dataclasses.replace(short, **fields, swa_rate=0.05, nesterov=True, momentum=0.8)


def test_the_control_is_annealed_in_half_of_the_epochs(with_control, tmp_path):
    run = train(dataclasses.replace(with_control, seeds=1), tmp_path / "run")
    by_arm = {arm: [r["epoch"] for r in run.epochs(arm=arm)] for arm in with_control.arms}
    assert by_arm == {"sgd": [1, 2, 3, 4], "half": [2], "swa": [3, 4]}
    assert run.epochs(arm="half")[-1]["rate"] == pytest.approx(0.05 * 0.01)
    assert [f["weights"] for f in run.finals() if f["arm"] == "half"] == ["iterate"]
    assert run.averaged_epochs("swa") == [3, 4]
    assert set(run.epochs(arm="swa")[0]["evaluations"]) == {"iterate", "ema", "swa"}
    assert not list((run.folder / "checkpoints").glob("*epoch*"))  # nobody leaves there any more
    assert run.averaged_model().training is False
    assert run.origin["threads"] == str(torch.get_num_threads())


def test_the_control_leaves_the_run_where_it_would_have_been(with_control, tmp_path):
    """Up to its branch the control is the SGD arm: alone in its budget it would train the same."""
    recipe = dataclasses.replace(with_control, seeds=1)
    control = train(recipe, tmp_path / "run").weights(0, "half", "iterate")
    alone = dataclasses.replace(recipe, epochs=2, arms=("sgd",))
    whole = train(alone, tmp_path / "alone").weights(0, "sgd", "iterate")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in control.items())


def test_seeds_may_begin_anywhere(finished, short, tmp_path):
    later = train(dataclasses.replace(short, first_seed=1, seeds=1), tmp_path / "later")
    assert later.records() == [r for r in finished.records() if r["seed"] == 1]
    assert later.weights(1, "sgd", "iterate").keys() == finished.weights(0, "sgd", "iterate").keys()
    assert later.averaging_arm() == "swa"


def test_a_stopped_run_has_the_records_of_what_is_done(short, tmp_path):
    def stop(record, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(short, tmp_path / "run", watch=stop)
    (record,) = Run(tmp_path / "run").records()
    assert (record["arm"], record["epoch"]) == ("sgd", 1)
    (tmp_path / "run" / "metrics.jsonl").write_text("scribbled over")
    train(short, tmp_path / "run", resume=True)
    assert Run(tmp_path / "run").is_finished()


@pytest.mark.parametrize("averages", [("ema", "swa"), ("ema", "power", "swa", "wsm")])
def test_averages_of_the_annealed_arm_are_not_those_of_the_arms_that_leave_it(
    short, tmp_path, averages
):
    recipe = dataclasses.replace(short, seeds=1, averages=averages)
    run = train(recipe, tmp_path / "run")
    assert {final["arm"] for final in run.finals()} == set(recipe.arms)
