"""Field, crop and quality: against the synthetic truth, and on every real photograph at hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fastfundus.photo import prepare_photo
from fastfundus.photo.field import find_field, shrink
from fastfundus.photo.quality import measure_quality
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo
from tests.conftest import write_rgb
from tests.tolerances import CIRCLE_RADII, SCALED_DECODE_GREY_LEVELS

SPEC = PreprocessSpec(size=224)


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: camera.name)
@pytest.mark.parametrize("seed", range(4))
def test_circle_is_the_drawn_one(tmp_path: Path, camera, seed: int) -> None:  # type: ignore[no-untyped-def]
    photo = draw_photo(seed, camera=camera, eye="LR"[seed % 2], lesions=("haemorrhages",), long_side=900)
    result = prepare_photo(write_rgb(tmp_path / "a.png", photo.image), SPEC)
    truth = photo.field
    assert result.status is Status.OK
    assert result.field is not None
    assert result.field.confidence > 0.8
    assert abs(result.field.x_px - truth.x_px) < CIRCLE_RADII * truth.radius_px
    assert abs(result.field.y_px - truth.y_px) < CIRCLE_RADII * truth.radius_px
    assert abs(result.field.radius_px - truth.radius_px) < CIRCLE_RADII * truth.radius_px


def test_crop_centres_the_field_and_blackens_the_rest(tmp_path: Path) -> None:
    photo = draw_photo(1, camera=CAMERAS[1], long_side=900)
    image = photo.image.copy()
    cv2.putText(image, "PATIENT 42", (5, 40), 0, 1.2, (255, 255, 255), 3)
    result = prepare_photo(write_rgb(tmp_path / "a.png", image), SPEC)
    assert result.image is not None
    rows, columns = np.ogrid[:224, :224]
    outside = np.hypot(rows + 0.5 - 112, columns + 0.5 - 112) > 112
    assert not result.image[outside].any()
    # The field reaches the margin on all four sides.
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
    # Half size would do for the frame, but not for the field in it.
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
        ("missing.jpg", Status.UNREADABLE, "not there"),
        ("folder", Status.UNREADABLE, "cannot be read"),
    ],
)
def test_status_and_reason(broken_photos: Path, name: str, status: Status, reason: str) -> None:
    (broken_photos / "folder").mkdir()
    result = prepare_photo(broken_photos / name, SPEC)
    assert result.status is status
    assert reason in result.reason


def test_unreadable_permission(broken_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may read every file, so the operating system's refusal is played.
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = prepare_photo(broken_photos / "good.jpg", SPEC)
    assert result.status is Status.UNREADABLE
    assert "chmod" in result.reason


def test_landscapes_are_no_fundus(tmp_path: Path) -> None:
    rows = np.linspace(0, 1, 300)[:, None, None]
    sky = np.clip((1 - rows) * np.array([90, 140, 220]) + rows * np.array([60, 130, 50]), 0, 255)
    landscape = np.broadcast_to(sky, (300, 400, 3)).astype(np.uint8)
    result = prepare_photo(write_rgb(tmp_path / "a.png", landscape), SPEC)
    assert result.status is Status.NOT_FUNDUS


def test_quality_finds_spoilt_photos_and_passes_good_ones() -> None:
    """Rates on synthetic photos; the real ones are judged in the evidence, not by a threshold here."""

    def refused(quality: str) -> float:
        flags = []
        for seed in range(12):
            photo = draw_photo(seed, camera=CAMERAS[seed % 4], quality=quality, long_side=640)
            circle = photo.field
            x, y, r = (round(value) for value in (circle.x_px, circle.y_px, circle.radius_px))
            padded = np.pad(photo.image, ((r, r), (r, r), (0, 0)))
            flags.append(measure_quality(padded[y : y + 2 * r, x : x + 2 * r]).score < 0.25)
        return float(np.mean(flags))

    assert refused("good") == 0
    assert refused("dark") >= 0.75
    assert refused("blur") >= 0.75
    assert refused("cut") >= 0.75


def test_quality_does_not_depend_on_resolution() -> None:
    large = draw_photo(7, long_side=1600, quality="blur").image
    small = cv2.resize(large, (400, 400), interpolation=cv2.INTER_AREA)
    assert measure_quality(large).score == pytest.approx(measure_quality(small).score, abs=0.03)


def test_find_field_on_nothing() -> None:
    assert find_field(np.zeros((200, 256, 3), np.uint8)) is None
    assert find_field(np.full((200, 256, 3), 180, np.uint8)) is None


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("pattern", "least_ok"),
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
def test_real_photos(real_data: Path, pattern: str, least_ok: float) -> None:
    paths = sorted(real_data.glob(pattern))[:60]
    assert paths
    results = [prepare_photo(path, SPEC) for path in paths]
    ok = [result for result in results if result.status is Status.OK]
    assert len(ok) >= least_ok * len(results)
    if least_ok == 0:
        assert {result.status for result in results} == {Status.NOT_FUNDUS}
    for result in ok:
        assert result.field is not None
        assert result.image is not None
        assert result.field.confidence > 0.5


@pytest.mark.real_data
def test_real_field_masks(real_data: Path) -> None:
    """DRIVE ships the field as a mask: the circle found must cover the same disc."""
    for image in sorted(real_data.glob("drive/**/*_training.tif")):
        mask_path = image.parents[1] / "mask" / f"{image.stem}_mask.gif"
        with Image.open(mask_path) as stored:
            mask = np.array(stored) > 0
        rgb = cv2.imread(str(image))[..., ::-1]
        small = shrink(np.ascontiguousarray(rgb))
        circle = find_field(small)
        assert circle is not None
        scale = rgb.shape[1] / small.shape[1]
        rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
        distance = np.hypot(columns + 0.5 - circle.x_px * scale, rows + 0.5 - circle.y_px * scale)
        found = distance < circle.radius_px * scale
        dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
        assert dice > 0.985, image.name
