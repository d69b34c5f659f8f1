"""The adapter in the real Trainer: tiny models with random weights, compared bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from accelerate.state import GradientState
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
    # The Trainer draws the order of the examples from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _language_model(**options)


def _language_model(**options):
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


def test_the_best_checkpoint_is_that_of_the_average(tmp_path):
    options = {"save_total_limit": 1, "load_best_model_at_end": True, "learning_rate": 0.3}
    trainer = trainer_in(tmp_path, num_train_epochs=3, **options)
    handle = attach(trainer, EMA)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert same(
        weights(LlamaForCausalLM.from_pretrained(f"{best}/averaged")), weights(trainer.model)
    )
    trainer.save_model(tmp_path / "final")
    final = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert same(weights(final), weights(trainer.model))
    handle.restore()
    assert same(weights(LlamaForCausalLM.from_pretrained(best)), weights(trainer.model))


@pytest.mark.parametrize("ends_with_best", [False, True])
def test_a_second_training_begins_where_the_first_one_ended(tmp_path, ends_with_best):
    ends = {"load_best_model_at_end": ends_with_best}
    plain, trainer = trainer_in(tmp_path / "a"), trainer_in(tmp_path / "b", **ends)
    handle = attach(trainer, EMA)
    plain.train(), trainer.train()
    if ends_with_best:
        plain._load_from_checkpoint(trainer.state.best_model_checkpoint)
    plain.train(), trainer.train()
    assert handle.average.count == 8
    handle.restore()
    if not ends_with_best:
        assert same(weights(trainer.model), weights(plain.model))


def test_what_was_loaded_between_two_trainings_is_trained(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=1)
    handle = attach(trainer, EMA)
    trainer.train()
    fresh = weights(language_model())
    trainer.model.load_state_dict(fresh)
    seen = []
    trainer.add_callback(Seen(seen))
    trainer.train()
    assert same(seen[0], fresh)
    assert handle.average.count == 1


def test_a_model_that_evaluation_converts_is_trained_again(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2, bf16_full_eval=True, optim="sgd")
    handle = attach(trainer, EMA)
    trainer.train()
    trainer.evaluate()
    assert trainer.model.dtype == torch.bfloat16
    trainer.train()
    assert handle.average.count == 2


def test_an_average_that_was_loaded_in_vain_is_forgotten(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2)
    handle = attach(trainer, EMA)
    trainer.train()
    again = trainer_in(tmp_path, max_steps=2)
    second = attach(again, EMA)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError):
        again.train(resume_from_checkpoint=True)
    again.train()
    assert second.average.count == handle.average.count == 2


class Seen(TrainerCallback):
    """The weights that a training begins with."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, args, state, control, model, **objects):
        self.seen.append(weights(model))


class Failing(TrainerCallback):
    """Fails once, in a step or in an evaluation."""

    def __init__(self, where, step):
        self.where, self.step = where, step

    def _fail(self, state, where):
        if where == self.where and state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **objects):
        self._fail(state, "step")

    def on_evaluate(self, args, state, control, **objects):
        self._fail(state, "evaluation")


@pytest.mark.parametrize("where", ["step", "evaluation"])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_crash_then_train(tmp_path, where, resumes):
    whole = trainer_in(tmp_path / "whole")
    reference = attach(whole, EMA)
    whole.train()
    trainer = trainer_in(tmp_path / "crashed", callbacks=[Failing(where, 4)])
    handle = attach(trainer, EMA)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    raw = weights(trainer.model)
    assert handle.average.count == 4
    assert not same(raw, handle.average.averaged_tensors())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        loss_of(handle.average.averaged_tensors()), abs=1e-6
    )
    assert same(weights(trainer.model), raw)
    trainer.optimizer.step()  # nobody listens any more
    assert handle.average.count == 4
    trainer.train(resume_from_checkpoint=resumes)
    assert handle.average.count == 8
    if resumes:
        assert same(weights(trainer.model), weights(whole.model))
        assert handle.average.time == reference.average.time


