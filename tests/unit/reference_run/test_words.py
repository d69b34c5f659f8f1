"""The task of words: its text and windows, the transformer, its averages, and what it refuses."""

import hashlib
import itertools
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polyak.errors import ArgumentError, FormatError
from polyak.reference_run import evaluation, text
from polyak.reference_run.arm import Arm, arm_schedule, build_optimizer
from polyak.reference_run.data import Split, load_data, permutation
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.loop import train
from polyak.reference_run.models import build_model
from polyak.reference_run.recipe import load_recipe, quick_version
from polyak.reference_run.transformer import TRANSFORMERS, Transformer

CPU = Hardware(torch.device("cpu"))


@pytest.fixture
def own_text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"the sea, the ship and the whale; " * 40 + bytes(range(256)))
    return path


@pytest.fixture
def words(own_text):
    """A run of a moment: 8 epochs of 2 steps."""
    small = {
        "epochs": 8,
        "epoch_size": 8,
        "batch_size": 4,
        "context": 8,
        "seeds": 1,
        "device": "cpu",
    }
    return load_recipe("words", small | {"record_intervals": 16, "data": str(own_text)})


def test_the_text_that_ships_is_checked(tmp_path, monkeypatch):
    content = text.embedded_text()
    assert hashlib.sha256(content).hexdigest() == text.EMBEDDED_TEXT_SHA256
    assert len(content) == 1_204_997
    for name, stored in {
        "other": lzma.compress(content[:-1]),
        "cut": b"\xfd7zXZ",
        "gone": None,
    }.items():
        path = tmp_path / name
        if stored is not None:
            path.write_bytes(stored)
        monkeypatch.setattr(text, "EMBEDDED_TEXT", path)
        with pytest.raises(FormatError, match="Reinstall polyak"):
            text.embedded_text()


def test_windows_are_contiguous_parts_and_the_bytes_that_follow():
    content = bytes(itertools.islice(itertools.cycle(range(251)), 3000))
    data = text.windows_of(content, 16, "it")
    for split, begin, end in (
        (data.train, 0, 2700), (data.validation, 2700, 2850), (data.test, 2850, 3000),
    ):  # fmt: skip
        part = torch.tensor(list(content[begin:end]), dtype=torch.uint8)
        assert torch.equal(split.inputs[:, 1:], split.labels[:, :-1])
        assert torch.equal(split.inputs[0], part[:16])
        assert torch.equal(split.labels[0], part[1:17])
    assert len(data.train) == 2700 - 16  # a window begins at any byte
    assert torch.equal(data.train.inputs[-1], torch.tensor(list(content[2683:2699])).byte())
    assert torch.equal(data.test.inputs.flatten(), torch.tensor(list(content[2850:2994])).byte())


def test_a_long_text_is_measured_on_windows_spread_evenly():
    content = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8).tobytes()
    data = text.windows_of(content, 64, "it")
    assert data.validation.labels.numel() == 1 << 14
    assert data.test.labels.numel() == 1 << 15
    part = np.frombuffer(content, np.uint8)[1_800_000:1_900_000]
    at = [part.tobytes().index(bytes(row.tolist())) for row in data.validation.inputs]
    assert set(np.diff(at)) <= {6 * 64, 7 * 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, .*expected 340 or more for windows of 16 bytes"),
        (b"a" * 339, "has 339 bytes"),
    ],
)
def test_a_text_that_is_too_short(tmp_path, content, message):
    path = tmp_path / "short.txt"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        text.load_text(str(path), 16)
    path.write_bytes(b"a" * 340)
    assert len(text.load_text(str(path), 16).validation) == 1


def test_what_is_not_a_text(tmp_path):
    with pytest.raises(ArgumentError, match="there is no such file"):
        text.load_text(str(tmp_path / "gone.txt"), 16)
    with pytest.raises(ArgumentError, match="which is not a file"):
        text.load_text(str(tmp_path), 16)
    unreadable = Path("/proc/self/mem")
    if unreadable.exists():
        with pytest.raises(FormatError, match="cannot be read"):
            text.load_text(str(unreadable), 16)


def test_the_digest_tells_texts_and_windows_apart():
    one = bytes(range(256)) * 4
    digests = [text.windows_of(c, n, "it").digest() for c in (one, one[:-1] + b"x") for n in (8, 9)]
    assert len(set(digests)) == 4
    assert digests[0] == text.windows_of(one, 8, "it").digest()


