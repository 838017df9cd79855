"""Tests of the reference against hand-computed values, PyTorch's grid_sample and OpenCV's warp and area average."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastfundus.kernels import reference
from tests.kernels.cases import IDENTITY, PLAIN, affine, matrix
from tests.tolerances import FLOAT32_STEP, OPENCV_WARP_GREY_LEVELS

pytestmark = pytest.mark.kernel


def sampled(image: Tensor, geometry: Tensor, size: int, nearest: bool = False) -> Tensor:
    """Sample one photo, uint8 [H, W, 3], to float32 [size, size, 3]."""
    place = torch.tensor([0]), torch.tensor([list(image.shape[:2])], dtype=torch.int32)
    got = reference.sample(image.reshape(-1), *place, geometry[None], PLAIN[None], size, torch.float32, nearest)
    return got[0].permute(1, 2, 0)


def grey(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)[..., None].repeat(1, 1, 3)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_worked_example() -> None:
    image = grey([10, 30])
    assert sampled(image, IDENTITY, 1).flatten().tolist() == [10.0, 10.0, 10.0]
    assert sampled(image, affine(1, 0, (0.5, 0)), 1).flatten().tolist() == [20.0, 20.0, 20.0]
    # The box is two pixels wide and one pixel high.
    assert sampled(image, matrix([2, 0, 0], [0, 1, 0]), 1).flatten().tolist() == [20.0, 20.0, 20.0]


def test_black_begins_half_a_pixel_outside() -> None:
    # The position 0.25 is three quarters of the way from black outside (centre -0.5) to the first pixel (centre 0.5).
    assert sampled(grey([10, 30]), affine(1, 0, (-0.25, 0)), 1)[0, 0].tolist() == [7.5, 7.5, 7.5]


def test_area_by_hand() -> None:
    image = grey([160, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])
    assert sampled(image, affine(2.0), 2)[..., 0].tolist() == [[40.0, 0.0], [0.0, 0.0]]
    # A box of three pixels from 0.5 to 3.5 contains half of the first row and column, hence 160 / 9 / 4.
    got = sampled(image, affine(3.0, 0, (0.5, 0.5)), 1)[0, 0, 0]
    assert float(got) == pytest.approx(160 / 9 / 4, rel=1e-6)


def test_a_turned_geometry_keeps_the_upright_box() -> None:
    # A geometry that minifies columns by 3 and rows by 1 minifies rows by 3 after a rotation by 90 degrees.
    image = noise(12, 12)
    turned = sampled(image, matrix([0, 1, 0], [3, 0, 0]), 4)
    upright = sampled(image, matrix([1, 0, 0], [0, 3, 0]), 4)
    assert torch.equal(turned, upright.permute(1, 0, 2))


@pytest.mark.parametrize("geometry", [affine(0.5, 25, (6, 2)), affine(1.0, -70, (-3, 20)), affine(0.9, 180, (20, 18))])
def test_equals_grid_sample_where_nothing_is_minified(geometry: Tensor) -> None:
    image, size = noise(20, 23), 24
    theta = geometry.double() * torch.tensor([[2 / 23], [2 / 20]], dtype=torch.float64)
    theta[:, 2] -= 1
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)], -1) @ theta.T
    planes = image.permute(2, 0, 1)[None].double()
    expected = functional.grid_sample(planes, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    got = sampled(image, geometry, size)
    # Allow one rounding to float32 at the end, and grid_sample's rounding of positions in float64. A rotation without
    # scaling may span slightly more than one pixel in float32, which still counts as one.
    assert (got - expected[0].permute(1, 2, 0)).abs().max() < 256 * FLOAT32_STEP + 1e-9


@pytest.mark.parametrize("factor", [2, 3, 4, 2.5, 1.25])
def test_equals_opencv_area_average(factor: float) -> None:
    side = int(12 * factor)
    image = noise(side, side)
    expected = cv2.resize(image.numpy().astype(np.float32), (12, 12), interpolation=cv2.INTER_AREA)
    got = sampled(image, affine(side / 12), 12)
    # OpenCV sums in float32, in two passes, with one rounding per pixel and pass.
    np.testing.assert_allclose(got.numpy(), expected, atol=255 * 2 * (factor + 2) * FLOAT32_STEP * 4)


def test_equals_opencv_warp_when_enlarging() -> None:
    image, geometry = noise(20, 20, 1), affine(0.5, 25.0, (6.0, 2.0))
    # OpenCV places the origin at a pixel centre, so both coordinates are shifted by half a pixel.
    shift = geometry[:, 2] + geometry[:, :2] @ torch.tensor([0.5, 0.5]) - 0.5
    warp = torch.cat([geometry[:, :2], shift[:, None]], 1).double().numpy()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    expected = cv2.warpAffine(image.numpy().astype(np.float32), warp, (32, 32), flags=flags, borderValue=(0, 0, 0))
    difference = np.abs(sampled(image, geometry, 32).numpy() - expected)
    assert difference.max() < 2 * OPENCV_WARP_GREY_LEVELS
    assert difference.mean() < OPENCV_WARP_GREY_LEVELS / 4


def test_nearest_takes_the_covering_pixel() -> None:
    image = grey([0, 3], [6, 9])
    got = sampled(image, affine(0.5), 4, nearest=True)[..., 0]
    assert got.tolist() == [[0, 0, 3, 3], [0, 0, 3, 3], [6, 6, 9, 9], [6, 6, 9, 9]]
    # Masks are never averaged, regardless of the minification.
    assert sampled(image, affine(2.0), 1, nearest=True)[0, 0].tolist() == [9, 9, 9]
