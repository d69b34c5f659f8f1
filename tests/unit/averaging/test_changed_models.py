"""What is said of a model that has changed since averaging began."""

import pytest
from torch import nn

from polyak import EMA, SWA, Average
from polyak.errors import MismatchError


def tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.9)])
@pytest.mark.parametrize("call", ["update", "applied"])
def test_weights_that_are_tied_no_more_are_named_as_such(profile, call):
    model = tied()
    average = Average(model, profile)
    average.update()
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(MismatchError, match=r"1\.weight: was tied to 0\.weight") as caught:
        average.update() if call == "update" else average.applied().__enter__()
    assert "unexpected" not in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    model[1].weight = model[0].weight
    average.update()
