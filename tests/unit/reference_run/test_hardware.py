"""Where a run computes."""

import dataclasses

import pytest
import torch

from polyak.errors import ArgumentError
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.loop import train
from polyak.reference_run.models import Net


def test_images_and_weights_are_channels_last():
    hardware = Hardware.named("cpu")
    images = hardware.inputs(torch.randn(2, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    weight = hardware.place(Net(in_channels=3)).conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_pins_the_bits_is_plain_text():
    environment = Hardware.named("cpu").environment()
    assert environment["threads"] == str(torch.get_num_threads())
    assert {type(value) for value in environment.values()} == {str}


def test_the_random_state_comes_back():
    hardware = Hardware.named("cpu")
    state = hardware.random_state()
    first = torch.rand(3)
    hardware.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    assert Hardware.named("auto").device.type == "cpu"
    with pytest.raises(ArgumentError, match="torch finds none; use cpu or auto"):
        Hardware.named("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_a_gpu_finishes_and_resumes(short, tmp_path):
    recipe = dataclasses.replace(short, device="cuda", batchnorm=True)

    def stop(record, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", watch=stop)
    assert train(recipe, tmp_path / "run", resume=True).is_finished()