def test_several_evaluation_sets_and_several_profiles(tmp_path):
    sets = {"a": examples(8, seed=1), "b": examples(8, seed=2)}
    trainer = trainer_in(tmp_path, eval_dataset=sets, max_steps=4, save_steps=4)
    handle = attach(trainer, {"ema": EMA, "swa": "swa", "last": polyak.Window(1)})
    trainer.train()
    found = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    for name, infix in (("ema", ""), ("swa", "swa_"), ("last", "last_")):
        values = handle.average[name].averaged_tensors()
        for key, data in sets.items():
            expected = loss_of(values, data=data)
            assert found[f"eval_{infix}{key}_loss"] == pytest.approx(expected, abs=1e-6)
    assert same(weights(trainer.model), handle.average["ema"].averaged_tensors())
    assert "eval_swa_a_loss" not in trainer.evaluate()
    again = trainer_in(tmp_path, max_steps=6)
    second = attach(again, {"ema": EMA, "swa": "swa", "last": polyak.Window(1)})
    again.train(resume_from_checkpoint=True)
    assert [average.count for average in second.average.values()] == [6, 6, 6]


def test_prediction_sees_the_average(tmp_path):
    losses = []

    class Predicting(TrainerCallback):
        def on_step_end(self, args, state, control, **objects):
            losses.append(trainer.predict(examples(8, seed=1)).metrics["test_loss"])

    trainer = trainer_in(tmp_path, max_steps=3, callbacks=[Predicting()])
    handle = attach(trainer, EMA)
    assert trainer.evaluate()["eval_loss"] > 0  # before training: the model
    trainer.train()
    assert losses[-1] == pytest.approx(loss_of(handle.average.averaged_tensors()), abs=1e-6)


def test_a_model_that_is_made_for_each_training(tmp_path):
    trainer = trainer_in(tmp_path, model_init=lambda: language_model(), max_steps=2)
    handle = attach(trainer, EMA)
    for _ in range(2):
        trainer.train()
        assert handle.average.model is trainer.model
        assert handle.average.count == 2
        assert same(weights(trainer.model), handle.average.averaged_tensors())


def test_only_the_model_is_saved(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2, save_only_model=True)
    attach(trainer, EMA)
    trainer.train()
    found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "averaged" in found
    assert "average.pt" not in found


def test_averaging_that_starts_late(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=8, load_best_model_at_end=False)
    handle = attach(trainer, polyak.SWA(), start=0.6)
    recorder = Recorder()
    trainer.add_callback(recorder)
    stale = tmp_path / "checkpoint-2" / "averaged"
    stale.mkdir(parents=True)  # of a run before
    trainer.train()
    assert handle.average.count == 3  # after 5 of 8 steps
    expected = sum(one["lm_head.weight"] for one in recorder.raw[5:]) / 3
    assert torch.allclose(trainer.model.lm_head.weight, expected)
    assert not stale.exists()
    assert not (tmp_path / "checkpoint-4" / "averaged").exists()
    assert (tmp_path / "checkpoint-6" / "averaged").exists()
    again = trainer_in(tmp_path, max_steps=8)
    second = attach(again, polyak.SWA(), start=0.6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(again.model), weights(trainer.model))
    assert second.average.count == 3


def test_averaging_that_never_starts(tmp_path):
    trainer, plain = trainer_in(tmp_path / "a"), trainer_in(tmp_path / "b")
    attach(trainer, EMA, start=100)
    with pytest.warns(EmptyAverage, match="nothing was copied"):
        trainer.train()
    plain.train()
    assert same(weights(trainer.model), weights(plain.model))


def test_a_schedule_says_when(tmp_path):
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycles = polyak.schedules.CyclicLinear(high=0.2, low=0.1, cycle=2)
    lr = polyak.LRSchedule(optimizer, polyak.schedules.chain((8, cycles)))
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="no"),
        train_dataset=examples(),
        optimizers=(optimizer, lr),
    )
    handle = attach(trainer, polyak.SWA(), at=lr)
    trainer.train()
    points = lr.schedule.averaging_points(8)
    assert handle.average.count == len(points) > 3
    assert handle.average.unit == "captures"


