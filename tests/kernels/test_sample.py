"""Tests of every implementation of `sample` against the reference on all cases, and of the operator's contract."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastfundus.kernels import host, ops, reference
from fastfundus.kernels import sample as triton_sample
from fastfundus.kernels.ops import sample, sample_ragged
from tests.kernels.cases import CASES, IDENTITY, PLAIN, Batch, affine, case, matrix, ragged
from tests.kernels.implementations import SAMPLERS, Sampler, rounding
from tests.tolerances import FLOAT32_STEP

pytestmark = pytest.mark.kernel


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new outputs with NaN to reveal values that a kernel does not write."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        fresh = empty(*shape, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    for module in (ops, triton_sample):
        monkeypatch.setattr(module.torch, "empty", poisoned)


def expected(batch: Batch, dtype: torch.dtype = torch.float32, nearest: bool = False) -> torch.Tensor:
    return reference.sample(*batch.arguments, dtype, nearest)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(sampler: Sampler, name: str, dtype: torch.dtype) -> None:
    batch = case(name)
    got, want = sampler(batch, dtype, False), expected(batch)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    allowed = batch.grey_levels + rounding(sampler, dtype) * want.abs()
    assert ((got.float() - want).abs() <= allowed).all()


@pytest.mark.parametrize("name", CASES)
def test_nearest_equals_the_reference(sampler: Sampler, name: str) -> None:
    batch = case(name)
    got, want = sampler(batch, torch.float32, True), expected(batch, nearest=True)
    differs = (got != want).any(dim=1)
    # A position on the boundary between two pixels may be rounded to either side.
    x, y = positions(batch)
    margin = batch.grey_levels / 255
    on_boundary = ((x - x.round()).abs() < margin) | ((y - y.round()).abs() < margin)
    assert not (differs & ~on_boundary).any()
    assert differs.float().mean() < 0.2


def positions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.arange(batch.out_size, dtype=torch.float64) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    place = batch.geometry.double() @ torch.stack([x, y, torch.ones_like(x)]).view(3, -1)
    return tuple(place.view(-1, 2, batch.out_size, batch.out_size).unbind(1))  # type: ignore[return-value]


@pytest.mark.parametrize("minify", [False, True], ids=["interpolate", "integrate"])
def test_photos_of_many_sizes_in_one_buffer(sampler: Sampler, minify: bool) -> None:
    rows = [((9, 7), affine(0.8)), ((1, 1), IDENTITY), ((31, 40), affine(0.9, 12, (4, 1)))]
    rows += [((40, 33), affine(3.2, 5, (-2, 0)))] if minify else []
    batch = ragged(rows, 10, gap=5)
    got = sampler(batch, torch.float32, False)
    assert (got - expected(batch)).abs().max() <= batch.grey_levels
    # The result does not depend on the other photos of the batch, nor on the mode that they require.
    alone = ragged(rows, 10, gap=5)
    for n in range(len(rows)):
        single = dataclasses.replace(
            alone, offsets=alone.offsets[n : n + 1], sizes=alone.sizes[n : n + 1],
            geometry=alone.geometry[n : n + 1], colour=alone.colour[n : n + 1],
        )  # fmt: skip
        assert (sampler(single, torch.float32, False)[0] - got[n]).abs().max() <= batch.grey_levels


def test_colour_maps_and_nothing_is_clamped(sampler: Sampler) -> None:
    batch = case("overhang-left", copies=3)
    colour = torch.stack([PLAIN, 3 * PLAIN - 400, torch.randn(3, 4, generator=torch.Generator().manual_seed(0))])
    batch = dataclasses.replace(batch, colour=colour)
    got, want = sampler(batch, torch.float32, False), expected(batch)
    # Rows of the matrices amplify the error in grey levels; each product and sum, below 2^11, rounds once.
    assert (got - want).abs().max() <= 9 * batch.grey_levels + 8 * 2048 * FLOAT32_STEP
    assert got.min() < -300
    # Black outside the photo becomes the last column of the matrix.
    torch.testing.assert_close(got[2, :, 0, 0], colour[2, :, 3])


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_every_grey_level_of_every_channel_is_normalised(sampler: Sampler, dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colour = torch.cat([torch.diag(1 / (255 * std)), (-mean / std)[:, None]], dim=1)[None]
    sizes = torch.tensor([[16, 16]], dtype=torch.int32)
    batch = Batch(images, torch.tensor([0]), sizes, IDENTITY[None], colour, 16)
    got = sampler(batch, dtype, False).double()
    want = ((images.view(1, 16, 16, 3).double() / 255 - mean.double()) / std.double()).permute(0, 3, 1, 2)
    # Coefficients, products and sums each round once in float32, at a magnitude below 4; the output rounds once more.
    assert ((got - want).abs() <= 4 * 4 * FLOAT32_STEP + rounding(sampler, dtype) * want.abs()).all()


def test_same_bits_again_and_inputs_untouched(sampler: Sampler) -> None:
    batch = case("minify-2.5-turned", copies=3)
    before = [value.clone() for value in batch.arguments[:5]]
    first, second = (sampler(batch, torch.bfloat16, False) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(left, right) for left, right in zip(before, batch.arguments[:5], strict=True))


def test_an_empty_batch_stays_empty(sampler: Sampler) -> None:
    assert sampler(ragged([], 4), torch.float32, False).shape == (0, 3, 4, 4)


def test_images_of_one_size_are_a_ragged_batch() -> None:
    images = torch.randint(0, 256, (3, 9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    geometry, colour = torch.stack([affine(3.0), IDENTITY, affine(1.4, 10.0)]), PLAIN.repeat(3, 1, 1)
    offsets, sizes = torch.arange(3) * 9 * 14 * 3, torch.tensor([[9, 14]] * 3, dtype=torch.int32)
    want = sample_ragged(images.view(-1), offsets, sizes, geometry, colour, 10)
    assert torch.equal(sample(images, geometry, colour, 10), want)


def test_threads_change_nothing() -> None:
    batch = case("turned", copies=7)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(sample_ragged(*batch.arguments))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_without_a_compiler_the_reference_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.host, "load", lambda: host._Loaded(None, "no C++ compiler"))
    batch = case("minify-overhang")
    assert torch.equal(sample_ragged(*batch.arguments, torch.bfloat16), expected(batch, torch.bfloat16))


@pytest.mark.gpu
def test_offsets_beyond_two_gigabytes() -> None:
    side = 512
    count = (2**31) // (3 * side * side) + 3
    images = torch.zeros(count, side, side, 3, dtype=torch.uint8, device="cuda")
    images[-1] = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).cuda()
    matrices = IDENTITY.repeat(count, 1, 1), PLAIN.repeat(count, 1, 1)
    got = sample(images, *matrices, side, torch.bfloat16)
    assert got.numel() > 2**31 // 2
    assert torch.equal(got[-1].float().permute(1, 2, 0), images[-1].float())
    assert not got[:-1].any()


def test_opcheck() -> None:
    batch = case("not-square")
    for dtype, nearest in [(torch.bfloat16, False), (torch.float32, True)]:
        torch.library.opcheck(ops._sample, (*batch.arguments, dtype, nearest))


def test_compiles_without_a_graph_break() -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    matrices = IDENTITY.repeat(2, 1, 1), PLAIN.repeat(2, 1, 1)
    doubled = torch.compile(lambda *a: 2 * sample(*a, 16), fullgraph=True, backend="aot_eager")
    assert torch.equal(doubled(images, *matrices), 2 * sample(images, *matrices, 16))
    with pytest.raises(ValueError, match=r"geometry\[1\] must be finite"):
        doubled(images, torch.stack([IDENTITY, IDENTITY * math.nan]), matrices[1])


ONE = {"pixels": torch.zeros(48, dtype=torch.uint8), "offsets": torch.tensor([0])}
ONE |= {"sizes": torch.tensor([[4, 4]], dtype=torch.int32), "geometry": IDENTITY[None], "colour": PLAIN[None]}


def sizes(height: int, width: int) -> torch.Tensor:
    return torch.tensor([[height, width]], dtype=torch.int32)


BAD = {
    r"pixels must be uint8 \[B\], got torch.float32": {"pixels": torch.zeros(48)},
    r"pixels must be uint8 \[B\], got torch.uint8 \[4, 12\]": {"pixels": torch.zeros(4, 12, dtype=torch.uint8)},
    "pixels must be contiguous, got stride 2": {"pixels": torch.zeros(96, dtype=torch.uint8)[::2]},
    r"offsets must be torch.int64 \[1\], got torch.int32": {"offsets": torch.tensor([0], dtype=torch.int32)},
    r"offsets\[0\] is -1, but its 48 bytes must lie within the 48": {"offsets": torch.tensor([-1])},
    r"offsets\[0\] is 1, but its 48 bytes": {"offsets": torch.tensor([1])},
    r"offsets\[0\] is 9223372036854775807": {"offsets": torch.tensor([2**63 - 1])},
    r"sizes must be torch.int32 \[1, 2\]": {"sizes": torch.tensor([[4, 4]])},
    r"sizes\[0\] must be 1 to 1048576 pixels per side, got 0 x 4": {"sizes": sizes(0, 4)},
    r"sizes\[0\] must be 1 to 1048576 pixels per side, got 4 x -1": {"sizes": sizes(4, -1)},
    r"sizes\[0\] must be 1 to 1048576 pixels per side, got 2147483647 x 1": {"sizes": sizes(2**31 - 1, 1)},
    r"sizes\[0\] is 30000 x 30000, 2700000000 bytes": {"sizes": sizes(30000, 30000)},
    r"geometry must be torch.float32 \[1, 2, 3\], got torch.float64": {"geometry": IDENTITY[None].double()},
    r"geometry must be torch.float32 \[1, 2, 3\], got torch.float32 \[2, 2, 3\]": {
        "geometry": IDENTITY.repeat(2, 1, 1)
    },
    r"geometry\[0\] must be finite, got .*nan": {"geometry": torch.full((1, 2, 3), math.nan)},
    r"geometry\[0\] cannot be inverted.*0.0": {"geometry": torch.zeros(1, 2, 3)},
    r"geometry\[0\] cannot be inverted": {"geometry": matrix([1, 2, 0], [2, 4, 0])[None]},
    r"geometry\[0\] reaches 1e\+30 pixels": {"geometry": affine(1, 0, (1e30, 0))[None]},
    r"colour must be torch.float32 \[1, 3, 4\]": {"colour": torch.zeros(2, 3, 4)},
    r"colour\[0\] must be finite, got .*inf": {"colour": PLAIN[None] * math.inf},
    r"out_size must be 1 to 16384 pixels, got 0": {"out_size": 0},
    r"out_size must be 1 to 16384 pixels, got 16385": {"out_size": 16385},
    "dtype must be float32, float16 or bfloat16, got torch.float64": {"dtype": torch.float64},
    "geometry must be on the host, where it is checked, got meta": {"geometry": IDENTITY[None].to("meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_ragged(**{**ONE, "out_size": 4, **BAD[message]})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 4, 4, 3), r"images must be uint8 \[N, H, W, 3\], got torch.float32"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.uint8), r"images must be uint8 .* \[1, 4, 4, 4\]"),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), r"at least one pixel, got \[1, 0, 4, 3\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8).permute(0, 2, 3, 1), "images must be contiguous"),
    ],
)
def test_bad_images_are_named(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(images, IDENTITY[None], PLAIN[None], 4)
