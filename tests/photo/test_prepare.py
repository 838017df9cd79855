"""Tests of preprocessing: crops, rejections with their reasons, and all available real photographs."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.photo import prepare_photo
from fastfundus.photo.prepare import decode_reduced
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo
from tests.conftest import write_rgb
from tests.tolerances import SCALED_DECODE_GREY_LEVELS

SPEC = PreprocessSpec(size=224)


def test_crop_centres_the_field_and_blackens_the_rest(tmp_path: Path) -> None:
    photo = draw_photo(1, camera=CAMERAS[1], long_side=900)
    image = photo.image.copy()
    cv2.putText(image, "PATIENT 42", (5, 40), 0, 1.2, (255, 255, 255), 3)
    result = prepare_photo(write_rgb(tmp_path / "a.png", image), SPEC)
    assert result.image is not None
    rows, columns = np.ogrid[:224, :224]
    outside = np.hypot(rows + 0.5 - 112, columns + 0.5 - 112) > 112
    assert not result.image[outside].any()
    # The field extends to the margin on all four sides.
    lit = result.image.max(axis=2) > 30
    for line in (lit[6], lit[-7], lit[:, 6], lit[:, -7]):
        assert line.any()
    plain = prepare_photo(write_rgb(tmp_path / "b.png", photo.image), SPEC)
    np.testing.assert_array_equal(result.image, plain.image)


def test_a_cut_top_is_filled_with_black(tmp_path: Path) -> None:
    photo = draw_photo(2, camera=CAMERAS[2], long_side=900)
    result = prepare_photo(write_rgb(tmp_path / "a.png", photo.image), SPEC)
    assert result.image is not None
    assert result.image.shape == (224, 224, 3)
    assert not result.image[:4].any()
    assert result.image[112, 112].any()


def test_small_field_in_a_large_frame_is_decoded_at_full_size(tmp_path: Path) -> None:
    photo = draw_photo(4, long_side=600)
    frame = np.zeros((1300, 1300, 3), np.uint8)
    frame[400:1000, 300:900] = photo.image
    # Half size would be enough for the frame, but not for the field in it.
    spec = PreprocessSpec(size=512)
    path = write_rgb(tmp_path / "a.jpg", frame, cv2.IMWRITE_JPEG_QUALITY, 95)
    result = prepare_photo(path, spec)
    exact = prepare_photo(write_rgb(tmp_path / "a.png", frame), spec)
    assert result.image is not None
    assert exact.image is not None
    assert np.abs(result.image.astype(float) - exact.image).mean() < SCALED_DECODE_GREY_LEVELS


def test_scaled_decode_is_close_to_a_full_one(tmp_path: Path) -> None:
    photo = draw_photo(5, camera=CAMERAS[1], long_side=2400)
    path = write_rgb(tmp_path / "a.jpg", photo.image, cv2.IMWRITE_JPEG_QUALITY, 95)
    full = cv2.imread(str(path))[..., ::-1]
    scaled = prepare_photo(path, SPEC)
    exact = prepare_photo(write_rgb(tmp_path / "a.png", full), SPEC)
    assert scaled.image is not None
    assert exact.image is not None
    assert np.abs(scaled.image.astype(float) - exact.image).mean() < SCALED_DECODE_GREY_LEVELS


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("black.png", Status.UNGRADABLE, "black"),
        ("grey_as_rgb.png", Status.UNSUPPORTED, "grey"),
        ("deep.png", Status.OK, ""),
        ("missing.jpg", Status.UNREADABLE, "file not found"),
        ("folder", Status.UNREADABLE, "cannot be read: it is a folder"),
    ],
)
def test_status_and_reason(broken_photos: Path, name: str, status: Status, reason: str) -> None:
    (broken_photos / "folder").mkdir()
    result = prepare_photo(broken_photos / name, SPEC)
    assert result.status is status
    assert reason in result.reason


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    # Reading a pipe without a writer would hang.
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero")):
        result = prepare_photo(path, SPEC)
        assert result.status is Status.UNREADABLE
        assert "not a regular file" in result.reason


def test_a_gzipped_photo_is_unpacked(tmp_path: Path) -> None:
    """STARE is published as .ppm.gz."""
    photo = draw_photo(1, long_side=600)
    plain = write_rgb(tmp_path / "a.ppm", photo.image)
    packed = tmp_path / "a.ppm.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    result = prepare_photo(packed, SPEC)
    assert result.status is Status.OK
    np.testing.assert_array_equal(result.image, prepare_photo(plain, SPEC).image)
    packed.write_bytes(packed.read_bytes()[:-2000])
    assert prepare_photo(packed, SPEC).reason == "the gzip file is incomplete; copy it again"
    packed.write_bytes(gzip.compress(b"\0" * (65 << 20), 1))
    assert "unpacks to more than 64 MiB" in prepare_photo(packed, SPEC).reason


def test_a_wrong_ending_does_not_matter(tmp_path: Path) -> None:
    photo = draw_photo(1, long_side=600)
    png = write_rgb(tmp_path / "a.png", photo.image)
    wrong = png.rename(tmp_path / "a.jpg")
    assert prepare_photo(wrong, SPEC).status is Status.OK


def test_a_margin_is_black_in_the_crop(tmp_path: Path) -> None:
    photo = draw_photo(1, camera=CAMERAS[2], long_side=900)
    framed = cv2.copyMakeBorder(photo.image, 80, 80, 80, 80, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    result = prepare_photo(write_rgb(tmp_path / "a.png", framed), SPEC)
    assert result.status is Status.OK
    plain = prepare_photo(write_rgb(tmp_path / "b.png", photo.image), SPEC)
    # This field is cut at the top and bottom, where the white margin would be visible.
    assert np.abs(result.image.astype(int) - plain.image).mean() < 3
    assert not result.image[:8].any()


def test_unreadable_permission(broken_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser can read every file, so simulate the operating system's refusal.
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    result = prepare_photo(broken_photos / "good.jpg", SPEC)
    assert result.status is Status.UNREADABLE
    assert "chmod" in result.reason


def test_a_wide_field_picture_is_no_standard_photograph(tmp_path: Path) -> None:
    """Synthetic imitation of scanning wide-field cameras; no real image is available."""
    retina = draw_photo(3, long_side=1200).image[100:1100, 100:1100].astype(np.float32).mean(axis=2)
    frame = np.zeros((768, 1024), np.uint8)
    cv2.ellipse(frame, (512, 384), (500, 300), 0, 0, 360, 255, -1)
    tone = cv2.resize(retina, (1024, 768)) * (frame > 0)
    picture = np.stack([tone * 0.95, tone * 0.9, tone * 0.05], axis=2).astype(np.uint8)
    result = prepare_photo(write_rgb(tmp_path / "a.png", picture), SPEC)
    assert result.status is Status.NOT_FUNDUS
    assert "wide-field" in result.reason


def test_the_whole_frame_can_be_asked_for(tmp_path: Path) -> None:
    photo = draw_photo(1, camera=CAMERAS[1], long_side=900)
    path = write_rgb(tmp_path / "a.png", photo.image)
    result = prepare_photo(path, PreprocessSpec(size=224, field="frame", mask_outside=False))
    assert (result.status, result.field) == (Status.OK, None)
    side = photo.image.shape[0]
    left = (photo.image.shape[1] - side) // 2
    exact = cv2.resize(photo.image[:, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(result.image, exact)


@pytest.mark.parametrize("shape", [(64, 6400), (6400, 64), (300, 1600)])
def test_a_strip_is_no_fundus(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Regression test found by fuzzing: shrinking to 192 pixels leaves nothing of the short side."""
    strip = np.full((*shape, 3), (180, 90, 40), np.uint8)
    result = prepare_photo(write_rgb(tmp_path / "a.png", strip), SPEC)
    assert result.status is Status.NOT_FUNDUS
    assert "strip" in result.reason