def test_early_stopping_and_best_saves(tmp_path):
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_strategy": "best",
    }
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_in(
        tmp_path, num_train_epochs=20, callbacks=[stopping], learning_rate=0.5, **options
    )
    attach(trainer, EMA)
    trainer.train()
    assert trainer.state.global_step < 80
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"auto_find_batch_size": True},
        {"max_grad_norm": 0.0, "optim": "adafactor"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "gradient_accumulation_steps": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_arguments(tmp_path, options):
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        options = {n.replace("gradient_check", "activation_check"): v for n, v in options.items()}
    trainer = trainer_in(tmp_path, **options)
    handle = attach(trainer, EMA)
    trainer.train()
    assert handle.average.count == trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1]
    )


def test_tied_weights(tmp_path):
    trainer = trainer_in(tmp_path, model=language_model(tie_word_embeddings=True), max_steps=4)
    attach(trainer, EMA)
    trainer.train()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4" / "averaged")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same(weights(loaded), weights(trainer.model))


@pytest.mark.parametrize("resumes", [False, True])
def test_a_batch_size_that_was_too_large(tmp_path, resumes):
    class Small(Trainer):
        fails_at = 3

        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == self.fails_at:
                self.fails_at = None
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    options = {"auto_find_batch_size": True, "num_train_epochs": 1}
    if resumes:
        before = trainer_in(tmp_path, **options)
        attach(before, EMA)
        before.train()
    trainer = trainer_in(tmp_path, kind=Small, **options)
    handle = attach(trainer, EMA)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumes else None)
    assert trainer._train_batch_size < 4
    assert handle.average.count == trainer.state.global_step > 4


