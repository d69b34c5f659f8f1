"""Checks of averages in a Trainer with FSDP2, on real processes: each by name, in one launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from reference.ranks import become_rank, run_checks, whole
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import polyak
from polyak.errors import ArgumentError, MismatchError
from polyak.integrations.transformers import attach

EMA = polyak.EMA(decay=0.7)


def examples(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 16, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def language_model(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, **options))


def trainer_in(folder: Path, model: Any = None, *, kind: str = "FULL", **options: Any) -> Trainer:
    """The same data on both ranks. Accelerate shards on accelerators: it is told that it has some."""
    GradientState._reset_state()
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": f"{kind}_STATE_DICT",
        **options.pop("fsdp_config", {}),
    }
    basic = {
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 100,
    }
    arguments = TrainingArguments(
        str(folder), use_cpu=True, fsdp=True, fsdp_config=config, **(basic | options)
    )
    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(
        language_model() if model is None else model,
        arguments,
        train_dataset=examples(64),
        eval_dataset=examples(8, seed=1),
    )
    trainer.add_callback(ByHand())
    return trainer


class ByHand(TrainerCallback):
    """An EMA by hand, and what evaluation found."""

    def __init__(self) -> None:
        self.count, self.average, self.losses, self.expected = 0, {}, [], []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **objects: Any) -> None:
        self.count += 1
        share = 0.3 / (1 - 0.7**self.count)
        for name, value in model.state_dict().items():
            before = self.average.get(name, 0)
            self.average[name] = before + share * (whole(value) - before)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any, **objects: Any
    ) -> None:
        if "eval_loss" in metrics:
            self.losses.append(metrics["eval_loss"])
            self.expected.append(loss_of(self.average))


def loss_of(values: dict[str, torch.Tensor]) -> float:
    """The evaluation loss of these weights, in one process."""
    model = language_model()
    model.load_state_dict(values)
    model.eval()
    data = examples(8, seed=1)
    batch = {k: torch.stack([e[k] for e in data]) for k in data[0]}
    with torch.no_grad():
        return float(model(**batch).loss)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: whole(t) for n, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def averaged(average: polyak.Average) -> dict[str, torch.Tensor]:
    return {n: whole(t) for n, t in average.averaged_tensors().items()}


def evaluated_saved_and_resumed(folder: Path, kind: str, **options: Any) -> None:
    trainer = trainer_in(folder / "a", kind=kind, **options)
    handle = attach(trainer, EMA)
    trainer.train()
    assert handle.average.count == trainer.state.global_step == 6
    seen = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ByHand))
    assert len(seen.losses) == 3
    errors = [abs(a - b) for a, b in zip(seen.losses, seen.expected, strict=True)]
    assert max(errors) <= 1e-5, (seen.losses, seen.expected)
    held = averaged(handle.average)
    assert same(weights(trainer.model), held)  # after training the model holds the average
    last = folder / "a" / "checkpoint-6"
    loaded = LlamaForCausalLM.from_pretrained(last / "averaged")
    assert same(weights(loaded), held)
    assert (last / "averaged" / "generation_config.json").exists()
    assert not (last / "average.pt").exists()
    handle.restore()
    raw = weights(trainer.model)
    assert not same(raw, held)

    other = trainer_in(folder / "b", kind=kind, **options)
    second = attach(other, EMA)
    other.train(resume_from_checkpoint=str(folder / "a" / "checkpoint-2"))
    assert second.average.count == 6
    assert same(averaged(second.average), held)
    second.restore()
    assert same(weights(other.model), raw)


def check_full(folder: Path) -> None:
    evaluated_saved_and_resumed(folder, "FULL")


def check_sharded(folder: Path) -> None:
    config = {"reshard_after_forward": False, "activation_checkpointing": True}
    evaluated_saved_and_resumed(folder, "SHARDED", fsdp_config=config)


def check_the_best_and_a_second_training(folder: Path) -> None:
    trainer = trainer_in(
        folder, kind="SHARDED", load_best_model_at_end=True, save_total_limit=1, max_steps=8
    )
    handle = attach(trainer, {"ema": EMA, "swa": "swa"})
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert any("eval_swa_loss" in e for e in trainer.state.log_history)
    assert trainer.state.best_metric == min(losses)
    assert abs(loss_of(weights(trainer.model)) - min(losses)) <= 1e-5
    assert abs(trainer.evaluate()["eval_loss"] - min(losses)) <= 1e-6  # gathers the root
    first = handle.average
    trainer.args.max_steps = 2
    trainer.train()
    assert handle.average is not first
    assert handle.average["ema"].count == 2


def check_a_second_training_begins_where_the_first_one_ended(folder: Path) -> None:
    """Evaluations after training, which gather parameters, are not taken for writes."""

    class Began(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any, **objects: Any) -> None:
            self.weights = weights(model)

    trainer = trainer_in(folder, save_strategy="no", eval_strategy="no")
    trainer.add_callback(began := Began())
    handle = attach(trainer, EMA)
    trainer.train()
    trainer.evaluate()
    held = weights(trainer.model)
    handle.restore()
    ended = weights(trainer.model)
    handle.average.copy_to(trainer.model)  # by the user: from here on it is trained
    trainer.train()
    assert same(began.weights, held)
    assert not same(weights(trainer.model), ended)
    raw = averaged(handle._raw)
    trainer.evaluate()
    assert not all(hasattr(p, "placements") for p in trainer.model.parameters())
    trainer.train()
    assert same(began.weights, raw)


def check_adapters(folder: Path) -> None:
    for kind in ("FULL", "SHARDED"):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(language_model(), config)
        trainer = trainer_in(folder / kind, model, kind=kind, eval_strategy="no", max_steps=2)
        handle = attach(trainer, EMA)
        trainer.train()
        found = {n: t for n, t in averaged(handle.average).items() if "lora_" in n}
        saved = folder / kind / "checkpoint-2" / "averaged"
        assert {p.name for p in saved.iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert not (saved / "model.safetensors").exists()
        loaded = weights(PeftModel.from_pretrained(language_model(), saved))
        assert found
        assert all(torch.equal(loaded[n], t) for n, t in found.items())


def refused(kind: type[Exception], call: Any, *words: str) -> None:
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"{words}: not refused")


def check_bad_input(folder: Path) -> None:
    trainer = trainer_in(folder / "a", max_steps=2)
    attach(trainer, EMA)
    trainer.train()
    checkpoint = str(folder / "a" / "checkpoint-2")
    other = trainer_in(folder / "b")
    attach(other, "swa")
    refused(MismatchError, lambda: other.train(resume_from_checkpoint=checkpoint), "profile")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "a" / "checkpoint-2" / "average")
    dist.barrier()
    third = trainer_in(folder / "b")
    attach(third, EMA)
    refused(ArgumentError, lambda: third.train(resume_from_checkpoint=checkpoint), "no average")
    fourth = trainer_in(folder / "b", max_steps=4)
    handle = attach(fourth, EMA, missing="start")
    fourth.train(resume_from_checkpoint=checkpoint)
    assert handle.average.count == 2


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}


def run(rank: int, n_ranks: int, folder: str, port: int) -> None:
    """One rank: run the checks, and write what each has said."""
    become_rank(rank, n_ranks, port)
    dist.init_process_group("gloo")
    run_checks(CHECKS, Path(folder, f"{rank}.json"), Path(folder))
    dist.destroy_process_group()
