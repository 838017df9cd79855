"""Training straight from camera files: the crops of whole photos, every photo once, on where it stopped."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fastfundus.config import AugmentConfig
from fastfundus.dali.decode import DaliDecoder
from fastfundus.dali.stream import CameraPhoto, CameraStream, window_of
from fastfundus.data import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.kernels import reference
from fastfundus.photo.prepare import decode_at
from fastfundus.train.augment import draw_epoch

AUGMENT = AugmentConfig(scale=0.5, aspect=1.3, shear_degrees=5, rotate_degrees=30)


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder(batch_size=8, threads=2)


@pytest.fixture
def stream(cache: PhotoCache, decoder: DaliDecoder) -> CameraStream:
    rows = np.flatnonzero((cache.manifest["status"] == "ok").to_numpy())[:22]
    return CameraStream(CameraPhoto.of_cache(cache, rows), cache.spec, AUGMENT, decoder, batch_size=4, seed=3)


def test_crops_are_those_of_whole_photos(stream: CameraStream) -> None:
    geometry, colour = draw_epoch(AUGMENT, stream.spec, 22, seed=3, epoch=0)
    stream.spec = replace(stream.spec, mask_outside=False)
    for crops, positions in itertools.islice(stream, 2):
        for crop, n in zip(crops, positions, strict=True):
            photo = stream.photos[n]
            whole = torch.from_numpy(decode_at(photo.path.read_bytes(), 0))
            warp = geometry[n].astype(np.float64) * (photo.side_px / 64)
            warp[:, 2] += photo.left_px, photo.top_px
            place = torch.tensor([0]), torch.tensor([list(whole.shape[:2])], dtype=torch.int32)
            matrices = torch.from_numpy(warp)[None], torch.from_numpy(colour[n : n + 1])
            want = reference.sample(whole.reshape(-1), *place, *matrices, 64, torch.float32)[0]
            # In grey levels: the matrices divide by 255 * 0.22.
            assert 57 * (crop - want).abs().max() < 0.05


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


def test_an_epoch_shows_every_photo_once_on_some_rank(cache: PhotoCache, stream: CameraStream) -> None:
    alone = seen(replace(stream, batch_size=8))
    ranks = [seen(replace(stream, rank=rank, world_size=2)) for rank in range(2)]
    assert len(alone) == len(set(alone)) == 16
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert [len(part) for part in ranks] == [8, 8]
    assert stream.epoch == 0
    first = seen(stream)
    assert (stream.epoch, stream.step) == (1, 0)
    assert seen(stream) != first


def test_a_photo_is_changed_the_same_on_any_rank(stream: CameraStream) -> None:
    def crops(part: CameraStream) -> dict[int, torch.Tensor]:
        return {int(n): crop for batch, positions in part for crop, n in zip(batch, positions, strict=True)}

    alone = crops(replace(stream, batch_size=8))
    for rank in range(2):
        for n, crop in crops(replace(stream, rank=rank, world_size=2)).items():
            assert torch.equal(crop, alone[n])


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_goes_on_where_it_stopped(stream: CameraStream, stop: int) -> None:
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
    with pytest.raises(CheckpointError, match="saved with batch_size 4 and has 8 now"):
        replace(stream, batch_size=8).load_state_dict(stream.state_dict())


def test_bad_files_are_named_and_cost_nothing_else(stream: CameraStream, tmp_path: Path) -> None:
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
        # A whole photo and a window of it have positions of other size, in float32.
        assert (crop - want[n]).abs().max() < 1e-3, n
    assert set(spoilt.faults) <= {broken, tmp_path / "gone.jpg"}
    if 7 in want:
        assert spoilt.faults[tmp_path / "gone.jpg"] == "the file is not there; check the path"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be 0 to world_size - 1 = 1, got 2"),
        ({"batch_size": 12, "world_size": 2}, "22 photos do not fill a batch of 12 on 2 ranks"),
        ({"batch_size": 9}, "batch_size is 9, the decoder takes 8"),
    ],
)
def test_bad_arguments_are_named(stream: CameraStream, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(stream, **changes)


def test_windows_hold_what_is_looked_at() -> None:
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert window_of(identity, 10, 100, 100) == (0, 0, 12, 12)
    assert window_of(np.array([[1.0, 0, 50], [0, 1, 20]]), 10, 100, 100) == (18, 48, 14, 14)
    # Over the edge, and wholly outside.
    assert window_of(np.array([[1.0, 0, 95], [0, 1, 0]]), 10, 100, 100) == (0, 93, 12, 7)
    assert window_of(np.array([[1.0, 0, 500], [0, 1, 0]]), 10, 100, 100) == (0, 99, 12, 1)
    assert window_of(np.array([[1.0, 0, -500], [0, 1, 0]]), 10, 100, 100) == (0, 0, 12, 1)
