"""`average_checkpoints`: what is averaged, what is not, what is written, what is refused."""

import json

import pytest
import torch
from reference.merging import stored_checkpoints, weighted_sum, within_bound
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import polyak
from polyak.checkpoints.merging.average import average_checkpoints, iter_averaged_tensors
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.prepare import prepared
from polyak.checkpoints.merging.rules import WeightedSum
from polyak.checkpoints.merging.weights import OutputWeights
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.errors import (
    ArgumentError,
    FormatError,
    MismatchError,
    OutputError,
    PolyakError,
    StaleStatistics,
)
from polyak.maths.profiles import EMA, Window

ANY = torch.Generator().manual_seed(0)


def random_state(dtype=torch.float32, **more):
    return {
        "a.weight": torch.randn(17, 5, generator=ANY).to(dtype),
        "a.bias": torch.randn(17, generator=ANY).to(dtype),
        "scalar": torch.randn((), generator=ANY).to(dtype),
        "empty": torch.empty(3, 0, dtype=dtype),
        **more,
    }


def merged(paths, folder, how="swa", **options):
    target = folder / "out.safetensors"
    average_checkpoints(paths, {target: how}, overwrite=True, **options)
    return load_file(target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3], [1.5, -1.0, 0.5]])
def test_against_float64(tmp_path, dtype, weights):
    states = [random_state(dtype) for _ in range(3)]
    paths = stored_checkpoints(tmp_path, states)
    found = merged(paths, tmp_path, weights or "swa")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in states[0].items()
    }
    assert within_bound(found, states, weights or [1 / 3] * 3)


def test_complex_values_are_pairs(tmp_path):
    states = [{"c": torch.randn(9, dtype=torch.complex64)} for _ in range(2)]
    found = merged(stored_checkpoints(tmp_path, states), tmp_path)
    torch.testing.assert_close(found["c"], (states[0]["c"] + states[1]["c"]) / 2)


def test_integers_and_masks_come_from_the_newest(tmp_path):
    states = [
        random_state(
            steps=torch.tensor(i), mask=torch.tensor([i > 1, True]), ids=torch.arange(i, i + 4)
        )
        for i in range(3)
    ]
    paths = stored_checkpoints(tmp_path, states)
    found = merged([paths[2], paths[0], paths[1]], tmp_path)  # whatever the order of the call
    for name in ("steps", "mask", "ids"):
        assert torch.equal(found[name], states[2][name])


def test_batchnorm_statistics_are_the_newest_and_stale(tmp_path):
    states = [random_state(**batch_norm(i)) for i in range(3)]
    paths = stored_checkpoints(tmp_path, states)
    with pytest.warns(StaleStatistics, match="polyak update-bn"):
        found = merged(paths, tmp_path)
    with pytest.warns(StaleStatistics, match=r"update-bn '.*/my model/model\.safetensors' --model"):
        average_checkpoints(paths, {tmp_path / "my model": "swa"})
    assert torch.equal(found["bn.running_var"], states[2]["bn.running_var"])
    torch.testing.assert_close(found["bn.weight"], torch.full((3,), 1.0))
    assert metadata(tmp_path / "out.safetensors")["batchnorm"] == "stale"
    merged(paths[:1], tmp_path)  # a conversion keeps what belongs together: no warning
    assert metadata(tmp_path / "out.safetensors")["batchnorm"] == "refreshed"


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_vectors_of_spectral_norm_are_the_newest(tmp_path, normed):
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = nn.Sequential(normed(nn.Linear(5, 4)))
        layer.register_buffer("scale_u", torch.full((2,), float(seed)))
        states.append(layer.state_dict())
    found = merged(stored_checkpoints(tmp_path, states), tmp_path)
    vectors = [name for name in found if name.endswith(("_u", "_v")) and name != "scale_u"]
    assert len(vectors) == 2
    for name in vectors:
        assert torch.equal(found[name], states[2][name])
    assert torch.equal(found["scale_u"], torch.ones(2))  # a name alone does not make it one


def test_factors_of_low_rank_that_are_called_like_vectors_are_averaged(tmp_path):
    names = ["layer.parametrizations.weight.0._u", "layer.parametrizations.weight.0._v"]
    states = [{name: torch.full((3, 2), float(i)) for name in names} for i in (1, 2)]
    found = merged(stored_checkpoints(tmp_path, states), tmp_path)
    assert all(torch.equal(found[name], torch.full((3, 2), 1.5)) for name in names)


