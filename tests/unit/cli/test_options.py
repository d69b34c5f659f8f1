"""Every option of every command with values that cannot do what they say: one line, exit code, nothing written."""

import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.cli.app import app, run, with_flags
from polyak.cli.converters import whole_number
from polyak.reference_run.run import Run

MODULE = """
import torch
def build(): return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
def data(): return [torch.randn(4, 3)]
def nothing(): return None
def empty(): return []
def sized(n): return n
x = 3
"""


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for step in (100, 200, 300, 400):
        save_file(
            {"w": torch.full((3,), float(step)), "b": torch.ones(2)}, f"step-{step}.safetensors"
        )
    (tmp_path / "for_options.py").write_text(MODULE)
    state = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).state_dict()
    save_file(state, "model.safetensors")
    (tmp_path / "a-folder.png").mkdir()
    for name in ("there.png", "there.html"):
        (tmp_path / name).write_text("mine")
    return tmp_path


REFUSED = {
    # average: which inputs
    "average ALL -o out.pt --last 0": "--last is 0",
    "average ALL -o out.pt --last -1": "--last is -1",
    "average ALL -o out.pt --every 0": "--every is 0",
    "average ALL -o out.pt --steps 5": "--steps '5'",
    "average ALL -o out.pt --steps 300:100": "No checkpoint is left of 4",
    "average ALL -o out.pt --every 7": "No checkpoint is left of 4",
    "average ALL -o out.pt --best 2": "--best and --metric go together",
    "average ALL -o out.pt --best 0 --metric loss": "--best is 0",
    "average ALL -o out.pt --best 2 --metric loss": "No score 'loss'",
    "average nothing-* -o out.pt": "Nothing fits nothing-*",
    "average -o out.pt": "no input was given",
    # how
    "average ALL -o out.pt --method nope": "Unknown method 'nope'",
    "average ALL -o out.pt --method ema:0.9": "A bare '0.9'",
    "average ALL -o out.pt --method window:length=nan": "Window length is nan",
    "average ALL -o out.pt --method swa --method swa": "2 methods and 1 outputs",
    "average ALL -o out.pt --weights 1,0": "2 weights for 4 inputs",
    "average ALL -o out.pt --weights 1e400,0,0,0": "expected finite numbers",
    "average ALL -o out.pt --weights 1,1,1,1": "Pass --normalize to divide",
    "average ALL -o out.pt --weights a": "expected numbers like",
    "average ALL -o out.pt --weights 1,0,0,0 --method swa": "exclude each other",
    "average ALL -o out.pt --normalize": "no list of weights to normalise; .* Leave out --normalize",
    # tensors
    "average ALL -o out.pt --exclude '*'": "--exclude leaves nothing to average: all 2 tensors",
    "average ALL -o out.pt --include w --exclude w": "--include and --exclude leave nothing",
    "average ALL -o out.pt --exclude nope": "fits no tensor",
    "average ALL -o out.pt --dtype int8": "averages are written as one of",
    "average ALL -o out.pt --shard-size 1GB": "--shard-size is for outputs that are folders",
    "average ALL -o folder --shard-size x": "--shard-size is 'x'",
    "average ALL -o out.pt --base nope": "no file or folder nope",
    # work
    "average ALL -o out.pt --max-memory 1": "--max-memory is 1 bytes",
    "average ALL -o out.pt --max-memory 1e99GB": "--max-memory is '1e99GB'",
    "average ALL -o out.pt --threads 0": "--threads is 0",
    "average ALL -o out.pt --threads 99999": "--threads is 99999",
    "average ALL -o out.pt --part 5/4": "--part is '5/4'",
    "average ALL -o out.xyz": "has the suffix '.xyz'",
    "average ALL -o out.pt -o out.pt --method swa --method swa": "the same path",
    "average ALL -o step-100.safetensors --overwrite": "is an input",
    "average ALL -o missing/out.pt": "no folder missing",
    # update-bn
    "update-bn model.safetensors -o out.pt --model BUILD --data DATA --limit 0": "--limit is 0",
    "update-bn model.safetensors -o out.pt --model BUILD --data for_options:empty": "no batches",
    "update-bn model.safetensors -o out.pt --model BUILD --data for_options:nothing": "NoneType",
    "update-bn model.safetensors -o out.pt --model for_options:nothing --data DATA": "NoneType",
    "update-bn model.safetensors -o out.pt --model for_options:x --data DATA": "a int at x",
    "update-bn model.safetensors -o out.pt --model for_options:sized --data DATA": "needs some: .*'n'",
    "update-bn model.safetensors -o out.pt --model BUILD --data for_options:sized": "needs some: .*'n'",
    "update-bn model.safetensors -o out.pt --model nope:x --data DATA": "no module 'nope'",
    "update-bn step-100.safetensors -o out.pt --model BUILD --data DATA": "missing .7.: 0.bias",
    "update-bn . -o out.pt --model BUILD --data DATA": "is a folder",
    # schedule
    "schedule nope": "Unknown schedule piece 'nope'",
    "schedule constant:rate=0.1": "needs steps",
    "schedule constant:rate=0.1,steps=2.5": "'2.5' .* is not a whole number",
    "schedule constant:rate=0.1,steps=0": "expected 1 or more",
    "schedule constant:rate=0.1,steps=100000000": "at most 10000000 are listed",
    "schedule constant:rate=nan,steps=3": "Constant rate is nan",
    "schedule cyclic:high=0.1,low=0.2,cycle=3,steps=9": "expected low <= high",
    "schedule constant:rate=0.1,steps=3 --plot out.xyz": "ends in '.xyz'",
    # train
    "train taught --cycle-epochs 11": "--cycle-epochs is 11, and only 10 .* --branch-at 0.75",
    "train --momentum 2": "--momentum is 2.0",
    "train --rate nan": "--rate is nan",
    "train --seeds 0": "--seeds is 0",
    "train --seeds 3:8 --first-seed 2": "Pass one",
    "train --arms swa": "expected sgd, then",
    "train --batchnorm --model a:b": "--model and --batchnorm exclude",
    "train --data a:b --data-folder c": "--data and --data-folder exclude",
    "train --batch-size 100000 --output out": "--batch-size is 100000, and there are 6000",
    "train --resume --output out": "no run in out to resume",
    "train nope": "No recipe 'nope'",
    "train --threads 0": "--threads is 0",
    # outputs: a folder's name, a folder, one that is missing, and what is there
    "update-bn model.safetensors --model BUILD --data DATA -o no/x.pt": "no folder no for x.pt",
    "update-bn model.safetensors --model BUILD --data DATA -o step-100.safetensors": "Choose another name",
    "schedule --plot a-folder.png": "is a folder; expected the name of a file, like a-folder.png/name",
    "schedule --plot there.png": "there.png exists. .* pass --overwrite",
    "schedule --plot no/a.png": "no folder no for a.png",
    "report a-run -o there.html": "there.html exists. .* pass --overwrite",
    "report a-run -o .": ". is a folder; expected the name of a file",
    "report a-run -o no/a.html": "no folder no for a.html",
    "compare a-run b-run -o there.html": "there.html exists. .* pass --overwrite",
    "compare a-run b-run -o a-folder.png --overwrite": "a-folder.png is a folder",
    "search rec --model BUILD --evaluate for_options:sized --minimize --report there.html": "exists",
    "search rec --model BUILD --evaluate for_options:sized --minimize -o no/x.pt": "no folder no for x",
    "landscape line ALL --evaluate for_options:sized --minimize -o a-folder.png": "is a folder",
    "landscape line ALL --evaluate for_options:sized --minimize -o no/line.csv": "no folder no for line",
    "landscape connect ALL --model BUILD --loss for_options:sized --data DATA -o no/x.pt": "no folder no",
    # the others
    "inspect": "No file was given",
    "inspect nope": "no file or folder nope",
    "diff step-100.safetensors nope": "no file or folder nope",
    "report nope": "nope is not a run",
    "compare step-100.safetensors": "two or more different runs",
}
FILES = {
    "update-bn model.safetensors --model BUILD --data DATA": ("-o", "new.pt"),
    "schedule": ("--plot", "new.png"),
    "report a-run": ("-o", "new.html"),
    "compare a-run b-run": ("-o", "new.html"),
    "search rec --model BUILD --evaluate for_options:sized --minimize": ("-o", "new.pt"),
    "decay rec --model BUILD --evaluate for_options:sized --minimize": ("--report", "new.html"),
    "landscape line ALL --evaluate for_options:sized --minimize": ("-o", "new.csv"),
    "landscape connect ALL --model BUILD --loss for_options:sized --data DATA": ("-o", "new.pt"),
    "average ALL": ("-o", "new.safetensors"),
    "soup ALL --evaluate for_options:sized --minimize": ("-o", "new.pt"),
}
"""Commands, and an option with a file to write."""
NOT_NUMBERS = [
    f"{command} {flag} {value}"
    for command, flags in (
        ("average ALL -o out.pt", ("--last", "--every", "--best", "--threads")),
        ("update-bn model.safetensors --model BUILD --data DATA", ("--limit",)),
        (
            "train",
            (
                "--epochs",
                "--cycle-epochs",
                "--seeds",
                "--shift",
                "--batch-size",
                "--threads",
                "--jobs",
            ),
        ),
    )
    for flag in flags
    for value in ("2.5", "x", "1e3")
]


