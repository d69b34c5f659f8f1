"""The adapter in the real Trainer: tiny models with random weights, compared bit for bit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import polyak
from polyak.errors import (
    ArgumentError,
    EmptyAverage,
    FormatError,
    MismatchError,
    PolyakWarning,
    UsageError,
)
from polyak.integrations.transformers import attach

# The frameworks' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*requires_grad=True.*"),
]
EMA = polyak.EMA(decay=0.7)


def examples(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 16, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def language_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, **options))


def arguments(folder, kind=TrainingArguments, **options):
    basic = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
    }
    return kind(str(folder), **{**basic, **options})


def trainer_in(folder, model=None, kind=Trainer, callbacks=None, eval_dataset=None, **options):
    given = {"model": model or language_model()} if "model_init" not in options else {}
    given |= {n: options.pop(n) for n in ("model_init", "compute_metrics") if n in options}
    return kind(
        **given,
        args=arguments(folder, **options),
        train_dataset=examples(),
        eval_dataset=eval_dataset or examples(8, seed=1),
        callbacks=callbacks,
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(values, model=None, data=None):
    """The evaluation loss of these weights, in a Trainer that knows nothing of averages."""
    model = copy.deepcopy(model) if model is not None else language_model()
    model.load_state_dict(values)
    model.eval()
    batch = {k: torch.stack([e[k] for e in data or examples(8, seed=1)]) for k in examples(1)[0]}
    with torch.no_grad():
        return model(**batch).loss.item()


class Recorder(TrainerCallback):
    """An EMA by hand, and what evaluation found."""

    def __init__(self, decay=0.7):
        self.decay, self.count, self.average = decay, 0, {}
        self.losses, self.expected, self.raw = [], [], []

    def on_step_end(self, args, state, control, model, **objects):
        self.count += 1
        share = (1 - self.decay) / (1 - self.decay**self.count)
        for name, value in model.named_parameters():
            before = self.average.get(name, torch.zeros_like(value)).detach()
            self.average[name] = before + share * (value.detach() - before)
        self.raw.append(weights(model))

    def on_evaluate(self, args, state, control, metrics, model, **objects):
        if "eval_loss" in metrics:
            self.losses.append(metrics["eval_loss"])
            self.expected.append(loss_of({**weights(model), **self.average}, model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One training with the average, one without; nobody changes what they left."""
    folder = tmp_path_factory.mktemp("run")
    recorder = Recorder()
    trainer = trainer_in(
        folder / "averaged", callbacks=[recorder], load_best_model_at_end=False, eval_on_start=True
    )
    handle = attach(trainer, EMA)
    trainer.train()
    plain = trainer_in(folder / "plain", eval_on_start=True)
    plain.train()
    return trainer, handle, recorder, plain


def test_every_optimizer_step_is_averaged_and_training_is_not_changed(finished):
    trainer, handle, recorder, plain = finished
    assert handle.average.count == trainer.state.global_step == 8
    assert same(recorder.raw[-1], weights(plain.model))


def test_evaluations_see_the_average(finished):
    _, _, recorder, plain = finished
    assert recorder.losses[1:] == pytest.approx(recorder.expected[1:], abs=1e-6)
    raw = [entry["eval_loss"] for entry in plain.state.log_history if "eval_loss" in entry]
    assert recorder.losses[0] == raw[0]  # before the first step there is none
    assert all(a != b for a, b in zip(recorder.losses[1:], raw[1:], strict=True))


def test_the_model_holds_the_average_after_training(finished):
    trainer, handle, recorder, _ = finished
    assert same(weights(trainer.model), handle.average.averaged_tensors())
    assert trainer.evaluate()["eval_loss"] == recorder.losses[-1]


def test_a_checkpoint_holds_both(finished):
    trainer, _, recorder, _ = finished
    for step in (2, 8):
        folder = f"{trainer.args.output_dir}/checkpoint-{step}"
        raw = LlamaForCausalLM.from_pretrained(folder)
        assert same(weights(raw), recorder.raw[step - 1])
        averaged = LlamaForCausalLM.from_pretrained(f"{folder}/averaged")
        assert loss_of(weights(averaged)) == pytest.approx(recorder.losses[step // 2], abs=1e-6)


def test_the_state_in_a_checkpoint_can_be_read_by_an_average(finished):
    trainer, _, _, _ = finished
    average = polyak.Average(language_model(), EMA)
    average.load(f"{trainer.args.output_dir}/checkpoint-8/average.pt")
    assert same(average.averaged_tensors(), weights(trainer.model))


def test_checkpoints_are_merged_as_before(finished, tmp_path):
    trainer, _, recorder, _ = finished
    steps = [f"{trainer.args.output_dir}/checkpoint-{step}" for step in (6, 8)]
    polyak.average_checkpoints(steps, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    expected = (recorder.raw[5]["lm_head.weight"] + recorder.raw[7]["lm_head.weight"]) / 2
    assert torch.allclose(merged.lm_head.weight, expected)


@pytest.mark.parametrize("profile", [EMA, polyak.SWA(), polyak.Window(5)], ids=str)
@pytest.mark.parametrize("step", [2, 3, 4])
def test_resume_is_bitwise(tmp_path, profile, step):
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 1}
    whole = trainer_in(tmp_path / "whole", **options)
    handle = attach(whole, profile, every=2)
    whole.train()
    again = trainer_in(tmp_path / "again", model=language_model(), **options)
    second = attach(again, profile, every=2)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert second.average.count == handle.average.count == 3
    assert same(weights(again.model), weights(whole.model))
    handle.restore(), second.restore()
    assert same(weights(again.model), weights(whole.model))