@pytest.mark.parametrize(
    "names", [("running_mean", "running_var"), ("moving_mean", "moving_variance")]
)
def test_batchnorm_statistics_without_a_counter(tmp_path, names):
    """They are statistics where they differ, and where they are equal the constants of a frozen layer."""
    states = [
        {"bn.weight": torch.ones(3) * i, **{f"bn.{n}": torch.ones(3) * i for n in names}}
        for i in (1, 2)
    ]
    states[0]["frozen.running_mean"] = states[1]["frozen.running_mean"] = torch.ones(3)
    paths = stored_checkpoints(tmp_path, states)
    with pytest.warns(StaleStatistics):
        found = merged(paths, tmp_path)
    assert all(torch.equal(found[f"bn.{n}"], states[1][f"bn.{n}"]) for n in names)
    assert metadata(tmp_path / "out.safetensors")["batchnorm"] == "stale"
    average_checkpoints([tmp_path / "out.safetensors"], tmp_path / "copy.safetensors")
    assert metadata(tmp_path / "copy.safetensors")["batchnorm"] == "stale"
    for state in states:
        state.update({f"bn.{n}": torch.ones(3) for n in names})
    merged(stored_checkpoints(tmp_path, states), tmp_path)
    assert metadata(tmp_path / "out.safetensors")["batchnorm"] == "none"


def batch_norm(i):
    return {
        "bn.weight": torch.full((3,), float(i)),
        "bn.running_mean": torch.full((3,), float(i)),
        "bn.running_var": torch.full((3,), float(i) + 1),
        "bn.num_batches_tracked": torch.tensor(i),
    }


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_what_is_equal_everywhere_stays_bitwise_what_it_was(tmp_path):
    frozen = torch.randn(1000, generator=ANY)
    paths = stored_checkpoints(tmp_path, [random_state(frozen=frozen) for _ in range(7)])
    for how in ("swa", "ema:half_life=150", "power:std=0.1"):
        assert torch.equal(merged(paths, tmp_path, how)["frozen"], frozen)


def test_several_outputs_equal_single_ones(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state(torch.bfloat16) for _ in range(4)])
    hows = {
        "swa": "swa",
        "ema": EMA.from_half_life(150),
        "weights": [2, -1, 0, 0],
        "window": Window(200),
    }
    together = {tmp_path / f"{name}.safetensors": how for name, how in hows.items()}
    average_checkpoints(paths, together)
    for name, how in hows.items():
        alone = tmp_path / "alone.safetensors"
        average_checkpoints(paths, {alone: how}, overwrite=True)
        assert alone.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()


def test_equals_the_average_kept_while_training(tmp_path):
    model = torch.nn.Linear(20, 20)
    average = polyak.Average(model, polyak.Window(3), unit="steps")
    paths = []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(torch.randn(20, 20, generator=ANY))
        average.update()
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file(model.state_dict(), paths[-1])
    found = merged(paths, tmp_path, "window:length=3")
    for name, tensor in average.averaged_tensors().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_file_says_what_it_is_made_of(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(3)])
    target = tmp_path / "out.safetensors"
    done = average_checkpoints(paths, {target: "window:length=200"})
    said = metadata(target)
    assert said["polyak"] == polyak.__version__
    assert (said["profile"], said["unit"], said["time"]) == ("Window(length=200.0)", "steps", "300")
    assert (said["count"], said["batchnorm"], said["format"]) == ("2", "none", "pt")
    inputs = json.loads(said["inputs"])
    assert [one["weight"] for one in inputs] == [0.0, 0.5, 0.5]
    assert [one["step"] for one in inputs] == [100, 200, 300]
    assert inputs[0]["bytes"] == paths[0].stat().st_size
    assert done.weights[0].effective_samples == 2
    assert open_checkpoint(target).step == 300


def test_files_that_do_not_count_are_not_read(tmp_path):
    states = [random_state() for _ in range(3)]
    states[0]["a.bias"][3] = float("nan")
    paths = stored_checkpoints(tmp_path, states)
    assert merged(paths, tmp_path, "window:length=100")["a.bias"].isfinite().all()


def test_delta_averaging_on_a_base(tmp_path):
    base, *states = (random_state() for _ in range(4))
    [base_path] = stored_checkpoints(tmp_path, [base], [7])
    paths = stored_checkpoints(tmp_path, states)
    found = merged(paths, tmp_path, [0.5, 0.5, 0.7], base=base_path)
    expected = weighted_sum([base, *states], [1 - 1.7, 0.5, 0.5, 0.7])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert metadata(tmp_path / "out.safetensors")["base"] == str(base_path)
    with pytest.raises(ArgumentError, match="cancel out"):
        merged(paths, tmp_path, "swa", base=base_path)