def arguments(line):
    names = {"BUILD": "for_options:build", "DATA": "for_options:data", "ALL": "step-*.safetensors"}
    return [names.get(word, word) for word in shlex.split(line)]


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line, there, capsys):
    before = {path.name for path in there.iterdir()}
    assert run(arguments(line)) in (1, 2)
    shown = capsys.readouterr()
    written = " ".join(shown.err.split())
    assert "Traceback" not in written
    if not line.startswith("average"):  # which first says which inputs count
        assert not shown.out, "a refusal comes before anything is said"
    assert (there / "there.html").read_text() == (there / "there.png").read_text() == "mine"
    assert re.search(REFUSED[line], written), written
    assert {path.name for path in there.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("line", FILES)
def test_a_slash_names_a_folder(line, there, capsys):
    option, name = FILES[line]
    with pytest.raises(SystemExit) as stop:
        run([*arguments(line), option, f"{name}/"])
    assert stop.value.code == 2
    assert "names a folder; expected the name" in " ".join(capsys.readouterr().err.split())
    assert not (there / name).exists()


def test_every_whole_number_is_read_as_one():
    commands = [app[name] for name in app if not name.startswith("-")]
    commands += [app["landscape"][name] for name in app["landscape"] if not name.startswith("-")]
    read = {
        argument.name: argument.parameter.converter
        for command in commands
        if command.default_command is not None
        for argument in command.assemble_argument_collection()
        if argument.hint in (int, int | None, "int", "int | None")
    }
    assert len(read) > 20
    assert {name for name, converter in read.items() if converter is not whole_number} == set()


@pytest.mark.parametrize("line", NOT_NUMBERS)
def test_not_a_whole_number(line, capsys):
    with pytest.raises(SystemExit) as stop:
        run(arguments(line))
    assert stop.value.code == 2
    assert "is not a whole number" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("flags", "left"), [("--last 99", 4), ("--last 5 --every 200", 2)])
