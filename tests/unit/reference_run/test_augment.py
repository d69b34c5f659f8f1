"""Permutations and augmentations are pure functions of (seed, epoch, index)."""

import pytest
import torch

from polyak.reference_run.data import Augmentation, permutation, shifted


def test_permutations_are_permutations_and_repeat():
    orders = {(s, e): permutation(s, e, 50).tolist() for s in (0, 1) for e in (0, 1, 2)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    torch.manual_seed(9)  # torch's own random state has no influence
    assert permutation(1, 2, 50).tolist() == orders[1, 2]


def test_what_an_image_gets_depends_on_its_index_alone():
    images = torch.randn(40, 3, 8, 8)
    augment = Augmentation.draw(3, 7, 40, flips=True, shift=2)
    whole = augment(images, torch.arange(40))
    some = torch.tensor([5, 31, 2])
    again = Augmentation.draw(3, 7, 40, flips=True, shift=2)
    assert torch.equal(again(images[some], some), whole[some])


def test_flips_mirror_about_half_of_the_images():
    augment = Augmentation.draw(0, 0, 4000, flips=True, shift=0)
    images = torch.arange(4000 * 4).reshape(4000, 1, 1, 4).float()
    out = augment(images, torch.arange(4000))
    flipped = (out == images.flip(-1)).all(dim=(1, 2, 3)).sum()
    kept = (out == images).all(dim=(1, 2, 3)).sum()
    assert flipped + kept == 4000
    assert 1850 < flipped < 2150


def test_shifts_reach_every_offset_and_equal_a_slow_twin():
    augment = Augmentation.draw(0, 1, 500, flips=False, shift=1)
    assert {tuple(s) for s in augment.shifts.tolist()} == {
        (a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)
    }
    images = torch.randn(500, 2, 5, 5)
    images[:, :, 0, 0] = 0  # the background that fills in
    out = augment(images, torch.arange(500))
    for image, moved, (down, right) in zip(images, out, augment.shifts.tolist(), strict=True):
        for y in range(5):
            for x in range(5):
                inside = 0 <= y - down < 5 and 0 <= x - right < 5
                expected = image[:, y - down, x - right] if inside else torch.zeros(2)
                assert torch.allclose(moved[:, y, x], expected, atol=1e-6)


def test_nothing_asked_for_changes_nothing():
    images = torch.randn(3, 1, 4, 4)
    augment = Augmentation.draw(0, 0, 3, flips=False, shift=0)
    assert augment(images, torch.arange(3)) is images


def test_an_unshifted_image_comes_back_in_its_values():
    images = torch.randn(2, 1, 6, 6)
    moved = shifted(images, torch.tensor([[0, 0], [2, -2]]))
    assert torch.allclose(moved[0], images[0], atol=1e-6)
    assert moved[1, 0, 2, 0] == pytest.approx(float(images[1, 0, 0, 2]), abs=1e-6)