def test_include_and_exclude(tmp_path):
    states = [random_state() for _ in range(2)]
    paths = stored_checkpoints(tmp_path, states)
    found = merged(paths, tmp_path, include=["a.*"], exclude=["*.bias"])
    assert torch.equal(found["a.bias"], states[1]["a.bias"])
    assert torch.equal(found["scalar"], states[1]["scalar"])
    torch.testing.assert_close(
        found["a.weight"], (states[0]["a.weight"] + states[1]["a.weight"]) / 2
    )
    with pytest.raises(ArgumentError, match=r"exclude pattern 'b\.\*' fits no tensor"):
        merged(paths, tmp_path, exclude=["b.*"])


def test_what_only_older_ones_hold_can_be_excluded(tmp_path):
    states = [random_state(old=torch.ones(2)), random_state()]
    paths = stored_checkpoints(tmp_path, states)
    with pytest.raises(MismatchError, match="unexpected"):
        merged(paths, tmp_path)
    for options in ({"exclude": ["old"]}, {"include": ["a.*"]}):
        assert merged(paths, tmp_path, **options).keys() == states[1].keys()


def test_another_dtype(tmp_path):
    states = [random_state(steps=torch.tensor(i)) for i in range(2)]
    paths = stored_checkpoints(tmp_path, states)
    found = merged(paths, tmp_path, dtype="bfloat16", exclude=["scalar"])
    assert {t.dtype for n, t in found.items() if n != "steps"} == {torch.bfloat16}
    assert found["steps"].dtype == torch.int64
    one = merged(paths[:1], tmp_path, dtype=torch.float16)
    assert torch.equal(one["a.weight"], states[0]["a.weight"].half())
    with pytest.raises(ArgumentError, match="dtype is 'int8'"):
        merged(paths, tmp_path, dtype="int8")


def test_ties_are_written_once(tmp_path):
    paths = []
    for step in (100, 200):
        weight = torch.full((4, 2), float(step))
        paths.append(tmp_path / f"step-{step}.pt")
        torch.save(
            {"head.weight": weight, "embed.weight": weight, "bias": torch.ones(2)}, paths[-1]
        )
    found = merged(paths, tmp_path)
    assert sorted(found) == ["bias", "embed.weight"]
    with open_checkpoint(tmp_path / "out.safetensors") as written:
        assert written.ties == {"head.weight": "embed.weight"}
    average_checkpoints(paths, {tmp_path / "out.pt": "swa"})
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert state["head.weight"].unique().tolist() == [150.0]


def test_tied_in_one_and_separate_in_another(tmp_path):
    weight = torch.ones(2, 2)
    torch.save({"x": weight, "y": weight}, tmp_path / "step-1.pt")
    torch.save({"x": weight, "y": weight.clone()}, tmp_path / "step-2.pt")
    paths = [tmp_path / "step-1.pt", tmp_path / "step-2.pt"]
    with pytest.raises(MismatchError, match="tied to x here, separate in the newest"):
        merged(paths, tmp_path)


def test_all_mismatches_at_once_and_nothing_written(tmp_path):
    one = {"a": torch.ones(2), "b": torch.ones(2), "gone": torch.ones(1), "d": torch.ones(2)}
    two = {"a": torch.ones(3), "b": torch.ones(2).half(), "new": torch.ones(1), "d": torch.ones(2)}
    paths = stored_checkpoints(tmp_path, [one, two])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MismatchError) as caught:
        merged(paths, tmp_path)
    text = str(caught.value)
    for part in (
        "missing (1): new (in",
        "unexpected (1): gone (in",
        "F32 [2]; expected F32 [3]",
        "F32 [2]; expected F16",
    ):
        assert part in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float64", "float16")])
def test_checkpoints_of_other_dtypes_are_averaged_as_the_message_says(tmp_path, dtypes):
    states = [{"w": torch.ones(2, dtype=getattr(torch, dtype))} for dtype in dtypes]
    first, second = stored_checkpoints(tmp_path, states)
    with pytest.raises(MismatchError, match="average it alone and pass dtype=float32"):
        merged([first, second], tmp_path)
    converted = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, target in zip((first, second), converted, strict=True):
        average_checkpoints([path], target, dtype="float32")
    average_checkpoints(converted, tmp_path / "mean.safetensors")
    assert load_file(tmp_path / "mean.safetensors")["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.qweight": torch.ones(4, 4, dtype=torch.int32), "l.scales": torch.ones(4)},
        {"l.weight": torch.ones(4, 4, dtype=torch.uint8), "l.absmax": torch.ones(4)},
        {"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1)},
    ],
)
def test_quantised_tensors_are_refused_by_name(tmp_path, tensors):
    paths = stored_checkpoints(tmp_path, [tensors, tensors])
    with pytest.raises(FormatError, match=r"quantised: .*l\.q?weight"):
        merged(paths, tmp_path)
    merged(paths[:1], tmp_path)  # carried over as it is


