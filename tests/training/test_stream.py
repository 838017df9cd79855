"""Tests of training from camera files: crops match those of whole photos, each photo appears once, resume is exact."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fastfundus.config import AugmentConfig
from fastfundus.dali.decode import DaliDecoder
from fastfundus.data import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.kernels import reference
from fastfundus.photo.prepare import decode_at, decode_reduced
from fastfundus.training.augment import draw_epoch
from fastfundus.training.stream import CameraPhoto, CameraStream, masked_outside, source_window
from tests.tolerances import SCALED_DECODE_GREY_LEVELS

AUGMENT = AugmentConfig(scale=0.5, aspect=1.3, shear_degrees=5, rotate_degrees=30)


@pytest.fixture(scope="module", params=["dali", "cpu"])
def decoder(request: pytest.FixtureRequest) -> DaliDecoder | None:
    return DaliDecoder(batch_size=8, threads=2) if request.param == "dali" else None


@pytest.fixture
def stream(cache: PhotoCache, decoder: DaliDecoder | None) -> CameraStream:
    rows = np.flatnonzero((cache.manifest["status"] == "ok").to_numpy())[:22]
    return CameraStream(CameraPhoto.of_cache(cache, rows), cache.spec, AUGMENT, decoder, batch_size=4, seed=3)


def test_crops_match_those_of_whole_photos(stream: CameraStream) -> None:
    transforms = draw_epoch(AUGMENT, stream.spec, 22, seed=3, epoch=0)
    stream.spec = replace(stream.spec, mask_outside=False)
    divisors = set()
    for crops, positions in itertools.islice(stream, 4):
        for crop, n in zip(crops, positions, strict=True):
            photo = stream.photos[n]
            warp = transforms.geometry[n].astype(np.float64) * (photo.side_px / 64)
            warp[:, 2] += photo.left_px, photo.top_px

            def cut(pixels: np.ndarray, divisor: int, warp: np.ndarray = warp, n: int = n) -> torch.Tensor:
                place = torch.tensor([0]), torch.tensor([pixels.shape[:2]], dtype=torch.int32)
                matrices = torch.from_numpy(warp / divisor)[None], torch.from_numpy(transforms.colour[n : n + 1])
                return reference.sample(torch.from_numpy(pixels).view(-1), *place, *matrices, 64, torch.float32)[0]

            # Without DALI, the largest divisor at which a crop pixel spans at least one photo pixel on both axes.
            steps = np.hypot(warp[:, 0], warp[:, 1]).min()
            most = 1.0 if stream.decoder else steps
            reduced, divisor = decode_reduced(photo.path.read_bytes(), most)
            assert divisor <= most < 2 * divisor
            divisors.add(divisor)
            # The factor 57 = 255 * 0.22 converts normalised values to grey levels.
            assert 57 * (crop - cut(reduced, divisor)).abs().max() < 0.05
            whole = cut(decode_at(photo.path.read_bytes(), 0), 1)
            assert 57 * (crop - whole).abs().mean() < SCALED_DECODE_GREY_LEVELS
    assert divisors == ({1} if stream.decoder else {1, 2})


def test_mask_matches_distances_from_the_centre() -> None:
    """Compare with the distance of each pixel, for circles that are centred, outside, rotated, sheared and flipped."""
    rng = np.random.default_rng(0)
    geometry = np.concatenate([rng.normal(0, 0.7, (8, 2, 2)), rng.uniform(-10, 70, (8, 2, 1))], axis=2)
    geometry[0], geometry[1] = [[1, 0, 0], [0, 1, 0]], [[1, 0, 300], [0, 1, 0]]
    colour = torch.zeros(8, 3, 4)
    colour[:, :, 3] = -torch.arange(1, 25).view(8, 3)
    crops = torch.ones(8, 64, 64, 3).permute(0, 3, 1, 2)
    masked = masked_outside(crops, geometry.astype(np.float32), colour, 64)
    y, x = np.mgrid[:64, :64] + 0.5
    place = np.einsum("nij,jhw->nihw", geometry, np.stack([x, y, np.ones_like(x)])) - 32
    outside = np.hypot(place[:, 0], place[:, 1]) > 32
    assert (~outside[0]).sum() == pytest.approx(np.pi * 32**2, rel=0.01)
    assert outside[1].all()
    for channel in range(3):
        want = np.where(outside, -np.arange(1 + channel, 25, 3)[:, None, None], 1)
        np.testing.assert_array_equal(masked[:, channel].numpy(), want)


def test_outside_the_field_is_black_as_in_a_cache(stream: CameraStream) -> None:
    stream.augment = AugmentConfig(
        scale=1.0, rotate_degrees=0, flip_horizontal=False, brightness=0, contrast=0, saturation=0, hue_degrees=0
    )
    crops, _ = next(iter(stream))
    black = -torch.tensor(stream.spec.mean) / torch.tensor(stream.spec.std)
    assert torch.allclose(crops[:, :, 0, 0], black, atol=1e-6)
    assert not torch.allclose(crops[:, :, 32, 32], black, atol=0.1)


def seen(stream: CameraStream) -> list[int]:
    return [int(n) for _, positions in stream for n in positions]


def test_ranks_together_show_each_photo_once_per_epoch(cache: PhotoCache, stream: CameraStream) -> None:
    alone = seen(replace(stream, batch_size=8))
    ranks = [seen(replace(stream, rank=rank, world_size=2)) for rank in range(2)]
    assert len(alone) == len(set(alone)) == 16
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert [len(part) for part in ranks] == [8, 8]
    assert stream.epoch == 0
    first = seen(stream)
    assert (stream.epoch, stream.step) == (1, 0)
    assert seen(stream) != first


def test_augmentation_does_not_depend_on_the_rank(stream: CameraStream) -> None:
    def crops(part: CameraStream) -> dict[int, torch.Tensor]:
        return {int(n): crop for batch, positions in part for crop, n in zip(batch, positions, strict=True)}

    alone = crops(replace(stream, batch_size=8))
    for rank in range(2):
        for n, crop in crops(replace(stream, rank=rank, world_size=2)).items():
            assert torch.equal(crop, alone[n])


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_resumes_where_it_stopped(stream: CameraStream, stop: int) -> None:
    whole = list(replace(stream))
    assert len(whole) == len(stream) == 5
    begun = replace(stream)
    for _ in itertools.islice(begun, stop):
        pass
    resumed = replace(stream)
    resumed.load_state_dict(begun.state_dict())
    for (crops, positions), (want, expected) in zip(list(resumed), whole[stop:], strict=True):
        assert torch.equal(crops, want)
        np.testing.assert_array_equal(positions, expected)
    assert resumed.epoch == 1


def test_another_stream_is_refused(stream: CameraStream) -> None:
    with pytest.raises(CheckpointError, match="saved with batch_size 4 but now has 8"):
        replace(stream, batch_size=8).load_state_dict(stream.state_dict())


def test_bad_files_are_named_and_skipped(stream: CameraStream, tmp_path: Path) -> None:
    photos = list(stream.photos)
    broken, png = tmp_path / "broken.jpg", tmp_path / "photo.png"
    data = photos[3].path.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    cv2.imwrite(str(png), decode_at(photos[5].path.read_bytes(), 0)[..., ::-1])
    photos[3], photos[5] = replace(photos[3], path=broken), replace(photos[5], path=png)
    photos[7] = replace(photos[7], path=tmp_path / "gone.jpg")
    spoilt = replace(stream, photos=photos)
    got = {int(n): crop for crops, positions in spoilt for crop, n in zip(crops, positions, strict=True)}
    want = {int(n): crop for crops, positions in stream for crop, n in zip(crops, positions, strict=True)}
    assert set(want) - set(got) == {3, 7} & set(want)
    for n, crop in got.items():
        if n == 5 and stream.decoder is None:
            # Only JPEGs are decoded at reduced size.
            assert 57 * (crop - want[n]).abs().mean() < SCALED_DECODE_GREY_LEVELS
            continue
        # Positions in a whole photo and in a window of it differ in magnitude, and so do their float32 rounding errors.
        assert (crop - want[n]).abs().max() < 1e-3, n
    assert set(spoilt.faults) <= {broken, tmp_path / "gone.jpg"}
    if 7 in want:
        assert spoilt.faults[tmp_path / "gone.jpg"] == "file not found; check the path"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be 0 to world_size - 1 = 1, got 2"),
        ({"batch_size": 12, "world_size": 2}, "22 photos do not fill a batch of 12 on 2 ranks"),
    ],
)
def test_bad_arguments_are_named(stream: CameraStream, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(stream, **changes)


def test_batch_larger_than_the_decoder_allows(stream: CameraStream) -> None:
    if stream.decoder is None:
        assert len(next(iter(replace(stream, batch_size=9)))[1]) == 9
    else:
        with pytest.raises(ValueError, match="batch_size 9 exceeds the decoder's, 8"):
            replace(stream, batch_size=9)


def test_imports_without_dali() -> None:
    code = "import sys; sys.modules['nvidia.dali'] = None; import fastfundus.training.stream"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_windows_contain_the_sampled_pixels() -> None:
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert source_window(identity, 10, 100, 100) == (0, 0, 12, 12)
    assert source_window(np.array([[1.0, 0, 50], [0, 1, 20]]), 10, 100, 100) == (18, 48, 14, 14)
    # Windows that cross the edge or are completely outside.
    assert source_window(np.array([[1.0, 0, 95], [0, 1, 0]]), 10, 100, 100) == (0, 93, 12, 7)
    assert source_window(np.array([[1.0, 0, 500], [0, 1, 0]]), 10, 100, 100) == (0, 99, 12, 1)
    assert source_window(np.array([[1.0, 0, -500], [0, 1, 0]]), 10, 100, 100) == (0, 0, 12, 1)
