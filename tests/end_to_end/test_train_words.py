"""`polyak train words` as a user meets it: an own text, the page, side by side, resumed, refused."""

import re

import pytest

from polyak.cli import app as cli
from polyak.reference_run.run import Run
from polyak.reference_run.text import embedded_text
from polyak.report.tables import Finals

SMALL = [
    "--epochs", "8", "--epoch-size", "16", "--batch-size", "4", "--context", "8",
    "--record-intervals", "8", "--device", "cpu", "--threads", "1",
]  # fmt: skip


def polyak(*arguments):
    return cli.run([str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "own.txt").write_bytes(embedded_text()[:4000])
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run of two seeds on an own text, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        capture = []
        patch.setattr("rich.console.Console.print", _keeping(capture))
        assert polyak("train", "words", "--data", "own.txt", *SMALL, "--seeds", "2") == 0
    return Run(folder / "runs" / "words"), "\n".join(capture)


def _keeping(capture):
    from rich.console import Console

    printed = Console.print

    def keep(self, *objects, **options):
        with self.capture() as text:
            printed(self, *objects, **options)
        capture.append(text.get())

    return keep


def test_what_it_prints(finished):
    run, output = finished
    assert "44 epochs in all: 2 seeds of cosine, half, quarter, constant; 1 thread" in output
    assert re.search(
        r"seed 1 constant epoch   8/8  rate 0.0080  loss [\d.]+  validation: iterate [\d.]+, "
        r"EMA [\d.]+, power [\d.]+, SWA [\d.]+",
        output,
    )
    assert re.search(
        r"seed 0 cosine   WSM: test loss [\d.]+ nats per byte, next byte wrong", output
    )
    assert "On the test part of the text: mean ± standard error, 2 seeds" in output
    assert "Difference to cosine, paired by seed" in output
    assert "thousandths of a nat" in output
    assert "images" not in output
    assert max(map(len, output.splitlines())) <= 100 or "validation:" in output
    assert (run.recipe.name, run.recipe.data, run.is_finished()) == ("words", "own.txt", True)
    assert (run.folder / "swa.safetensors").exists()


def test_the_page(finished, monkeypatch, folder):
    monkeypatch.chdir(folder)  # where the text is
    run, _ = finished
    html = (run.folder / "report.html").read_text()
    finals = Finals(run.finals())
    for said in (
        "own.txt: 4,000 bytes, of which the first 3,600 are to train on",
        "a small decoder-only transformer",
        "8 epochs of 16 windows, 2 seeds",
        "with which the cosine run annealed in a quarter of the length ends is reached by the EMA",
        "Does averaging at a constant rate replace the decay here, at every length?",
        "Matrices rounded to 4 bits raise the loss",
        "Inside the decay, minus the cosine run",
        "losses in nats per byte of validation windows",
        "Loss over time",
        "and its loss is drawn across",
    ):
        assert said in html, said
    for wrong in ("images", "SGD", "BatchNorm", "Is it as right as it is sure", "surface around"):
        assert wrong not in re.sub(r"<(pre|style)>.*?</\1>", "", html, flags=re.DOTALL), wrong
    mean = finals.mean(("constant", "ema"), "nll").mean
    assert f"{mean:.3f}" in html
    assert (run.folder / "figures" / "budget.png").exists()
    assert polyak("report", run.folder, "-o", folder / "again.html") == 0
    verdict = re.compile(r'<p class="verdict">.*?</p>')
    assert verdict.findall((folder / "again.html").read_text()) == verdict.findall(html)


def test_side_by_side_ends_in_the_same_bits(finished, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run, _ = finished
    monkeypatch.setattr("polyak.cli.train_display._print_report", lambda *_: None)
    arguments = ("train", "words", "--data", "own.txt", *SMALL, "--seeds", "2", "-o", "beside")
    assert polyak(*arguments, "--jobs", "2") == 0
    names = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*.safetensors")}
    assert len(names) > 20
    for name in ("metrics.jsonl", *names):
        assert (folder / "beside" / name).read_bytes() == (run.folder / name).read_bytes(), name


def test_what_is_refused(finished, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_bytes(b"")
    for arguments, message in {
        ("--data", "empty.txt"): "empty.txt has 0 bytes",
        ("--data", "gone.txt"): "there is no such file",
        ("--data", "."): "not a file",
        ("--arms", "sgd", "swa"): "expected cosine, then any of half, quarter, constant",
        ("--flips",): "flips is for images",
        (
            "--resume",
            "--data",
            "own.txt",
            "--rate",
            "0.1",
            "-o",
            "runs/words",
        ): "The recipe differs",
    }.items():
        assert polyak("train", "words", *SMALL, *arguments) != 0
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["words"]
    assert polyak("train", "--data", "own.txt") != 0  # of the images
    assert "polyak train words --data own.txt" in " ".join(capsys.readouterr().err.split())


def test_runs_of_different_tasks_are_not_compared(finished, folder, tmp_path, capsys):
    from reference.tiny_run import make_run

    run, _ = finished
    images = make_run(tmp_path / "images")
    assert polyak("compare", run.folder, images, "-o", tmp_path / "page.html") != 0
    assert "different tasks (words: words, images: images)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "page.html").exists()


def test_two_runs_of_words_are_compared(finished, folder, tmp_path, monkeypatch, capsys):
    import shutil

    run, _ = finished
    monkeypatch.chdir(folder)
    shutil.copytree(run.folder, tmp_path / "other")
    assert polyak("compare", run.folder, tmp_path / "other", "-o", tmp_path / "page.html") == 0
    assert "words: in test loss" in (tmp_path / "page.html").read_text()
    assert "cosine, quarter length" in capsys.readouterr().out