def test_fewer_than_asked_for_is_said(flags, left, capsys):
    assert run(arguments(f"average ALL -o out.safetensors {flags}")) == 0
    said = capsys.readouterr().out
    assert f"Note: --last {flags.split()[1]}, but only {left} checkpoints are there." in said
    assert run(arguments("average ALL -o other.safetensors --last 4")) == 0
    assert "Note" not in capsys.readouterr().out


def test_what_is_excluded_is_that_of_the_newest():
    assert run(arguments("average ALL -o out.safetensors --exclude w")) == 0
    assert load_file("out.safetensors")["w"][0] == 400


def test_one_file_is_converted_whatever_is_left_out():
    assert run(arguments("average step-100.safetensors -o out.safetensors --exclude '*'")) == 0
    assert load_file("out.safetensors")["w"][0] == 100


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        ("--seeds 1 --first-seed 100", range(100, 101)),
        ("--seeds 3:5", range(3, 5)),
    ],
)
def test_the_seeds_of_a_run(flags, seeds, there):
    size = "--quick --arms sgd --batch-size 2000 --epochs 1 --record-intervals 0 --output out"
    assert run(["train", "taught", *size.split(), *flags.split()]) == 0
    assert Run(there / "out").recipe.all_seeds == seeds
    assert {final["seed"] for final in Run(there / "out").finals()} == set(seeds)


def test_a_cycle_that_does_not_end_is_said(capsys):
    assert run(["schedule", "cyclic:high=0.1,low=0.01,cycle=30,steps=9"]) == 0
    assert "no cycle of CyclicLinear" in capsys.readouterr().out
    assert run(["schedule", "cyclic:high=0.1,low=0.01,cycle=9,steps=9"]) == 0
    assert "no cycle" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "options", "shown"),
    [
        ("Leave out normalize=True.", {"normalize"}, "Leave out --normalize."),
        ("max_memory is 3; raise it.", {"max_memory"}, "--max-memory is 3; raise it."),
        ("my_file is 3 and max_memory 4.", {"max_memory"}, "my_file is 3 and --max-memory 4."),
        ("The last is 3.", {"last"}, "The last is 3."),
        ("run/max_memory_2.pt: no.", {"max_memory"}, "run/max_memory_2.pt: no."),
        ("Recipe field rate is 3.", {"rate"}, "--rate is 3."),
        ("Recipe field rate is 3.", set(), "Recipe field rate is 3."),
    ],
)
def test_keywords_become_flags(message, options, shown):
    assert with_flags(message, options) == shown
