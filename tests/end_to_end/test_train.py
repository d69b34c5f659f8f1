"""`polyak train` as a user meets it: results, refusals, exit codes."""

import os
import subprocess
import sys

import pytest

from polyak.cli import app as cli
from polyak.errors import MissingExtra, OutputError
from polyak.reference_run.run import Run

DATA = """
from polyak.reference_run.data import Data, Split, embedded_data
def few():
    whole = embedded_data()
    first = lambda split, n: Split(split.images[:n].clone(), split.labels[:n].clone())
    return Data(first(whole.train, 200), first(whole.validation, 60), first(whole.test, 60))
"""
SHORT = ["--epochs", "4", "--data", "few_images:few", "--device", "cpu"]
TAUGHT = ["taught", "--cycle-epochs", "1", *SHORT]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A working folder with a few images, and no time spent on reports."""
    (tmp_path / "few_images.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "polyak.cli.train_display.write_report", lambda folder: folder / "report.html"
    )
    monkeypatch.setattr("polyak.cli.train_display.measure_landscape", lambda run: None)
    return tmp_path


def polyak(*arguments):
    return cli.run([str(a) for a in arguments])


def test_a_run_prints_its_results_and_where_they_are(there, capsys):
    assert polyak("train", *SHORT, "--seeds", "2") == 0
    output = capsys.readouterr().out
    assert "Running recipe default in runs/default" in output
    assert (
        "Data: few_images:few: 200 images to train on, 60 to validate on, 60 to test on" in output
    )
    assert "14 epochs in all: 2 seeds of sgd, half, swa; 1 thread" in output
    assert "seed 1 half   epoch   2/2  rate" in output
    assert " left to train" in output
    assert "mean ± standard error, 2 seeds" in output
    assert "averaged model  runs/default/swa.safetensors" in output
    assert "report          runs/default/report.html" in output
    run = Run(there / "runs" / "default")
    assert run.is_finished()
    assert (run.recipe.epochs, run.recipe.seeds, run.recipe.data) == (4, 2, "few_images:few")


def test_each_run_gets_a_folder_and_resume_takes_the_last(there, capsys):
    arguments = ["train", *SHORT, "--seeds", "1", "--arms", "sgd"]
    assert polyak(*arguments) == 0
    assert polyak(*arguments) == 0
    assert sorted(p.name for p in (there / "runs").iterdir()) == ["default", "default-2"]
    capsys.readouterr()
    assert polyak(*arguments, "--resume") == 0
    assert "Resuming recipe default in runs/default-2" in capsys.readouterr().out


def test_quick_is_the_run_in_miniature_and_flags_still_count(there):
    assert polyak("train", "batchnorm", "--quick", *TAUGHT[1:], "--output", "out") == 0
    recipe = Run(there / "out").recipe
    assert (recipe.name, recipe.seeds, recipe.epochs, recipe.batchnorm) == (
        "batchnorm-quick",
        2,
        4,
        True,
    )


def test_a_custom_recipe(there):
    (there / "mine.toml").write_text("epochs = 2\nseeds = 1\narms = ['sgd']\n")
    assert polyak("train", "mine.toml", "--data", "few_images:few", "--no-flips") == 0
    recipe = Run(there / "runs" / "mine").recipe
    assert (recipe.epochs, recipe.arms, recipe.flips) == (2, ("sgd",), False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["defualt"], 2, "No recipe 'defualt'"),
        (["--rate", "-1"], 2, "rate is -1.0; expected a number from"),
        (["--cycle-low", "0.5"], 2, "--cycle-low is 0.5, above --cycle-high"),
        (["--cycle-epochs", "0"], 2, "--cycle-epochs is 0"),
        (
            ["--data-folder", "/nowhere"],
            2,
            "--data-folder is '/nowhere', and there is no such folder",
        ),
        (["--data-folder", "taken"], 1, "found letter.txt; expected the four IDX files"),
        (
            ["--data-folder", "few_images.py"],
            2,
            "there is no such folder; expected one with the four",
        ),
        (["paper-wrn"], 2, "neither --data-folder nor data is given. Pass --data-folder FOLDER"),
        (["paper-vgg16", "--quick"], 2, "is for images that polyak does not ship"),
        (["--data", "few_images:fwe"], 2, "has nothing at fwe"),
        (["--model", "nothing_there:build"], 2, "no module 'nothing_there'"),
        (["--output", "taken"], 1, "taken is not empty"),
        (["--output", "/proc/run"], 1, "Could not write /proc/run"),
        (["--output", "taken/letter.txt"], 1, "Could not write taken/letter.txt"),
        (
            ["taught", "--cycle-epochs", "20"],
            2,
            "--cycle-epochs is 20, and only 10 of 40 epochs are left",
        ),
        (
            [*SHORT, "--batch-size", "201"],
            2,
            "--batch-size is 201, and there are 200 training images",
        ),
        (["--resume", "--output", "nowhere"], 2, "There is no run in nowhere to resume"),
        (["--resume"], 2, "There is no run in runs/default to resume"),
        ([*SHORT, "--swa-rate", "1e9", "--seeds", "1"], 1, "Seed 0, arm swa, epoch 3:"),
        (["--jobs", "0"], 2, "--jobs is 0; expected 1 to 1024"),
        (["--threads", "0"], 2, "--threads is 0; expected 1 to 1024"),
        (["--threads", "0", "--resume", "-o", "nowhere"], 2, "--threads is 0"),
        (["--threads", "100000"], 2, "--threads is 100000; expected 1 to 1024"),
        ([*SHORT, "--epoch-size", "32"], 2, "--batch-size is 64, and there are 32 training images"),
        ([*SHORT, "--epoch-size", "201"], 2, "--epoch-size is 201, and there are 200"),
    ],
)
@pytest.mark.filterwarnings("ignore:An interval of the record")  # the record says it first
def test_bad_input_is_one_message_and_an_exit_code(there, capsys, arguments, code, message):
    (there / "taken").mkdir()
    (there / "taken" / "letter.txt").write_text("dear")
    assert polyak("train", *arguments) == code
    shown = capsys.readouterr()
    errors = " ".join(shown.err.split())
    assert message in errors
    assert bool(shown.out) is ("--swa-rate" in arguments), "a refusal comes before anything is said"
    assert "Traceback" not in errors


@pytest.mark.parametrize("flag", ["--epochs", "--seeds", "--shift", "--batch-size"])
def test_a_fraction_is_not_rounded(there, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        polyak("train", flag, "2.5")
    assert stop.value.code == 2
    assert "'2.5' is not a whole number" in capsys.readouterr().err


def test_an_unknown_flag_exits_with_2(there, capsys):
    with pytest.raises(SystemExit) as stop:
        polyak("train", "--epoch", "3")
    assert stop.value.code == 2
    assert "--epochs" in "".join(capsys.readouterr())


def test_another_recipe_on_resume_says_what_differs(there, capsys):
    arguments = ["train", *SHORT, "--arms", "sgd", "--seeds", "1", "--output", "out"]
    assert polyak(*arguments) == 0
    assert polyak(*arguments, "--resume", "--rate", "0.2") == 1
    assert "rate: 0.2 here, 0.1 there" in capsys.readouterr().err


def test_ctrl_c_says_how_to_continue(there, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("polyak.reference_run.loop._trained", interrupt)
    assert polyak("train", *SHORT, "--output", "my run") == 130
    assert "Continue with: polyak train --resume --output 'my run'" in capsys.readouterr().err


def test_resume_needs_no_more_than_the_folder(there, capsys):
    fields = [*SHORT, "--arms", "sgd", "--seeds", "2:4", "--output", "out"]
    assert polyak("train", *fields) == 0
    assert polyak("train", "--resume", "--output", "out") == 0
    assert polyak("train", "--resume", "--output", "out", "--epochs", "5") == 1
    assert "epochs: 5 here, 4 there" in capsys.readouterr().err
    recipe = Run(there / "out").recipe
    assert (recipe.first_seed, recipe.seeds) == (2, 2)


@pytest.mark.parametrize("seeds", ["5:3", "3:3", "a:4", ":4"])
def test_a_range_of_no_seeds(there, capsys, seeds):
    with pytest.raises(SystemExit):
        polyak("train", "--seeds", seeds)
    assert "is not a range of seeds" in capsys.readouterr().err


def test_a_missing_report_extra_costs_the_report_only(there, capsys, monkeypatch):
    def missing(folder):
        raise MissingExtra.of("matplotlib", "report", "The report")

    monkeypatch.setattr("polyak.cli.train_display.write_report", missing)
    assert polyak("train", *SHORT, "--arms", "sgd", "--seeds", "1") == 0
    assert "report          none: The report needs matplotlib" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_leaves_a_whole_run(there, capsys, monkeypatch):
    def full(folder):
        raise OutputError("Could not write report.html: No space left on device.")

    monkeypatch.setattr("polyak.cli.train_display.write_report", full)
    assert polyak("train", *SHORT) == 1
    shown = capsys.readouterr()
    assert "averaged model  runs/default/swa.safetensors" in shown.out
    assert "For its report: polyak report runs/default" in shown.out
    assert "No space left on device" in shown.err


def test_the_live_table_shows_every_arm(there, capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(
        "polyak.cli.train_display.Console", lambda: Console(force_terminal=True, width=120)
    )
    assert polyak("train", *SHORT, "--seeds", "1") == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("waits", "half", "2/2", "4/4", "iterate"))


def test_help_does_not_pay_for_torch():
    code = (
        "import sys; from polyak.cli.app import run; run(['train', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


FULL_DISK = """
import resource, sys
from pathlib import Path
from polyak.cli import app
from polyak.reference_run import loop

original = loop.Board.take
seen = []
def full_after_two(board, leg, records):
    original(board, leg, records)
    seen.append(records)
    if len(seen) == 2:  # from here on no file may grow past this: a full disk, to the writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
loop.Board.take = full_after_two
sys.exit(app.run(sys.argv[1:]))
"""


def test_a_disk_that_fills_keeps_the_previous_checkpoint(there, capsys):
    arguments = ["train", *SHORT, "--arms", "sgd", "--seeds", "1", "--output", "out"]
    path = os.pathsep.join([str(there), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert "Could not write out/checkpoints/seed-0-sgd.polyak: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((there / "out").rglob("*.part"))
    assert polyak(*arguments, "--resume") == 0
    assert Run(there / "out").is_finished()
    assert polyak(*arguments[:-1], "whole") == 0
    alone, resumed = (there / name / "metrics.jsonl" for name in ("whole", "out"))
    assert alone.read_bytes() == resumed.read_bytes()
