"""Scores: where they come from, and whether less or more is better."""

import pytest

from polyak.checkpoints.merging.scores import scores_for
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError


def test_scores_from_tables(tmp_path):
    checkpoints = [
        Checkpoint(f"run/step-{step}.pt", "torch", {}, (), step=step) for step in (1, 2, 3)
    ]
    (tmp_path / "s.csv").write_text("step,accuracy\n1,0.5\n2,nan\n3,0.75\n")
    assert scores_for(checkpoints, "accuracy", tmp_path / "s.csv") == {
        "run/step-1.pt": 0.5,
        "run/step-3.pt": 0.75,
    }
    (tmp_path / "s.jsonl").write_text('{"file": "step-2.pt", "nll": 2.5}\n{"other": 1}\n')
    assert scores_for(checkpoints, "nll", tmp_path / "s.jsonl") == {"run/step-2.pt": -2.5}
    (tmp_path / "bad.csv").write_text("step,accuracy\none,0.5\n")
    with pytest.raises(FormatError, match="expected numbers"):
        scores_for(checkpoints, "accuracy", tmp_path / "bad.csv")
    with pytest.raises(ArgumentError, match=r"Could not read the table .*Check the path"):
        scores_for(checkpoints, "accuracy", tmp_path / "none.csv")


def best(tmp_path, metric):
    """Which of two values of the metric is the better one."""
    table = tmp_path / "s.csv"
    table.write_text(f"step,{metric}\n1,-1.5\n2,2.5\n")
    checkpoints = [Checkpoint(f"step-{n}.pt", "torch", {}, (), step=n) for n in (1, 2)]
    scores = scores_for(checkpoints, metric, table)
    return "less" if scores["step-1.pt"] > scores["step-2.pt"] else "more"


@pytest.mark.parametrize(
    "metric",
    [
        "eval_loss", "valLoss", "val/NLL", "negative_log_likelihood", "neg_log_likelihood", "neg_elbo",
        "perplexity", "wer", "error_rate", "top1_error", "ce", "lpips", "fid", "-accuracy",
    ],
)  # fmt: skip
def test_less_is_better(tmp_path, metric):
    assert best(tmp_path, metric) == "less"


@pytest.mark.parametrize(
    "metric",
    [
        "val_accuracy", "evalAccuracy", "elbo", "log_likelihood", "neg_root_mean_squared_error",
        "rmse_neg", "val/negMSE", "neg_nll", "-loss", "mAP", "val_mAP50-95", "bleu4", "rougeL", "r2",
        "psnr", "accuracy_on_negatives",
    ],
)  # fmt: skip
def test_more_is_better(tmp_path, metric):
    assert best(tmp_path, metric) == "more"


@pytest.mark.parametrize(
    "metric",
    [
        "accuracy_loss", "loss_improvement", "one_minus_accuracy", "1-accuracy", "kl", "neg_loss",
        "neg_acc", "true_negative_rate", "brier_score", "loss_ratio", "learning_rate", "zeal",
    ],
)  # fmt: skip
def test_what_a_name_does_not_tell_is_asked(tmp_path, metric):
    with pytest.raises(ArgumentError, match=f"Write min:{metric} or max:{metric}"):
        best(tmp_path, metric)