def test_sequences_that_are_generated(tmp_path):
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    trainer = Seq2SeqTrainer(
        model,
        arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            max_steps=4,
            generation_max_length=9,
        ),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=1),
        compute_metrics=lambda found: {"mean": float(found.predictions.mean())},
    )
    attach(trainer, EMA)
    trainer.train()
    last = [e for e in trainer.state.log_history if "eval_mean" in e][-1]
    after = trainer.evaluate(max_length=9)
    assert after["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)


class WithNorm(nn.Module):
    """A classifier with BatchNorm, as plain a module as the Trainer takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x, labels=None):
        logits = self.head(torch.relu(self.norm(self.stem(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.tensor(n % 2)}
        for n in range(count)
    ]


def norm_trainer(folder):
    return Trainer(
        WithNorm(), arguments(folder), train_dataset=points(16, 0), eval_dataset=points(8, 1)
    )


def test_statistics_are_measured_on_the_average_and_training_is_not_changed(tmp_path):
    plain, trainer = norm_trainer(tmp_path / "a"), norm_trainer(tmp_path / "b")
    handle = attach(trainer, polyak.SWA(), update_bn=2)
    plain.train(), trainer.train()
    expected = copy.deepcopy(trainer.model)
    data = torch.stack([p["x"] for p in points(16, 0)])
    polyak.update_bn(expected, [{"x": data, "labels": torch.zeros(16, dtype=int)}])
    assert torch.allclose(trainer.model.norm.running_mean, expected.norm.running_mean)
    assert torch.allclose(trainer.model.norm.running_var, expected.norm.running_var)
    handle.restore()
    assert same(weights(trainer.model), weights(plain.model))


def test_saving_within_an_evaluation_saves_the_weights_that_train(tmp_path):
    class Saving(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **objects):
            if state.global_step == 2:
                trainer._save_checkpoint(model, trial=None)

    recorder = Recorder()
    trainer = trainer_in(tmp_path, max_steps=3, save_steps=3, callbacks=[recorder, Saving()])
    attach(trainer, EMA)
    trainer.train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    averaged = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2" / "averaged")
    assert same(weights(saved), recorder.raw[1])
    assert loss_of(weights(averaged)) == pytest.approx(recorder.losses[0], abs=1e-6)


def test_copies_and_pickles_have_an_average_of_their_own(finished, tmp_path):
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        trainer = trainer_in(tmp_path, max_steps=2)
        handle = attach(trainer, EMA)
        # Accelerate keeps weak references to the loaders of interrupted trainings, which do not pickle.
        GradientState().dataloader_references = [None]
        other, second = copied([trainer, handle])
        other.train()
        assert second.average.count == 2
        assert second.average.model is other.model
        assert handle.average.count == 0
    after = copy.deepcopy(finished[0])
    assert after.evaluate()["eval_loss"] == finished[0].evaluate()["eval_loss"]


def test_removed(tmp_path):
    trainer, plain = trainer_in(tmp_path / "a"), trainer_in(tmp_path / "b")
    handle = attach(trainer, EMA)
    handle.remove(), handle.remove()
    assert trainer.__dict__.keys() == plain.__dict__.keys()
    trainer.train(), plain.train()
    assert same(weights(trainer.model), weights(plain.model))
    assert not (tmp_path / "a" / "checkpoint-2" / "averaged").exists()
    attach(trainer, EMA)


def test_bad_input(tmp_path):
    trainer = trainer_in(tmp_path)
    with pytest.raises(ArgumentError, match="found Linear"):
        attach(nn.Linear(1, 1), EMA)
    for options, message in (
        ({"start": 1.5}, "start is 1.5"),
        ({"start": -1}, "start is -1"),
        ({"every": 0}, "every is 0"),
        ({"update_bn": 0}, "update_bn is 0"),
        ({"missing": "skip"}, "missing is 'skip'"),
        ({"dtype": torch.float16}, "float16"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attach(trainer, EMA, **options)
    with pytest.raises(ArgumentError, match="eema"):
        attach(trainer, "eema:0.9")
    attach(trainer, EMA)
    with pytest.raises(UsageError, match="has an average already"):
        attach(trainer, EMA)


@pytest.mark.parametrize("name", ["_load_best_model", "_load_from_checkpoint"])
def test_a_framework_without_a_method(tmp_path, name, monkeypatch):
    trainer = trainer_in(tmp_path)
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(UsageError, match=f"{transformers.__version__} has no Trainer.{name}"):
        attach(trainer, EMA)


@pytest.mark.parametrize("mark", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_training_is_refused(tmp_path, mark):
    trainer = trainer_in(tmp_path)
    setattr(trainer, mark, True)
    advice = "'version': 2.*or average the" if mark == "is_fsdp_enabled" else "Average the"
    with pytest.raises(ArgumentError, match=f"{advice} checkpoints"):
        attach(trainer, EMA)


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    source = f"{finished[0].args.output_dir}/checkpoint-4"
    shutil.copytree(source, tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "average.pt"
    trainer = trainer_in(tmp_path)
    before = weights(trainer.model)
    handle = attach(trainer, polyak.SWA())
    with pytest.raises(MismatchError, match=r"average.pt: .*\n.*profile"):
        trainer.train(resume_from_checkpoint=True)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(FormatError, match="damaged"):
        trainer.train(resume_from_checkpoint=True)
    file.unlink()
    with pytest.raises(ArgumentError, match="holds no average"):
        trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer.model), before)
    handle.remove()
    handle = attach(trainer, polyak.SWA(), missing="start", start=6)
    trainer.train(resume_from_checkpoint=True)
    assert handle.average.count == 2
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_an_average_that_is_not_finite_stays_out_of_the_model(tmp_path):
    class Spoiling(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **objects):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[0] = float("nan")

    trainer = trainer_in(tmp_path, max_steps=3, callbacks=[Spoiling()], eval_strategy="no")
    attach(trainer, EMA, before_next_step=True)
    with pytest.warns(PolyakWarning, match="which keeps its own weights"):
        assert trainer.train().global_step == 3


DDP = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_transformers import *
def run(folder, resume=None):
    trainer = trainer_in(folder, ddp_backend="gloo", num_train_epochs=2, save_steps=1, eval_steps=1)
    handle = attach(trainer, EMA)
    trainer.train(resume_from_checkpoint=resume)
    assert handle.average.count == trainer.state.global_step == 4
    return trainer, weights(trainer.model)
trainer, whole = run({folder!r} + "/a")
assert trainer.args.world_size == 2
_, again = run({folder!r} + "/b", {folder!r} + "/a/checkpoint-2")
flat = torch.cat([value.flatten() for value in whole.values()])
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(*both), "ranks"
assert same(whole, again), "resume"
saved = weights(LlamaForCausalLM.from_pretrained({folder!r} + "/a/checkpoint-4/averaged"))
assert same(saved, whole)
last = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1]
assert abs(last - loss_of(whole)) < 1e-5, (last, loss_of(whole))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "run.py"
    tests = os.path.dirname(__file__)  # noqa: PTH120
    script.write_text(textwrap.dedent(DDP.format(tests=tests, folder=str(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
