"""A few of the images that ship, and a recipe that is over in a second."""

import pytest

from polyak.reference_run import loop
from polyak.reference_run.data import Data, Split, embedded_data
from polyak.reference_run.recipe import load_recipe


@pytest.fixture(scope="session")
def few_images():
    whole = embedded_data()

    def first(split, n):
        return Split(split.images[:n].clone(), split.labels[:n].clone())

    return Data(first(whole.train, 200), first(whole.validation, 60), first(whole.test, 60))


@pytest.fixture
def short(few_images, monkeypatch):
    """A recipe for all arms of two seeds; runs of any recipe see a few images only."""
    monkeypatch.setattr(loop, "load_data", lambda recipe: few_images)
    monkeypatch.setattr("polyak.reference_run.run.load_data", lambda recipe: few_images)
    fields = {"epochs": 4, "seeds": 2, "cycle_epochs": 1, "device": "cpu", "batch_size": 50}
    fields["record_intervals"] = 6
    return load_recipe("taught", fields)
