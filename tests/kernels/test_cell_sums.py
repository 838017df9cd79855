"""Sums over cells, exactly; the profile that is made of them."""

from __future__ import annotations

import pytest
import torch

from fastfundus.kernels import reference
from fastfundus.kernels.ops import field_profile
from fastfundus.synthetic import draw_photo
from tests.kernels.cases import IDENTITY, Batch, ragged
from tests.kernels.implementations import CELL_SUMMERS

pytestmark = pytest.mark.kernel

# A Triton program reads 128 pixels of a row at once when interpreted: cells of 127, 128, 129 and 257 columns.
SHAPES = {
    "one-cell": ([(1, 1)], 1),
    "a-pixel-a-cell": ([(4, 4), (5, 7)], 4),
    "a-block-but-one": ([(6, 254)], 2),
    "a-block": ([(6, 256)], 2),
    "a-block-and-one": ([(6, 258)], 2),
    "two-blocks-and-one": ([(3, 257)], 1),
    "many-sizes": ([(17, 40), (64, 9), (30, 31)], 8),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("how", CELL_SUMMERS)
def test_equals_the_reference(how: str, name: str) -> None:
    shapes, bins = SHAPES[name]
    batch = ragged([(shape, IDENTITY) for shape in shapes], 1, gap=3)
    got = CELL_SUMMERS[how](batch, bins)
    assert torch.equal(got, reference.cell_sums(batch.pixels, batch.offsets, batch.sizes, bins))


def summed(batch: Batch, bins: int) -> torch.Tensor:
    return field_profile(batch.pixels, batch.offsets, batch.sizes, bins)


def test_profile_is_the_mean_of_bands() -> None:
    batch = ragged([((30, 47), IDENTITY), ((16, 16), IDENTITY)], 1)
    got = summed(batch, 16)
    for n, image in enumerate(reference.photos(batch.pixels, batch.offsets, batch.sizes)):
        bright = image.amax(dim=2).double()
        for axis, size in enumerate(bright.shape):
            for k in range(16):
                band = bright.narrow(axis, k * size // 16, (k + 1) * size // 16 - k * size // 16)
                assert got[n, axis, k] == pytest.approx(float(band.mean()), rel=1e-6)


def test_profile_shows_where_the_field_is() -> None:
    photo = draw_photo(seed=3, long_side=640)
    image = torch.from_numpy(photo.image)
    place = torch.tensor([0]), torch.tensor([list(image.shape[:2])], dtype=torch.int32)
    rows, columns = field_profile(image.reshape(-1), *place, 64)[0]
    centre = float((columns * torch.arange(64)).sum() / columns.sum() + 0.5) * image.shape[1] / 64
    assert abs(centre - photo.field.x_px) < 0.1 * photo.field.radius_px
    assert rows.shape == (64,)
    assert rows.max() < 256


def test_an_empty_batch_stays_empty() -> None:
    assert summed(ragged([], 1), 8).shape == (0, 2, 8)


@pytest.mark.parametrize(("bins", "message"), [(0, "bins must be 1 to 1024, got 0"), (5, r"sizes\[0\] is \[4, 9\]")])
def test_bad_bins_are_named(bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summed(ragged([((4, 9), IDENTITY)], 1), bins)


def test_bad_places_are_named() -> None:
    pixels, sizes = torch.zeros(12, dtype=torch.uint8), torch.tensor([[2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"offsets\[0\] is 1"):
        field_profile(pixels, torch.tensor([1]), sizes, 1)
