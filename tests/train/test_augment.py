"""Matrices: identity when off, repeatable, and equal to doing each change by itself."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from fastfundus.config import AugmentConfig
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import draw_epoch, fixed_matrices, normalisation

OFF = {
    "scale": 1.0,
    "rotate_degrees": 0.0,
    "flip_horizontal": False,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue_degrees": 0.0,
}
SPEC = PreprocessSpec(size=32)
RAW = PreprocessSpec(size=32, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""Normalises to grey levels: the colour matrix alone remains."""


def test_off_is_evaluation() -> None:
    for drawn, fixed in zip(draw_epoch(AugmentConfig(**OFF), SPEC, 5, seed=1, epoch=2), fixed_matrices(SPEC, 5)):  # noqa: B905
        np.testing.assert_allclose(drawn, fixed, atol=1e-6)


def test_normalisation_by_hand() -> None:
    black, white = normalisation(SPEC)[:3] @ np.array([[0, 255], [0, 255], [0, 255], [1, 1]])[:, [0]], None
    np.testing.assert_allclose(black[:, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    white = normalisation(SPEC)[:3] @ np.array([255, 255, 255, 1])
    np.testing.assert_allclose(white, [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_draws_depend_on_seed_and_epoch_only() -> None:
    config = AugmentConfig()
    first = draw_epoch(config, SPEC, 20, seed=3, epoch=4)
    for left, right in zip(first, draw_epoch(config, SPEC, 20, seed=3, epoch=4), strict=True):
        np.testing.assert_array_equal(left, right)
    for seed, epoch in [(4, 4), (3, 5)]:
        assert not np.array_equal(first[0], draw_epoch(config, SPEC, 20, seed=seed, epoch=epoch)[0])


def test_crops_stay_inside_the_photo() -> None:
    config = AugmentConfig(**{**OFF, "scale": 0.5})
    geometry, _ = draw_epoch(config, SPEC, 500, seed=0, epoch=0)
    corners = np.array([[0, 0, 1], [32, 0, 1], [0, 32, 1], [32, 32, 1]], float).T
    places = geometry @ corners
    assert places.min() > -1e-4
    assert places.max() < 32 + 1e-4
    sides = geometry[:, 0, 0]
    assert sides.min() < 0.55
    assert sides.max() > 0.95


def test_rotation_and_mirror_keep_the_centre() -> None:
    config = AugmentConfig(**{**OFF, "rotate_degrees": 90.0, "flip_horizontal": True, "flip_vertical": True})
    geometry, _ = draw_epoch(config, SPEC, 200, seed=0, epoch=0)
    np.testing.assert_allclose(geometry @ np.array([16.0, 16.0, 1.0]), 16, atol=1e-4)
    determinants = np.linalg.det(geometry[:, :, :2].astype(float))
    np.testing.assert_allclose(np.abs(determinants), 1, atol=1e-5)
    assert 0.3 < (determinants < 0).mean() < 0.7


def test_a_mirror_mirrors() -> None:
    config = AugmentConfig(**{**OFF, "flip_horizontal": True})
    geometry, _ = draw_epoch(config, RAW, 50, seed=0, epoch=0)
    _, colour = fixed_matrices(RAW, 50)
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).repeat(50, 1, 1, 1)
    got = sample(images, torch.from_numpy(geometry), torch.from_numpy(colour), 32)
    plain = images[0].permute(2, 0, 1).float()
    mirrored = [n for n in range(50) if geometry[n, 0, 0] < 0]
    assert 0 < len(mirrored) < 50
    for n in range(50):
        expected = plain.flip(2) if n in mirrored else plain
        assert (got[n] - expected).abs().max() < 0.01


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue_degrees"])
def test_colour_changes_one_by_one(name: str) -> None:
    strength = 20.0 if name == "hue_degrees" else 0.4
    _, colour = draw_epoch(AugmentConfig(**{**OFF, name: strength}), RAW, 40, seed=0, epoch=0)
    pixel = np.array([180.0, 90.0, 40.0])
    luma = 0.299 * 180 + 0.587 * 90 + 0.114 * 40
    results = colour[:, :, :3].astype(float) @ pixel + colour[:, :, 3]
    for result in results:
        if name == "brightness":
            factor = result[0] / pixel[0]
            expected = factor * pixel
        elif name == "contrast":
            factor = (result[0] - 127.5) / (pixel[0] - 127.5)
            expected = factor * (pixel - 127.5) + 127.5
        elif name == "saturation":
            factor = (result[0] - luma) / (pixel[0] - luma)
            expected = factor * (pixel - luma) + luma
        else:
            # Turning the hue keeps luma and the length of the colour difference.
            factor = 1.0
            before, after = np.array(colorsys.rgb_to_yiq(*pixel)), np.array(colorsys.rgb_to_yiq(*result))
            # Python's YIQ has coefficients of three digits.
            assert after[0] == pytest.approx(before[0], rel=0.01)
            assert np.hypot(*after[1:]) == pytest.approx(np.hypot(*before[1:]), rel=0.02)
            turn = math.degrees(math.atan2(after[2], after[1]) - math.atan2(before[2], before[1]))
            assert abs(turn) < 21
            continue
        np.testing.assert_allclose(result, expected, rtol=1e-4)
        assert 0.6 - 1e-4 <= factor <= 1.4 + 1e-4
    assert np.ptp(results[:, 0]) > 5