def test_weights_must_fit(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    for weights, message in [
        ([0.5, 0.6], r"sum to 1\.1, not to 1.*normalize"),
        ([1.0], "1 weights for 2 inputs"),
        ([0.0, 0.0], "not all zero"),
        ([float("nan"), 1], "finite"),
        ([1e308, 1e308], r"1e\+308 in size.*normalize"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            merged(paths, tmp_path, weights)
    for coefficients in [(1.0, -1e40), (1e-200, 1e-300)]:
        with pytest.raises(ArgumentError, match="in size; expected"):
            OutputWeights(coefficients)


@pytest.mark.parametrize("scale", [1.0, 4e307, 5e-324])
def test_weights_of_any_size_are_normalised(tmp_path, scale):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    merged(paths, tmp_path, [scale, 3 * scale], normalize=True)
    assert [
        one["weight"] for one in json.loads(metadata(tmp_path / "out.safetensors")["inputs"])
    ] == [0.25, 0.75]


def test_one_output_needs_no_mapping(tmp_path):
    states = [{"w": torch.tensor([float(i)])} for i in (1, 2, 6)]
    paths = stored_checkpoints(tmp_path, states)
    for method, expected in [
        (None, 3.0),
        ("window:length=200", 4.0),
        (Window(100), 6.0),
        ([0, 1, 0], 2.0),
    ]:
        options = {} if method is None else {"method": method}
        average_checkpoints(paths, str(tmp_path / "out.safetensors"), overwrite=True, **options)
        assert load_file(tmp_path / "out.safetensors")["w"].item() == expected


@pytest.mark.parametrize(
    "coefficients", [(1.0, -1.0, 0.0), (0.5, 0.25, 0.1), (2.0, 1.0, 1.0), (-0.3, 0.0, -0.4)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coefficients_are_used_as_they_are(tmp_path, dtype, coefficients):
    states = [random_state(dtype, **batch_norm(i), n=torch.tensor(i)) for i in range(3)]
    paths = stored_checkpoints(tmp_path, states)
    label = OutputWeights(coefficients, label="a difference")
    outputs = {tmp_path / "out.safetensors": label, tmp_path / "mean.safetensors": "swa"}
    with pytest.warns(StaleStatistics):
        done = average_checkpoints([paths[2], paths[0], paths[1]], outputs)
    ordered = (*coefficients[1:], coefficients[0])  # the call gave the newest first
    assert done.weights[0].coefficients == ordered
    found = load_file(tmp_path / "out.safetensors")
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "n"):
        assert torch.equal(found.pop(name), states[2][name])
    assert within_bound(found, states, ordered)
    assert metadata(tmp_path / "out.safetensors")["profile"] == "a difference"


def test_a_single_checkpoint_can_be_scaled(tmp_path):
    paths = stored_checkpoints(tmp_path, [{"w": torch.tensor([3.0]), "n": torch.tensor(3)}])
    assert merged(paths, tmp_path, OutputWeights((-0.5,)))["w"].item() == -1.5
    assert merged(paths, tmp_path, OutputWeights((1.0,)))["w"].item() == 3.0
    streamed = dict(iter_averaged_tensors(paths, OutputWeights((2.0,))))
    assert (streamed["w"].item(), streamed["n"].item()) == (6.0, 3)


def test_coefficients_that_cannot_be(tmp_path):
    for wrong in ((float("nan"), 1.0), (float("inf"),), (0.0, 0.0), ()):
        with pytest.raises(ArgumentError, match="finite numbers, not all zero"):
            OutputWeights(wrong)
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    with pytest.raises(ArgumentError, match="3 weights for 2 inputs"):
        merged(paths, tmp_path, OutputWeights((1.0, -1.0, 1.0)))


def test_weights_follow_their_inputs_into_the_order_of_steps(tmp_path):
    states = [{"w": torch.tensor([float(i)])} for i in (1, 10)]
    old, new = stored_checkpoints(tmp_path, states)
    assert merged([new, old], tmp_path, [0.75, 0.25])["w"].item() == pytest.approx(7.75)


def test_steps_are_needed_for_a_length(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(ArgumentError, match="is measured in training steps, but the step of"):
        merged(paths, tmp_path, "window:length=100")
    merged(paths, tmp_path, "power:std=0.1")
    assert metadata(tmp_path / "out.safetensors")["unit"] == "captures"


def test_wrong_calls(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    out = tmp_path / "x.safetensors"
    for call, message in [
        (lambda: average_checkpoints([], {out: "swa"}), "no input"),
        (lambda: average_checkpoints(paths, {}), "no output"),
        (lambda: average_checkpoints([*paths, paths[0]], {out: "swa"}), "Given twice"),
        (lambda: average_checkpoints(paths, {paths[0]: "swa"}), "is an input"),
        (lambda: average_checkpoints(str(paths[0]), {out: "swa"}), "inputs is one path"),
        (lambda: average_checkpoints(paths[0], {out: "swa"}), "inputs is one path"),
        (lambda: dict(iter_averaged_tensors(str(paths[0]), "swa")), "inputs is one path"),
        (
            lambda: average_checkpoints(paths, [out]),
            "expected one path, or a mapping of path to method",
        ),
        (lambda: average_checkpoints(paths, {out: "swa"}, method="swa"), "names a method per path"),
        (lambda: average_checkpoints(paths, {out: polyak.SWA}), "expected a profile like"),
        (lambda: average_checkpoints(paths, {out: ["a", 1]}), "expected a profile like"),
        (lambda: average_checkpoints(paths, {".": "swa"}), "names no file"),
        (lambda: average_checkpoints(paths, {tmp_path / "x.gguf": "swa"}), "suffix"),
        (lambda: average_checkpoints(paths, {out: "mean"}), "Unknown method"),
        (
            lambda: average_checkpoints(paths, {out: "swa"}, max_memory="1KB"),
            "one thread needs",
        ),
        (lambda: average_checkpoints(paths, {out: "swa"}, threads=0), "threads is 0"),
        (lambda: average_checkpoints(paths, {out: "swa"}, part="5/4"), "part is '5/4'"),
        (lambda: average_checkpoints([tmp_path / "none.pt"], {out: "swa"}), "no file"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(TypeError, match="speed"):
        average_checkpoints(paths, {out: "swa"}, speed=9)
    assert not out.exists()


def test_no_output_takes_the_place_of_an_input(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    folder = tmp_path / "run"
    (folder / "inner").mkdir(parents=True)
    inside = [path.rename(folder / "inner" / path.name) for path in paths]
    before = sorted(folder.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(folder)
    for inputs, target in [
        (inside, folder),
        (inside, folder / "inner"),
        ([link / "inner" / path.name for path in inside], folder),
        ([folder / "inner"], inside[0]),
    ]:
        with pytest.raises(PolyakError):
            average_checkpoints(inputs, {target: "swa"}, overwrite=True)
    with pytest.raises(ArgumentError, match="or holds one"):
        average_checkpoints(inside[:1], {inside[1]: [1.0]}, base=inside[1], overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_only_a_folder_that_a_merge_wrote_is_replaced(tmp_path):
    paths = stored_checkpoints(tmp_path, [random_state() for _ in range(2)])
    target = tmp_path / "llama-3.1-8B"
    average_checkpoints(paths, {target: "swa"})
    average_checkpoints(paths, {target: [0.25, 0.75]}, overwrite=True)
    with pytest.raises(OutputError, match="too long"):
        average_checkpoints(paths, {tmp_path / f"{'a' * 238}.pt": "swa"})
    plain = tmp_path / "plain"
    plain.touch()
    with pytest.raises(OutputError, match="is a file, and the output is a folder"):
        average_checkpoints(paths, {plain: "swa"}, overwrite=True)
    (target / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.md"):
        average_checkpoints(paths, {target: "swa"}, overwrite=True)
    assert (target / "notes.md").read_text() == "mine"


def test_tensors_one_by_one(tmp_path):
    states = [random_state(torch.bfloat16, ids=torch.arange(3)) for _ in range(3)]
    paths = stored_checkpoints(tmp_path, states)
    streamed = dict(iter_averaged_tensors(paths, "ema:half_life=100"))
    whole = merged(paths, tmp_path, "ema:half_life=100")
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


def test_the_plan_counts_what_many_inputs_take(tmp_path):
    # Means of blocks are merged in pairs: more rows for more inputs.
    paths = [tmp_path / f"step-{i}.safetensors" for i in range(70)]
    for path in paths:
        save_file({"w": torch.ones(4096)}, path)
    memory = {}
    for count in (8, 70):
        with prepared(
            paths[:count], {tmp_path / "out.pt": "swa"}, MergeOptions(threads=1)
        ) as merge:
            memory[count] = merge.memory
    rows = WeightedSum([1 / 70] * 70).buffers
    assert rows > 1
    assert memory[70] - memory[8] >= (rows - 1) * 4096 * 4
