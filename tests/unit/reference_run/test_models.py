"""The small network, and custom models that do or do not fit."""

import pytest
import torch

from polyak.errors import ArgumentError
from polyak.reference_run.data import Data, Split
from polyak.reference_run.models import Net, build_model
from polyak.reference_run.networks import NETWORKS
from polyak.reference_run.recipe import NETWORKS as RECIPE_NETWORKS
from polyak.reference_run.recipe import Recipe


@pytest.fixture
def data():
    split = Split(torch.randn(4, 3, 20, 20), torch.tensor([0, 1, 2, 3]))
    return Data(train=split, validation=split, test=split)


@pytest.mark.parametrize(("size", "inputs"), [(28, 400), (18, 144), (21, 144), (10, 16)])
def test_the_hidden_layer_takes_what_the_image_leaves(size, inputs):
    net = Net(in_channels=3, n_outputs=7, image_size=size)
    assert net.hidden.in_features == inputs
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_layers_of_the_network():
    assert [(m.in_channels, m.out_channels) for m in (Net().conv1, Net().conv2)] == [
        (1, 8),
        (8, 16),
    ]
    assert Net().hidden.out_features == 128
    assert not any("running" in name for name in Net().state_dict())
    assert "norm2.running_var" in Net(batchnorm=True).state_dict()


def test_images_that_are_too_small():
    with pytest.raises(ArgumentError, match="image_size is 9; expected 10 or more"):
        Net(image_size=9)


def test_the_recipe_decides(data):
    net = build_model(Recipe(network="taught", batchnorm=True), data)
    assert isinstance(net.norm1, torch.nn.BatchNorm2d)
    assert (net.conv1.in_channels, net.output.out_features, net.hidden.in_features) == (3, 4, 144)
    residual = build_model(Recipe(), data)
    assert (residual.conv.in_channels, residual.output.out_features) == (3, 4)


SOURCE = """
import torch
def good(in_channels, n_outputs, image_size):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size**2, n_outputs))
def not_a_module(**sizes):
    return 3
def no_arguments():
    return good(1, 4, 20)
def wrong_outputs(**sizes):
    return good(**{**sizes, "n_outputs": 5})
def wrong_inputs(**sizes):
    return good(**{**sizes, "in_channels": 1})
def frozen(**sizes):
    return good(**sizes).requires_grad_(False)
class Odd(torch.nn.Module):
    def __init__(self, forward, sizes):
        super().__init__()
        self.inner, self.how = good(**sizes), forward
    def forward(self, images):
        return self.how(self, self.inner(images))
def two_in_training(**sizes):
    return Odd(lambda self, x: (x, 1) if self.training else x, sizes)
def cut_off(**sizes):
    return Odd(lambda self, x: x.detach(), sizes)
def whole_numbers(**sizes):
    return Odd(lambda self, x: x.long(), sizes)
def asserts(**sizes):
    return Odd(lambda self, x: {}["nothing"], sizes)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "own_models_for_tests.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "own_models_for_tests"


def test_a_custom_model(models, data):
    model = build_model(Recipe(model=f"{models}:good"), data)
    assert model(data.train.images).shape == (4, 4)
    assert model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_module", "returned a int; expected a torch.nn.Module"),
        ("no_arguments", "could not be called with in_channels=3, n_outputs=4, image_size=20"),
        ("wrong_outputs", r"has the output \(2, 5\) for 2 images; expected logits \(2, 4\)"),
        ("wrong_inputs", r"does not take images of \(3, 20, 20\)"),
        ("frozen", "has no parameter that requires a gradient"),
        ("two_in_training", "cannot be trained: AttributeError: 'tuple' object"),
        ("cut_off", "cannot be trained: RuntimeError: .*does not require grad"),
        ("whole_numbers", r"output of torch.int64; expected logits"),
        ("asserts", r"does not take images of .*: KeyError: 'nothing'"),
    ],
)
def test_models_that_do_not_fit(models, data, name, message):
    with pytest.raises(ArgumentError, match=message):
        build_model(Recipe(model=f"{models}:{name}"), data)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("residual", 73_178),  # grey: 72,890
        ("wrn-16-4", 2_748_890),
        ("wrn-28-10", 36_479_194),
        ("preresnet-20", 272_282),
        ("preresnet-110", 1_730_522),
        ("preresnet-164", 1_703_258),
        ("vgg16", 15_245_130),
        ("vgg16-bn", 15_253_578),
    ],
)
def test_networks_have_as_many_parameters_as_published(name, published):
    with torch.device("meta"):
        net = NETWORKS[name](in_channels=3, n_outputs=10, image_size=32)
        assert sum(parameter.numel() for parameter in net.parameters()) == published
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        grey = NETWORKS[name](in_channels=1, n_outputs=10, image_size=28)
        assert grey(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_recipe_can_name_every_network():
    assert {*NETWORKS, "taught"} == set(RECIPE_NETWORKS)
    with pytest.raises(ArgumentError, match="image_size is 33; vgg16 takes images of up to 32"):
        NETWORKS["vgg16"](image_size=33)


@pytest.mark.parametrize("name", ["wrn-16-4", "preresnet-20", "vgg16-bn"])
def test_signals_keep_their_size_through_the_initial_weights(name):
    torch.manual_seed(0)
    net = NETWORKS[name](in_channels=3, n_outputs=10, image_size=32).train()
    logits = net(torch.randn(8, 3, 32, 32))
    assert 0.05 < float(logits.detach().std()) < 5
