"""Recipes: shipped, typed, saved, compared, refused."""

import dataclasses

import pytest

from polyak.errors import ArgumentError, FormatError
from polyak.reference_run.recipe import Recipe, load_recipe, quick_version, shipped_recipes


def test_the_shipped_recipes():
    assert shipped_recipes() == [
        "annealing-wins", "batchnorm", "default", "fashion", "long", "note", "paper-preresnet",
        "paper-vgg16", "paper-wrn", "taught", "words", "wrn",
    ]  # fmt: skip
    assert load_recipe("default") == Recipe()
    assert all(load_recipe(name).name == name for name in shipped_recipes())


@pytest.mark.parametrize(
    "name",
    [
        "annealing-wins",
        "default",
        "fashion",
        "long",
        "note",
        "paper-preresnet",
        "paper-vgg16",
        "paper-wrn",
        "taught",
        "wrn",
    ],
)
def test_a_saved_recipe_reads_back_the_same(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert quick_version(recipe).epochs == 8


def test_overrides_replace_fields_and_are_checked():
    assert load_recipe("default", {"epochs": 12, "rate": 1}).rate == 1.0
    with pytest.raises(ArgumentError, match=r"epochs is 1\.5; expected int"):
        load_recipe("default", {"epochs": 1.5})
    with pytest.raises(ArgumentError, match="unknown speed"):
        load_recipe("default", {"speed": 3})
    with pytest.raises(ArgumentError, match="flips is 1; expected bool"):
        load_recipe("default", {"flips": 1})


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ArgumentError, match=r"No recipe 'defualt'.*annealing-wins, batchnorm"):
        load_recipe("defualt")


def test_a_file_that_is_not_toml(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("epochs = = 3")
    with pytest.raises(FormatError, match="not a TOML file"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs is 0; expected 1 or more"),
        ("seeds", 0, "seeds is 0"),
        ("record_intervals", -1, "record_intervals is -1; expected a number of intervals, or 0"),
        ("rate", -0.1, "rate is -0.1; expected a number from 1e-30 to"),
        ("rate", 1e300, "rate is 1e.300; expected a number from"),
        ("weight_decay", 1e300, "weight_decay is 1e.300; expected a number from 0 to"),
        ("ema_half_life", 1e-300, "ema_half_life is 1e-300; expected a number from 0.001"),
        ("power_std", 1e-300, "power_std is 1e-300; expected a width"),
        ("epochs", 10**20, "epochs is 1.*; expected 1000000 at most"),
        ("seeds", 10**12, "seeds is 1.*; expected 10000 at most"),
        ("first_seed", 2**63, "first_seed is 9.* at most"),
        ("rate", float("nan"), "rate is nan"),
        ("swa_rate", 0.0, "swa_rate is 0.0"),
        ("cycle_epochs", 0, "cycle_epochs is 0"),
        ("cycle_low", 0.2, "cycle_low is 0.2, above cycle_high"),
        ("momentum", 1.0, "expected 0 <= momentum < 1"),
        ("weight_decay", -1.0, "weight_decay is -1.0"),
        ("final_ratio", -0.1, "final_ratio is -0.1"),
        ("constant_until", 0.98, "constant_until <= annealed_at"),
        ("branch_at", 1.0, "branch_at is 1.0"),
        ("branch_at", 0.001, "at least one epoch before and one after"),
        ("annealing", "sudden", "linear or cosine"),
        ("swa_average", "year", "epoch or step"),
        ("arms", ("swa",), "expected sgd, then"),
        ("arms", ("sgd", "adam"), "expected sgd, then"),
        ("shift", 99, "shift is 99"),
        ("name", "../x", "plain folder name"),
        ("network", "resnet", "network is 'resnet'; expected residual or taught or wrn-16-4"),
        ("swa_from", 0.999, "averaging would begin after the last of 30 epochs"),
        ("swa_from", 1.5, "swa_from is 1.5; expected a fraction"),
        ("warmup_epochs", 9, r"warmup_epochs is 9, and the arm half is annealed from epoch 7.5 on"),
        ("warmup_epochs", -1, "warmup_epochs is -1; expected 0 or more"),
        ("first_seed", -1, "first_seed is -1"),
        ("momentum", 0.0, "nesterov needs a momentum"),
        ("batchnorm", True, "batchnorm is an option of the network taught"),
        ("epochs", 3, "the arm half would have 1; it needs two"),
        ("epochs", 2.5, "epochs is 2.5; expected int"),
        ("epochs", True, "epochs is True; expected int"),
        ("rate", "0.1", "rate is '0.1'; expected float"),
        ("flips", 1, "flips is 1; expected bool"),
        ("model", None, "model is None; expected str"),
        ("arms", "sgd", "expected a list of names"),
        ("rate", float("nan"), "rate is nan"),
        ("seeds", -1, "seeds is -1"),
    ],
)
def test_values_outside_their_domain(field, value, message):
    with pytest.raises(ArgumentError, match=message):
        Recipe(**{field: value})


def test_fields_that_exclude_each_other():
    with pytest.raises(ArgumentError, match="data and data_folder exclude"):
        Recipe(data="a:b", data_folder="c")
    with pytest.raises(ArgumentError, match="model and batchnorm exclude"):
        Recipe(model="a:b", network="taught", batchnorm=True)


def test_differences_name_the_fields():
    other = dataclasses.replace(Recipe(), epochs=20, flips=False)
    assert Recipe().differences(other) == [
        "epochs: 30 here, 20 there",
        "flips: True here, False there",
    ]


def test_a_cycle_may_be_long_where_no_arm_has_cycles():
    assert Recipe(arms=("sgd", "swa"), cycle_epochs=100).cycle_epochs == 100
    assert Recipe(arms=("sgd", "cyclic"), cycle_epochs=15).cycle_epochs == 15
    with pytest.raises(
        ArgumentError, match="cycle_epochs is 16, and only 15 of 30 epochs are left"
    ):
        Recipe(arms=("sgd", "cyclic"), cycle_epochs=16)


def test_a_recipe_that_cannot_be_read_is_one_error(tmp_path):
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(FormatError, match="not a TOML file") as caught:
        load_recipe(str(tmp_path / "bad.toml"))
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ("cosine",), "swa_from": 0.99}, "averaging would begin after the last"),
        ({"averages": ("ema", "wsm"), "arms": ("cosine",), "swa_from": 0.99}, "averaging would begin"),
        ({"strategy": "fsdp"}, "."),
    ],
)  # fmt: skip
def test_runs_of_words_that_could_not_end_are_refused(fields, message):
    with pytest.raises(ArgumentError, match=message):
        load_recipe("words", fields)


def test_a_sharded_model_is_not_copied_for_an_average():
    with pytest.raises(ArgumentError, match="wsm, which is made in a whole copy"):
        Recipe(averages=("ema", "wsm"), strategy="fsdp")
