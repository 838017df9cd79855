"""`sample`: the reference against numbers by hand and OpenCV, the operator against the reference."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from fastfundus.kernels import reference
from fastfundus.kernels.ops import _sample, sample
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT16_RELATIVE, GRID_GREY_LEVELS

pytestmark = pytest.mark.kernel

IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
PLAIN = torch.eye(3, 4)


def affine(scale: float, degrees: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, shift[0]], [s, c, shift[1]]])


# Each row names the path it takes.
CASES = {
    "one-pixel": ((1, 1), IDENTITY, 1),
    "width-one": ((5, 1), IDENTITY, 4),
    "identity": ((16, 16), IDENTITY, 16),
    "not-square": ((9, 17), affine(0.7, 0, (1.5, 0.25)), 12),
    "enlarge": ((8, 8), affine(0.25), 32),
    "overhang-left-top": ((16, 16), affine(1.0, 0, (-5.5, -3.25)), 16),
    "overhang-right-bottom": ((16, 16), affine(1.0, 0, (7.75, 9.5)), 16),
    "all-outside": ((16, 16), affine(1.0, 0, (100.0, 0.0)), 8),
    "turned": ((24, 24), affine(0.9, 33.0, (8.0, -4.0)), 24),
    "mirrored": ((12, 12), torch.tensor([[-1.0, 0.0, 12.0], [0.0, 1.0, 0.0]]), 12),
    "minify-2": ((32, 32), affine(2.0), 16),
    "minify-2.5-turned": ((40, 40), affine(2.5, 20.0, (3.0, -2.0)), 13),
    "minify-7": ((64, 48), affine(7.0), 9),
}


def batch(name: str, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    (height, width), geometry, size = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    images = torch.randint(0, 256, (copies, height, width, 3), dtype=torch.uint8, generator=generator)
    return images, geometry.repeat(copies, 1, 1), PLAIN.repeat(copies, 1, 1), size


def test_reference_by_hand() -> None:
    image = torch.tensor([[[[10, 10, 10], [30, 30, 30]]]], dtype=torch.uint8)
    first = reference.sample(image, IDENTITY[None], PLAIN[None], 1, torch.float32)
    assert first.flatten().tolist() == [10.0, 10.0, 10.0]
    between = reference.sample(image, affine(1, 0, (0.5, 0))[None], PLAIN[None], 1, torch.float32)
    assert between.flatten().tolist() == [20.0, 20.0, 20.0]
    # The position 0.25 lies between black outside (centre -0.5) and the first pixel (centre 0.5), at three quarters.
    edge = reference.sample(image, affine(1, 0, (-0.25, 0))[None], PLAIN[None], 1, torch.float32)
    assert edge.flatten().tolist() == [7.5, 7.5, 7.5]


def test_reference_minifies_by_area() -> None:
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, 0, 0] = 160
    halved = reference.sample(image, affine(2.0)[None], PLAIN[None], 2, torch.float32)
    # Two taps an axis at source positions 0.5 and 1.5: exactly the four pixels of the block, a quarter each.
    assert halved[0, 0].tolist() == [[40.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_reference_equals_opencv_area_resize_at_whole_factors(factor: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12 * factor, 12 * factor, 3), dtype=np.uint8)
    expected = cv2.resize(image.astype(np.float32), (12, 12), interpolation=cv2.INTER_AREA)
    got = reference.sample(torch.from_numpy(image)[None], affine(float(factor))[None], PLAIN[None], 12, torch.float32)
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-3)


def test_reference_equals_opencv_warp_when_enlarging() -> None:
    image = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    matrix = affine(0.5, 25.0, (6.0, 2.0))
    # OpenCV counts from pixel centres: shift both ends by half a pixel.
    shift = matrix[:, 2] + matrix[:, :2] @ torch.tensor([0.5, 0.5]) - 0.5
    warp = torch.cat([matrix[:, :2], shift[:, None]], 1).double().numpy()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    expected = cv2.warpAffine(image.astype(np.float32), warp, (32, 32), flags=flags, borderValue=(0, 0, 0))
    got = reference.sample(torch.from_numpy(image)[None], matrix[None], PLAIN[None], 32, torch.float32)
    # OpenCV may round positions to 1/32 pixel, which moves a value by up to 255 / 32 grey levels an axis.
    difference = np.abs(got[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() < 2 * 255 / 32
    assert difference.mean() < 1.5


def test_reference_nearest_takes_the_covering_pixel() -> None:
    image = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    got = reference.sample(image, affine(0.5)[None], PLAIN[None], 4, torch.float32, nearest=True)
    assert got[0, 0].tolist() == [[0, 0, 3, 3], [0, 0, 3, 3], [6, 6, 9, 9], [6, 6, 9, 9]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nearest", [False, True], ids=["bilinear", "nearest"])
def test_operator_equals_reference(name: str, nearest: bool) -> None:
    images, geometry, colour, size = batch(name, copies=2)
    expected = reference.sample(images, geometry, colour, size, torch.float32, nearest)
    got = sample(images, geometry, colour, size, nearest=nearest)
    assert got.shape == (2, 3, size, size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - expected).abs().max() <= GRID_GREY_LEVELS


def test_operator_mixes_minifications_in_one_batch() -> None:
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    geometry = torch.stack([affine(3.0), IDENTITY, affine(1.4, 10.0)])
    colour = PLAIN.repeat(3, 1, 1)
    got = sample(images, geometry, colour, 10)
    alone = torch.cat([sample(images[n : n + 1], geometry[n : n + 1], colour[n : n + 1], 10) for n in range(3)])
    assert torch.equal(got, alone)
    assert (got - reference.sample(images, geometry, colour, 10, torch.float32)).abs().max() <= GRID_GREY_LEVELS


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.bfloat16, BFLOAT16_RELATIVE), (torch.float16, FLOAT16_RELATIVE)]
)
def test_output_types_round_once(dtype: torch.dtype, relative: float) -> None:
    images, geometry, colour, size = batch("turned")
    exact = sample(images, geometry, colour, size)
    rounded = sample(images, geometry, colour, size, dtype)
    assert rounded.dtype == dtype
    assert ((rounded.float() - exact).abs() <= relative * exact.abs()).all()


def test_every_grey_level_is_normalised_exactly() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colour = torch.cat([torch.diag(1 / (255 * std)), (-mean / std)[:, None]], dim=1)[None]
    got = sample(images, IDENTITY[None], colour, 16).double()
    expected = (images.double() / 255 - mean.double()) / std.double()
    # Coefficients, product and sum each round once in float32, at a magnitude below 4.
    assert (got - expected.permute(0, 3, 1, 2)).abs().max() < 4 * 4 * 2**-24


def test_same_input_same_bits_and_input_untouched() -> None:
    images, geometry, colour, size = batch("minify-2.5-turned", copies=3)
    before = images.clone(), geometry.clone(), colour.clone()
    first, second = (sample(images, geometry, colour, size) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(left, right) for left, right in zip(before, (images, geometry, colour), strict=True))


def test_opcheck() -> None:
    images, geometry, colour, size = batch("not-square", copies=2)
    torch.library.opcheck(_sample, (images, geometry, colour, size, torch.bfloat16, False))
    torch.library.opcheck(_sample, (images, geometry, colour, size, torch.float32, True))


def test_compiles_without_a_graph_break() -> None:
    images, geometry, colour, size = batch("identity", copies=2)
    doubled = torch.compile(lambda *a: 2 * sample(*a, size), fullgraph=True, backend="aot_eager")
    assert torch.equal(doubled(images, geometry, colour), 2 * sample(images, geometry, colour, size))


def test_an_empty_batch_stays_empty() -> None:
    got = sample(torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(0, 2, 3), torch.zeros(0, 3, 4), 4)
    assert got.shape == (0, 3, 4, 4)


BAD = {
    "images must be uint8": {"images": torch.zeros(1, 4, 4, 3)},
    "images must be uint8 .N, H, W, 3.": {"images": torch.zeros(1, 4, 4, 4, dtype=torch.uint8)},
    "at least one pixel": {"images": torch.zeros(1, 0, 4, 3, dtype=torch.uint8)},
    "must be contiguous": {"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8).permute(0, 2, 3, 1)},
    "geometry must be float32": {"geometry": IDENTITY[None].double()},
    r"colour must be float32 .1, 3, 4.": {"colour": torch.zeros(2, 3, 4)},
    "geometry must be finite": {"geometry": torch.full((1, 2, 3), math.nan)},
    "out_size must be at least 1": {"out_size": 0},
    "dtype must be float32": {"dtype": torch.float64},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    good = {
        "images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8),
        "geometry": IDENTITY[None],
        "colour": PLAIN[None],
        "out_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        sample(**{**good, **BAD[message]})