def test_an_epoch_of_drawn_examples():
    draws = [permutation(0, epoch, 1000, 64) for epoch in range(3)]
    assert all(
        len(set(draw.tolist())) == 64 and draw.min() >= 0 and draw.max() < 1000 for draw in draws
    )
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], permutation(0, 2, 1000, 64))
    assert len(permutation(0, 0, 1 << 40, 64)) == 64  # without numbers for all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flips": True}, "flips is for images, and the task is words"),
        ({"shift": 1, "batchnorm": True}, "shift and batchnorm are for images"),
        ({"data_folder": "x"}, "data_folder is for images"),
        ({"network": "wrn-16-4"}, "expected transformer or transformer-4x256"),
        (
            {"arms": ("sgd", "swa")},
            "expected cosine, then any of half, quarter, constant, .*recipe words",
        ),
        ({"arms": ("constant",)}, "expected cosine, then"),
        ({"averages": ("power",)}, "expected ema, then any of power, swa, wsm"),
        ({"averages": ("ema", "median")}, "expected ema, then"),
        ({"record_intervals": 0}, "averages has wsm, which is made from the record"),
        ({"epochs": 7}, "the arm quarter would have 1; it needs two"),
        ({"strategy": "fsdp"}, "strategy is 'fsdp', and the task is words"),
        ({"optimizer": "lion"}, "expected sgd or adamw"),
        ({"nesterov": True}, "nesterov needs a momentum of SGD"),
        ({"beta2": 1.0}, "beta2 is 1.0; expected 0 <= beta2 < 1"),
        ({"power_std": 0.3}, "power_std is 0.3"),
        ({"context": 0}, "context is 0"),
        ({"epoch_size": -1}, "epoch_size is -1"),
        ({"task": "sounds"}, "task is 'sounds'; expected images or words"),
        ({"branch_at": -0.5}, "branch_at is -0.5"),
        ({"branch_at": 0.5}, "branch_at is 0.5, where the arm cosine.* no longer has its rate"),
        ({"branch_at": 0.5, "constant_until": 0.25}, "Leave branch_at at 0 for a run of its own"),
    ],
)
def test_recipes_that_do_not_fit(fields, message):
    with pytest.raises(ArgumentError, match=message):
        load_recipe("words", fields)


def test_the_task_of_images_has_no_transformer():
    with pytest.raises(ArgumentError, match="network is 'transformer'; expected residual"):
        load_recipe("default", {"network": "transformer"})


def test_more_examples_than_there_are(words, tmp_path):
    with pytest.raises(
        ArgumentError, match=r"epoch_size is 5000, and there are 1.* training windows"
    ):
        train(load_recipe_like(words, epoch_size=5000), tmp_path / "run")
    with pytest.raises(
        ArgumentError, match="batch_size is 9, and there are 8 training windows in an epoch"
    ):
        train(load_recipe_like(words, batch_size=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def load_recipe_like(recipe, **fields):
    return type(recipe)(**{**vars(recipe), **fields})


def test_the_miniature():
    quick = quick_version(load_recipe("words"))
    assert (quick.epochs, quick.last_epoch("quarter"), quick.swa_epoch) == (8, 2, 7)


@pytest.mark.parametrize(
    ("name", "parameters"), [("transformer", 135_808), ("transformer-4x256", 3_297_792)]
)
def test_the_networks(name, parameters):
    """Counted by hand: embeddings, outputs, and for each block 12 width^2 and two normalisations."""
    torch.manual_seed(0)
    net = TRANSFORMERS[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters
    tokens = torch.randint(0, 256, (4, 64))
    logits = net(tokens)
    assert evaluation.loss_of(net, tokens, tokens).item() == pytest.approx(math.log(256), abs=0.1)
    changed = tokens.clone()
    changed[:, 40:] = 0
    assert torch.allclose(net(changed)[:, :40], logits[:, :40], atol=1e-6)  # nobody looks ahead
    assert not torch.allclose(net(changed)[:, 40:], logits[:, 40:], atol=1e-3)
    assert net(tokens[:, :5]).shape == (4, 5, 256)


def test_the_initialisation():
    torch.manual_seed(0)
    net = Transformer(width=128, depth=8)
    stds = {n: p.std().item() for n, p in net.named_parameters() if p.dim() > 1}
    for name, std in stds.items():
        added = name.endswith(("mix.weight", "back.weight"))
        assert std == pytest.approx(0.02 / 4 if added else 0.02, rel=0.05), name


def test_adamw_decays_matrices_only():
    recipe = load_recipe("words")
    net = Transformer()
    groups = build_optimizer(recipe, net).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {n: decay[id(p)] for n, p in net.named_parameters()} == {
        n: 0.1 if p.dim() > 1 else 0.0 for n, p in net.named_parameters()
    }
    assert groups[0]["betas"] == (0.9, 0.95)


def test_the_schedules():
    recipe = load_recipe("words")
    steps = 64
    cosine, half, quarter, constant = (arm_schedule(recipe, arm, steps) for arm in recipe.arms)
    assert [cosine(64), half(64), constant(64)] == pytest.approx([0.00795, 0.0078, 0.008], abs=5e-5)
    for schedule, epochs in ((cosine, 20), (half, 10), (quarter, 5)):
        middle = 0.008 * (1 + math.cos(math.pi * (epochs * steps - 32) / (epochs * steps))) / 2
        assert schedule(epochs * steps - 32) == pytest.approx(middle, rel=1e-6)
    assert {round(constant(step), 12) for step in range(64, 1280)} == {0.008}
    assert constant.averaging_points() == tuple(range(17 * 64, 20 * 64 + 1))
    assert cosine(0) == pytest.approx(0.008 / 64, rel=0.1)


def test_rounding_to_bits():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(300, 5), torch.nn.LayerNorm(5))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].weight[3] *= 1e-30
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for bits, levels in ((8, 127), (4, 7)):
        got = evaluation.rounded(net, bits)
        weight = before["0.weight"].double().numpy()
        step = np.abs(weight).max(axis=1, keepdims=True) / levels
        expected = np.round(weight / np.where(step == 0, 1, step)) * step
        assert np.allclose(got[0].weight.detach().numpy(), expected, rtol=1e-4, atol=0)
        assert torch.equal(got[0].bias, before["0.bias"])
        assert all(len(row.unique()) <= 2 * levels + 1 for row in got[0].weight)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_the_loss_of_windows_is_that_of_their_bytes(words):
    data = load_data(words)
    torch.manual_seed(0)
    model = build_model(words, data).eval()
    scores = evaluation.WindowLoss(data.validation)
    one = scores(model)
    assert one.shape == (len(data.validation),)
    record = evaluation.words_record(model, data, CPU)
    assert float(one.mean()) == pytest.approx(record["nll"], rel=1e-12)
    other = Split(data.validation.inputs, data.validation.labels ^ 1)
    assert scores.identity != evaluation.WindowLoss(other).identity


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_every_average_is_that_of_the_iterates(words, tmp_path, name):
    """Recomputed from the weights after every step; a record with an interval for each step loses nothing."""
    data = load_data(words)
    arm = Arm(words, data, CPU, seed=0, name=name, record=tmp_path / "record")
    iterates = []
    arm.optimizer.register_step_post_hook(
        lambda *_: iterates.append(arm.model.output.weight.detach().double().clone())
    )
    for epoch in range(words.epochs):
        arm.train_epoch(epoch)
    arm.close_record()
    age = np.arange(15, -1, -1)
    edges = np.clip((np.arange(17) - 14) / 2, 0, 1)  # from epoch 7 of 8 on
    gamma = 6.937  # of a relative standard deviation of 0.1
    weights = {
        "ema": 0.5 ** (age / 2) / (0.5 ** (age / 2)).sum(),
        "power": np.diff((np.arange(17) / 16) ** (gamma + 1)),
        "wsm": np.diff(np.sqrt(edges)),
        "swa": (np.arange(16) >= 14) / 2,
    }
    if name == "constant":  # also of the weights with which averaging begins
        weights["swa"] = (np.arange(16) >= 13) / 3
    assert arm.final_kinds() == [
        "iterate",
        *(k for k in ("ema", "power", "swa", "wsm") if k in weights),
    ]
    for kind, share in weights.items():
        with arm.weights_applied(kind) as model:
            got = model.output.weight.detach().double()
        expected = sum(s * w for s, w in zip(share, iterates, strict=True))
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6), kind


