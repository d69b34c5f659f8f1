"""Which checkpoints of a folder or a glob count, in which order, and what is said of the others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyak
from polyak.checkpoints import Selection, average_checkpoints, open_checkpoint, select_checkpoints
from polyak.checkpoints.merging.selection import find_checkpoints
from polyak.checkpoints.reading.folders import step_in_name, step_in_path
from polyak.errors import ArgumentError, FormatError, PolyakWarning


def keep(folder, **values):
    """Torch files of one tensor, by name and value."""
    for name, value in values.items():
        torch.save({"w": torch.full((2,), float(value))}, folder / name)


def files(folder, names):
    keep(folder, **dict(zip(names, range(1, len(names) + 1), strict=True)))


def found(*inputs, **selection):
    """The names of what is kept, and of what is left out with the reason."""
    result = find_checkpoints(inputs, Selection(**selection))
    for one in result.kept:
        one.close()
    kept = [Path(one.path).name for one in result.kept]
    return kept, {Path(path).name: why for path, why in result.left_out.items()}


def test_a_copy_of_a_numbered_file_is_left_out(tmp_path):
    keep(tmp_path, **{"step-9.pt": 9, "step-10.pt": 10, "best.pt": 9, "newest.pt": 10})
    for where in (tmp_path, tmp_path / "*.pt"):
        kept, left_out = found(where)
        assert kept == ["step-9.pt", "step-10.pt"]
        assert left_out == {
            "best.pt": f"its tensors are those of {tmp_path / 'step-9.pt'}",
            "newest.pt": f"its tensors are those of {tmp_path / 'step-10.pt'}",
        }
    named = [
        tmp_path / name for name in ("best.pt", "step-9.pt", "step-10.pt")
    ]  # as a shell gives it
    assert found(*named)[0] == ["step-9.pt", "step-10.pt"]


def test_numbered_files_always_count(tmp_path):
    keep(tmp_path, **{f"step-{step}.pt": 7 for step in (1, 2, 3)})
    assert found(tmp_path) == (["step-1.pt", "step-2.pt", "step-3.pt"], {})


@pytest.mark.parametrize("label", ["step-{}", "soup_{}"])  # a step, and a number that is none
@pytest.mark.parametrize("how", ["named", "folders", "one of each"])
def test_a_checkpoint_in_two_formats_counts_once(tmp_path, label, how):
    first, second = tmp_path / "run", tmp_path / "st"
    for folder in (first, second):
        folder.mkdir()
    for step in (1, 2, 3):
        keep(first, **{f"{label.format(step)}.pt": step})
        weights = {"w": torch.full((2,), float(step + (step == 3)))}  # the third one differs
        save_file(weights, second / f"{label.format(step)}.safetensors")
    named = [[*sorted(one.iterdir())] for one in (first, second)]
    kept, left_out = found(
        *{
            "named": [*named[0], *named[1]],
            "folders": [first, second],
            "one of each": [first, *named[1]],
        }[how]
    )
    assert len(kept) == 4
    assert left_out == {
        f"{label.format(step)}.safetensors": f"its tensors are those of {first / label.format(step)}.pt"
        for step in (1, 2)
    }


def test_a_file_given_twice_stays_for_the_merge_to_refuse(tmp_path):
    keep(tmp_path, **{"step-1.pt": 1, "step-2.pt": 2})
    one, two = tmp_path / "step-1.pt", tmp_path / "step-2.pt"
    assert found(one, one, two) == (["step-1.pt", "step-1.pt", "step-2.pt"], {})
    assert found(tmp_path, one) == (["step-1.pt", "step-2.pt", "step-1.pt"], {})


@pytest.mark.parametrize("name", ["best_coco_bbox_mAP_epoch_2.pt", "best-epoch=2.pt"])
def test_a_numbered_copy_under_another_kind_of_name(tmp_path, name):
    keep(tmp_path, **{"epoch_1.pt": 1, "epoch_2.pt": 2, "epoch_3.pt": 3, name: 2})
    kept, left_out = found(tmp_path)
    assert kept == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]
    assert left_out == {name: f"its tensors are those of {tmp_path / 'epoch_2.pt'}"}
    keep(tmp_path, **{name: 9})
    with pytest.raises(ArgumentError, match="two kinds"):
        found(tmp_path)


def test_a_link_is_a_copy(tmp_path):
    keep(tmp_path, **{"9epoch.pth": 9, "10epoch.pth": 10})
    (tmp_path / "latest.pth").symlink_to(tmp_path / "10epoch.pth")
    kept, left_out = found(tmp_path)
    assert (kept, [*left_out]) == (["9epoch.pth", "10epoch.pth"], ["latest.pth"])


@pytest.mark.parametrize("name", ["init.pt", "avg_3.pt", "swa.pt", "ema_0.9999.pt"])
def test_what_remains_unclear_is_refused(tmp_path, name):
    keep(tmp_path, **{"epoch_1.pt": 1, "epoch_2.pt": 2, "epoch_3.pt": 3, name: 5})
    for where in (tmp_path, tmp_path / "*.pt"):
        with pytest.raises(ArgumentError, match=rf"{name}: this has no.*such as '.*/epoch_\*\.pt'"):
            find_checkpoints([where])
    assert found(tmp_path / "epoch_*.pt")[0] == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]
    named = sorted(tmp_path.iterdir())  # whoever names a file means it
    assert len(found(*named)[0]) == 4


def test_the_glob_that_is_proposed_fits_only_numbered_files(tmp_path):
    keep(tmp_path, **{"1.pt": 1, "2.pt": 2, "init.pt": 0})
    with pytest.raises(ArgumentError, match=r"such as '(.*)'") as caught:
        find_checkpoints([tmp_path])
    proposed = str(caught.value).split("'")[1]
    assert found(proposed)[0] == ["1.pt", "2.pt"]


def test_a_step_inside_the_file_is_one_of_its_own(tmp_path):
    for name, step, value in [
        ("epoch=0-step=500", 500, 1),
        ("epoch=1-step=1000", 1000, 2),
        ("last", 1200, 3),
    ]:
        state = {"state_dict": {"w": torch.full((1,), float(value))}, "global_step": step}
        torch.save(state, tmp_path / f"{name}.ckpt")
    assert found(tmp_path)[0][-1] == "last.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "global_step": 1000}, tmp_path / "last.ckpt")
    with pytest.raises(ArgumentError, match=r"last\.ckpt: this has no training step of its own"):
        find_checkpoints([tmp_path / "*.ckpt"])


def test_best_and_last_without_numbers(tmp_path):
    for name, step in [("best", 800), ("last", 800), ("final", 900)]:
        state = {"state_dict": {"w": torch.full((1,), float(step))}, "global_step": step}
        torch.save(state, tmp_path / f"{name}.ckpt")
    assert found(tmp_path) == (
        ["best.ckpt", "final.ckpt"],
        {"last.ckpt": f"its tensors are those of {tmp_path / 'best.ckpt'}"},
    )


def test_the_ingredients_of_a_soup_have_no_numbers(tmp_path):
    keep(tmp_path, **{"adam.pt": 1, "sgd.pt": 2, "lion.pt": 3})
    assert found(tmp_path) == (["adam.pt", "lion.pt", "sgd.pt"], {})


def test_other_tensors_are_something_else(tmp_path):
    files(tmp_path, ["step-1.pt", "step-2.pt"])
    torch.save({"mean": torch.ones(3)}, tmp_path / "normaliser.pt")
    kept, left_out = found(tmp_path)
    assert kept == ["step-1.pt", "step-2.pt"]
    assert left_out["normaliser.pt"].startswith("none of its tensors is in")


@pytest.mark.parametrize(
    "names",
    [
        ("model_1.pt", "model_2.pt", "ema_model_1.pt", "ema_model_2.pt"),
        ("step-1.pt", "step-2.pt", "step-2.safetensors"),
        ("checkpoint1.pt", "checkpoint2.pt", "checkpoint_1_400.pt", "checkpoint_2_800.pt"),
        ("epoch-1.pt", "epoch-2.pt", "checkpoint-4000.pt", "checkpoint-8000.pt"),
    ],
)
def test_two_kinds_of_numbers_are_refused(tmp_path, names):
    files(tmp_path, names)
    with pytest.raises(ArgumentError, match=r"two kinds: .* Name one kind"):
        find_checkpoints([tmp_path])
    assert found(tmp_path / f"{names[0][:5]}*1.pt")[0] == [names[0]]


def test_natural_order_of_whatever_number_the_names_share(tmp_path):
    files(tmp_path, [f"net-a{n}x.pt" for n in (8, 9, 10, 11)])
    assert found(tmp_path)[0] == [f"net-a{n}x.pt" for n in (8, 9, 10, 11)]
    assert found(tmp_path / "*.pt", last=2)[0] == ["net-a10x.pt", "net-a11x.pt"]
    with pytest.raises(ArgumentError, match="is unknown"):
        find_checkpoints([tmp_path], Selection(every=2))  # a number, but is it a step?


def test_lightnings_versions_are_of_one_kind(tmp_path):
    files(tmp_path, ["epoch=0-step=5.ckpt", "epoch=0-step=5-v1.ckpt", "epoch=1-step=10.ckpt"])
    assert len(found(tmp_path)[0]) == 3


# Averages that polyak wrote.

LAYOUTS = ["mean.safetensors", "mean.pt", "mean.pth", "mean.bin", "mean.ckpt", "mean", "of-step-3"]


@pytest.mark.parametrize("name", [*LAYOUTS, "model.safetensors", "step-4.safetensors"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_earlier_output_never_enters(tmp_path, name, suffix):
    for step in (1, 2, 9):
        state = {"w": torch.full((400,), float(step)), "v": torch.full((400,), float(step))}
        write = torch.save if suffix == "pt" else save_file
        write(state, tmp_path / f"step-{step}.{suffix}")
    options = {} if "." in name else {"shard_size": 1700}  # a folder of two shards and an index
    average_checkpoints(select_checkpoints([tmp_path]), {tmp_path / name: "swa"}, **options)
    kept, left_out = found(tmp_path)
    assert kept == [f"step-{step}.{suffix}" for step in (1, 2, 9)]
    assert [*left_out] == [name]
    kept, _ = found(tmp_path / "*")
    assert kept == [f"step-{step}.{suffix}" for step in (1, 2, 9)]
    kept, _ = found(*sorted(tmp_path.iterdir()))
    assert kept == [f"step-{step}.{suffix}" for step in (1, 2, 9)]


def test_an_output_under_the_name_of_a_model(tmp_path):
    for n in (1, 2):  # as Accelerate names several models; an average beside them is none of those
        save_file({"w": torch.full((2,), float(n))}, tmp_path / f"model_{n}.safetensors")
    average_checkpoints(tmp_path.glob("*"), tmp_path / "model.safetensors")
    assert found(tmp_path)[0] == ["model_1.safetensors", "model_2.safetensors"]


def test_an_average_saved_while_training_is_one(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    average = polyak.Average(model, polyak.SWA())
    for step in (1, 2):
        average.update()
        torch.save(model.state_dict(), tmp_path / f"step-{step}.pt")
    average.save(tmp_path / "ema.safetensors")
    average.save(tmp_path / "torch.pt", layout="averaged_model")
    kept, left_out = found(tmp_path)
    assert (kept, sorted(left_out)) == (["step-1.pt", "step-2.pt"], ["ema.safetensors", "torch.pt"])


def test_averages_alone_are_what_is_meant(tmp_path):
    model = torch.nn.Linear(2, 1)
    average = polyak.Average(model, polyak.SWA())
    for step in (1, 2, 3):
        average.update()
        average.save(tmp_path / f"ema-{step}.safetensors")
    assert len(found(tmp_path)[0]) == 3
    average_checkpoints(sorted(tmp_path.iterdir()), {tmp_path / "all.safetensors": "swa"})
    kept, left_out = found(tmp_path)
    assert (len(kept), [*left_out]) == (3, ["all.safetensors"])


def test_a_converted_checkpoint_is_none_and_a_converted_average_is_one(tmp_path):
    (tmp_path / "new").mkdir()
    for step in (1, 2):
        keep(tmp_path, **{f"step-{step}.pt": step})
        target = tmp_path / "new" / f"step-{step}.safetensors"
        average_checkpoints([tmp_path / f"step-{step}.pt"], {target: "swa"})
    average_checkpoints(sorted(tmp_path.glob("*.pt")), {tmp_path / "mean.pt": "swa"})
    average_checkpoints([tmp_path / "mean.pt"], {tmp_path / "new" / "mean.safetensors": "swa"})
    kept, left_out = found(tmp_path / "new")
    assert kept == ["step-1.safetensors", "step-2.safetensors"]
    assert [*left_out] == ["mean.safetensors"]


def test_two_named_files_may_be_an_average_and_a_checkpoint(tmp_path):
    files(tmp_path, ["step-1.pt", "step-2.pt", "step-3.pt"])
    average_checkpoints(sorted(tmp_path.glob("step-[12].pt")), {tmp_path / "mean.pt": "swa"})
    assert found(tmp_path / "step-3.pt", tmp_path / "mean.pt")[0] == ["step-3.pt", "mean.pt"]


def test_an_average_beside_its_own_inputs_is_refused(tmp_path):
    files(tmp_path, ["step-1.pt", "step-2.pt"])
    inputs = sorted(tmp_path.glob("*.pt"))
    average_checkpoints(inputs, {tmp_path / "mean.pt": "swa"})
    with pytest.raises(ArgumentError, match=r"mean\.pt is an average that polyak made of .*step-1"):
        average_checkpoints(tmp_path.glob("*.pt"), {tmp_path / "again.pt": "swa"})
    mixed = [inputs[1], tmp_path / "mean.pt"]  # with weights it is what was asked for
    average_checkpoints(mixed, {tmp_path / "mixed.safetensors": [0.5, 0.5]})
    assert load_file(tmp_path / "mixed.safetensors")["w"][0] == 1.75


def test_python_is_told_what_was_left_out(tmp_path):
    keep(tmp_path, **{"step-1.pt": 1, "best.pt": 1})
    with pytest.warns(PolyakWarning, match=r"Left out: .*best\.pt \(its tensors are those of"):
        selected = select_checkpoints([tmp_path])
    assert len(selected) == 1


# Folders of folders.


def model_folder(path, value):
    path.mkdir(parents=True)
    save_file({"w": torch.full((1,), float(value))}, path / "model.safetensors")


def test_beside_numbered_folders_nothing_else_counts(tmp_path):
    for step in (500, 1000):
        model_folder(tmp_path / f"checkpoint-{step}", step)
    model_folder(tmp_path / "best", 500)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    kept, left_out = found(tmp_path)
    assert kept == ["checkpoint-500", "checkpoint-1000"]
    assert sorted(left_out) == ["best", "model.safetensors"]
    average_checkpoints(select_checkpoints([tmp_path / "checkpoint-*"]), tmp_path / "checkpoint-7")
    assert found(tmp_path)[0] == ["checkpoint-500", "checkpoint-1000"]


def test_a_folder_with_a_single_file_and_an_index(tmp_path):
    model_folder(tmp_path / "m", 1)
    save_file({"w": torch.zeros(1)}, tmp_path / "m" / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m" / "pytorch_model.bin").touch()
    with open_checkpoint(tmp_path / "m") as checkpoint:  # as Transformers reads it
        assert checkpoint.tensors["w"].load().item() == 1


def test_weights_one_folder_further_down(tmp_path):
    for step in (9, 10):
        model_folder(tmp_path / f"checkpoint-{step}" / "unet", step)
    assert [one.step for one in select_checkpoints([tmp_path])] == [9, 10]
    assert [one.step for one in select_checkpoints([tmp_path / "*" / "unet"])] == [9, 10]
    for step in (9, 10):
        model_folder(tmp_path / f"checkpoint-{step}" / "unet_ema", step)
    with pytest.raises(
        FormatError, match=r"Name one of them: '.*/checkpoint-\*/unet', '.*unet_ema'"
    ):
        find_checkpoints([tmp_path])


def test_a_checkpoint_folder_with_several_files_is_one(tmp_path):
    model_folder(tmp_path / "step_5", 1)
    for name in ("model_1", "model_2"):  # Accelerate, of several models
        save_file({"other": torch.ones(1)}, tmp_path / "step_5" / f"{name}.safetensors")
    assert found(tmp_path / "step_5")[0] == ["step_5"]
    (tmp_path / "step_5").rename(tmp_path / "latest")
    assert found(tmp_path / "latest")[0] == ["latest"]


def test_files_of_one_name_have_the_steps_of_their_folders(tmp_path):
    for step in (9, 10):
        (tmp_path / f"step-{step}").mkdir()
        keep(tmp_path / f"step-{step}", **{"net.pt": step})
    for inputs in ([tmp_path / "*" / "net.pt"], tmp_path.glob("*/net.pt")):
        assert [one.step for one in select_checkpoints(inputs, Selection(last=2))] == [9, 10]


def test_tar_is_only_a_suffix(tmp_path):
    files(tmp_path, ["checkpoint_0002.pth.tar", "checkpoint_0010.pth.tar"])
    (tmp_path / "images.tar").write_bytes(b"no weights" * 100)
    assert found(tmp_path)[0] == ["checkpoint_0002.pth.tar", "checkpoint_0010.pth.tar"]
    keep(tmp_path, **{"copy.tar": 2})
    assert [*found(tmp_path)[1]] == ["copy.tar"]


# The order where some steps are unknown.


def test_a_file_without_a_step_does_not_drop_the_order(tmp_path):
    for name, n in {"step-9.pt": 9, "step-10.pt": 10, "zero.pt": 0}.items():
        torch.save({"w": torch.ones(1), "n": torch.tensor(n)}, tmp_path / name)
    paths = [tmp_path / name for name in ("step-10.pt", "step-9.pt", "zero.pt")]
    done = average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"})
    assert [Path(path).name for path in done.inputs] == ["zero.pt", "step-9.pt", "step-10.pt"]
    assert load_file(tmp_path / "out.safetensors")["n"] == 10
    with pytest.raises(ArgumentError, match=r"step of .*zero\.pt is unknown"):
        average_checkpoints(paths, {tmp_path / "x.safetensors": "power:std=0.1"})


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint_2_8000.pt", 8000),
        ("checkpoint_8000_2.pt", 8000),
        ("epoch_3_1200.pt", 1200),
        ("12epoch.pth", 12),
        ("resnet_18_epoch_10.pt", 10),
        ("step-10k.pt", 10_000),
        ("iter_1.5M.pt", 1_500_000),
        ("checkpoint.best_loss_3.21.pt", None),
        ("checkpoint-0.93.pt", None),
        ("valid.acc.ave_10best.pth", None),
        ("2026-05-01_12-30.pt", None),
        ("checkpoint-20260501.pt", None),
        ("step-20260501.pt", 20_260_501),
        ("model_0003.pth.tar", 3),
        ("last-v1.ckpt", None),
        ("model_00003_of_00005.pt", None),
    ],
)
def test_steps_in_names(name, step):
    assert step_in_name(name) == step


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("run/checkpoint-500/unet", 500),
        ("run/checkpoint-500/unet/diffusion_pytorch_model.safetensors", 500),
        ("run/global_step_100/actor/huggingface", 100),
        ("s3://bucket/checkpoint-7/model.safetensors", 7),
        ("iter_0001000/mp_rank_00/model_optim_rng.pt", 1000),
        ("step-00001000/lit_model.pth", 1000),
        ("checkpoint-70/swa.safetensors", None),
        ("model_2/run", None),
        ("checkpoint-1/a/b/c/model.safetensors", None),
    ],
)
def test_steps_in_paths(path, step):
    assert step_in_path(path) == step


@pytest.mark.parametrize(
    ("inside", "step"),
    [
        ({"optimizer_history": [{"num_updates": 5}, {"num_updates": 900}]}, 900),
        ({"extra_state": {"epoch": 2, "num_updates": 901}}, 901),
        ({"meta": {"epoch": 3, "iter": 902}}, 902),
        ({"iteration": 903}, 903),
        ({"trainer_state": {"global_step": 904}}, 904),
    ],
)
def test_the_step_inside_counts_before_the_name(tmp_path, inside, step):
    torch.save({"model": {"w": torch.ones(1)}, **inside}, tmp_path / "checkpoint_2_800.pt")
    with open_checkpoint(tmp_path / "checkpoint_2_800.pt") as checkpoint:
        assert checkpoint.step == step


# What has the name of a checkpoint and is none, and folders of other checkpoints.


def folders(where, *numbers):
    """Numbered folders of one model each."""
    for number in numbers:
        (where / f"checkpoint-{number}").mkdir(parents=True)
        save_file(
            {"w": torch.full((2,), float(number))}, where / f"checkpoint-{number}/model.safetensors"
        )


def test_a_save_that_did_not_finish_is_named(tmp_path):
    folders(tmp_path, 1, 2)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/config.json").write_text("{}")
    (tmp_path / "checkpoint-9").symlink_to("nowhere")
    (tmp_path / "best.ckpt").symlink_to("gone.ckpt")
    (tmp_path / "logs").mkdir()
    (tmp_path / "log-5.txt").write_text("")
    kept, left_out = found(tmp_path)
    assert kept == ["checkpoint-1", "checkpoint-2"]
    assert "holds no weights" in left_out["checkpoint-3"]
    assert "found config.json" in left_out["checkpoint-4"]
    assert left_out["checkpoint-9"] == left_out["best.ckpt"] == "it is a link to nothing"
    assert len(left_out) == 4
    kept, by_glob = found(tmp_path / "checkpoint-*")
    assert kept == ["checkpoint-1", "checkpoint-2"]
    assert {**left_out, "best.ckpt": None} == {**by_glob, "best.ckpt": None}
    with pytest.raises(FormatError, match="checkpoint-3 holds no weights"):
        found(tmp_path / "checkpoint-1", tmp_path / "checkpoint-3")  # named: it was meant


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    files(tmp_path, ["step-1.pt", "step-2.pt"])
    for name in ("step-3.pt.tmp", "step-4", "step-5.h5", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for name in ("step-6.png", "scores-6.csv", "optimizer-6.pt", ".step-7.pt"):
        (tmp_path / name).write_bytes(b"")
    kept, left_out = found(tmp_path)
    assert kept == ["step-1.pt", "step-2.pt"]
    assert sorted(left_out) == [
        "model-00001-of-00002.safetensors", "step-3.pt.tmp", "step-4", "step-5.h5",
    ]  # fmt: skip


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    folders(tmp_path, 1, 2, 3)
    weights = tmp_path / "checkpoint-3/model.safetensors"
    weights.rename(
        weights.with_name("model-00001-of-00002.safetensors")
    )  # its index was not written
    for where in (tmp_path, tmp_path / "checkpoint-*"):
        with pytest.raises(FormatError, match="checkpoint-3 holds shards"):
            found(where)


def test_where_nothing_is_a_checkpoint_the_reason_is_given(tmp_path):
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}/global_step{number}").mkdir(parents=True)
        (tmp_path / f"checkpoint-{number}/global_step{number}/mp_rank_00_model_states.pt").touch()
    for where in (tmp_path, tmp_path / "checkpoint-*"):
        with pytest.raises(FormatError, match=r"checkpoint-1: it is a DeepSpeed.*zero_to_fp32"):
            found(where)


def test_parts_of_a_run_with_a_save_that_did_not_finish(tmp_path):
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}/unet").mkdir(parents=True)
        file = tmp_path / f"checkpoint-{number}/unet/diffusion_pytorch_model.safetensors"
        save_file({"w": torch.full((2,), float(number))}, file)
    (tmp_path / "checkpoint-3").mkdir()
    kept, left_out = found(tmp_path)
    assert (kept, [*left_out]) == (["unet", "unet"], ["checkpoint-3"])


def test_folders_of_other_checkpoints_are_named(tmp_path):
    files(tmp_path, ["step-1.pt", "step-2.pt"])
    folders(tmp_path / "hf", 1, 2)
    (tmp_path / "torch").mkdir()
    files(tmp_path / "torch", ["epoch-1.pt", "epoch-2.pt"])
    (tmp_path / "data").mkdir()
    files(tmp_path / "data", ["train.pt"])
    kept, left_out = found(tmp_path)
    assert kept == ["step-1.pt", "step-2.pt"]
    assert sorted(left_out) == ["hf", "torch"]
    for name in ("step-1.pt", "step-2.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=r"its folders do: .*hf, .*torch\. Name"):
        found(tmp_path)


@pytest.mark.parametrize("others", ["run", "models"])
def test_an_average_is_not_taken_in_place_of_what_is_beside_it(tmp_path, others):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if others == "run":
        files(tmp_path / "a", ["step-1.pt", "step-2.pt"])
        files(tmp_path / "b", ["step-1.pt", "step-2.pt"])
        sources = sorted((tmp_path / "a").iterdir())
    else:
        for name in ("a", "b"):
            save_file({"w": torch.ones(2)}, tmp_path / name / "model.safetensors")
        sources = [tmp_path / "a", tmp_path / "b"]
    average_checkpoints(sources, tmp_path / "mean.pt")
    with pytest.raises(
        ArgumentError, match=r"averages that polyak wrote \(.*mean\.pt\).*a, .*b\. Name"
    ):
        found(tmp_path)
    assert found(tmp_path / "mean.pt")[0] == ["mean.pt"]
    average_checkpoints(sources, tmp_path / "mean")
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    assert found(tmp_path)[0] == ["mean.pt"]  # there is nothing but averages