def test_a_round_thing_of_other_colours_is_no_fundus(tmp_path: Path) -> None:
    plate = np.zeros((600, 800, 3), np.uint8)
    cv2.circle(plate, (400, 300), 250, (60, 120, 210), -1)
    result = prepare_photo(write_rgb(tmp_path / "a.png", plate), SPEC)
    assert result.status is Status.NOT_FUNDUS


def test_landscapes_are_no_fundus(tmp_path: Path) -> None:
    rows = np.linspace(0, 1, 300)[:, None, None]
    sky = np.clip((1 - rows) * np.array([90, 140, 220]) + rows * np.array([60, 130, 50]), 0, 255)
    landscape = np.broadcast_to(sky, (300, 400, 3)).astype(np.uint8)
    result = prepare_photo(write_rgb(tmp_path / "a.png", landscape), SPEC)
    assert result.status is Status.NOT_FUNDUS


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("pattern", "min_ok"),
    [
        ("dr/images/*.jpg", 0.99),
        ("fullres_dr/*.jpg", 1.0),
        ("drive/**/*.tif", 1.0),
        ("hrf/images/*", 1.0),
        ("idrid/images/*", 1.0),
        ("drishti/images/*", 1.0),
        ("eyepacs/*", 1.0),
        ("hard/*", 1.0),
        ("exif/*", 0.0),
    ],
)
def test_real_photos(real_data: Path, pattern: str, min_ok: float) -> None:
    paths = sorted(real_data.glob(pattern))[:60]
    assert paths
    results = [prepare_photo(path, SPEC) for path in paths]
    ok = [result for result in results if result.status is Status.OK]
    assert len(ok) >= min_ok * len(results)
    if min_ok == 0:
        assert {result.status for result in results} == {Status.NOT_FUNDUS}
    for result in ok:
        assert result.field is not None
        assert result.image is not None
        assert result.field.confidence > 0.8


@pytest.mark.parametrize(
    ("most", "divisor"), [(0.5, 1), (1.0, 1), (1.99, 1), (2.0, 2), (3.99, 2), (7.9, 4), (8.0, 8), (100.0, 8)]
)
def test_a_photo_is_decoded_at_most_so_many_times_smaller(most: float, divisor: int) -> None:
    rgb = draw_photo(3, long_side=640).image
    for form, expected in ((".jpg", divisor), (".png", 1)):
        data = cv2.imencode(form, rgb[..., ::-1])[1].tobytes()
        got, found = decode_reduced(data, most)
        assert found == expected
        assert got.shape == (-(-rgb.shape[0] // expected), -(-rgb.shape[1] // expected), 3)
        # Each pixel is the mean of the pixels it covers, apart from the effect of the DCT at edges.
        height, width = rgb.shape[0] // divisor * divisor, rgb.shape[1] // divisor * divisor
        if form == ".jpg":
            want = rgb[:height, :width].reshape(height // divisor, divisor, -1, divisor, 3).mean(axis=(1, 3))
            apart = np.abs(want - got[: height // divisor, : width // divisor])
            assert apart.mean() < SCALED_DECODE_GREY_LEVELS
