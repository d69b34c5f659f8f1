"""`polyak report` and `polyak compare` as a user meets them."""

import pytest
from reference.tiny_run import make_run

from polyak.cli.app import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_report(folder, capsys):
    assert run(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert "Along random rays" in (folder / "report.html").read_text()
    assert (folder / "landscape.json").is_file()
    elsewhere = folder.parent / "page.html"
    assert run(["report", str(folder), "-o", str(elsewhere)]) == 0
    assert elsewhere.read_text() == (folder / "report.html").read_text()


def test_compare(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other = make_run(tmp_path / "other", arms=("sgd", "swa"), rate=0.05)
    page = tmp_path / "compare.html"
    assert run(["compare", str(folder), str(other), "-o", str(page)]) == 0
    out = capsys.readouterr().out
    assert "rate" in out
    assert "13.59 ± 0.05" in out
    assert page.is_file()
    assert run(["compare", str(folder), str(other), "--output", str(page)]) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "n_runs"), [("report", 1), ("compare", 2)])
def test_what_is_no_run_is_one_message(command, n_runs, tmp_path, capsys):
    assert run([command, *(str(tmp_path / name) for name in "ab"[:n_runs])]) == 2
    assert "is not a run" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["report"])
    assert stopped.value.code not in (0, None)