def test_a_run_leaves_every_average(words, tmp_path):
    run = train(words, tmp_path / "run")
    averages = ("iterate", "ema", "power", "swa", "wsm")
    assert [(f["arm"], f["weights"]) for f in run.finals()] == [
        *(("cosine", kind) for kind in averages),
        ("half", "iterate"),
        ("quarter", "iterate"),
        *(("constant", kind) for kind in averages),
    ]
    names = {path.name for path in (run.folder / "weights" / "seed-0").iterdir()}
    assert {"cosine-iterate.safetensors", "constant-average-power.safetensors"} <= names
    assert not any("sgd" in name for name in names)
    average = load_file(run.folder / "swa.safetensors")
    loaded = run.averaged_model()
    assert all(torch.equal(average[name], p) for name, p in loaded.state_dict().items())
    assert run.averaging_arm() == "constant"
    assert run.has_record(0, "cosine")
    assert not run.has_record(0, "half")


def wide(vocabulary, context):
    assert (vocabulary, context) == (256, 8)
    return torch.nn.Sequential(torch.nn.Embedding(256, 4), torch.nn.Linear(4, vocabulary))


def flat(vocabulary, context):
    return torch.nn.Sequential(
        torch.nn.Embedding(256, 4), torch.nn.Flatten(), torch.nn.Linear(32, 256)
    )


def test_a_custom_network(words, tmp_path):
    recipe = load_recipe_like(words, model=f"{__name__}:wide")
    assert train(recipe, tmp_path / "run").is_finished()
    with pytest.raises(
        ArgumentError, match=r"output \(2, 256\) for 2 windows; expected .*\(2, 8, 256\)"
    ):
        build_model(load_recipe_like(words, model=f"{__name__}:flat"), load_data(words))


def test_another_text_is_noticed_when_a_run_resumes(words, own_text, tmp_path):
    train(words, tmp_path / "run")
    own_text.write_bytes(own_text.read_bytes()[::-1])
    with pytest.raises(Exception, match="The data is not what this run began with"):
        train(words, tmp_path / "run", resume=True)
