"""Tests of field detection: against the synthetic ground truth, on disturbed frames, and on all available real
photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fastfundus.photo.ellipse import Oval, agreement, explained, fit_circle, fit_oval, outline
from fastfundus.photo.field import Field, find_field, without_margin
from fastfundus.photo.resample import shrink
from fastfundus.synthetic import CAMERAS, SyntheticPhoto, draw_photo
from tests.tolerances import CIRCLE_RADII


def found(rgb: np.ndarray) -> tuple[Field, float]:
    """Return the field, and the number of pixels of `rgb` per pixel of the downscaled image."""
    small, scale = shrink(np.ascontiguousarray(rgb))
    field = find_field(without_margin(small))
    assert field is not None
    return field, scale


def circle_error(
    rgb: np.ndarray, photo: SyntheticPhoto, left: int = 0, top: int = 0, *, confidence: float = 0.8
) -> float:
    """Return the largest error of the centre or radius, in radii."""
    field, scale = found(rgb)
    truth, circle = photo.field, field.circle
    errors = (
        circle.x_px * scale - truth.x_px - left,
        circle.y_px * scale - truth.y_px - top,
        circle.radius_px * scale - truth.radius_px,
    )
    assert field.shape == "round"
    assert circle.confidence > confidence
    return max(map(abs, errors)) / truth.radius_px


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: camera.name)
@pytest.mark.parametrize("seed", range(4))
def test_circle_is_the_drawn_one(camera, seed: int) -> None:  # type: ignore[no-untyped-def]
    photo = draw_photo(seed, camera=camera, eye="LR"[seed % 2], lesions=("haemorrhages",), long_side=900)
    assert circle_error(photo.image, photo) < CIRCLE_RADII


def dark(rgb: np.ndarray) -> np.ndarray:
    return (rgb * 0.15).astype(np.uint8)


def hazy(rgb: np.ndarray) -> np.ndarray:
    return (30 + rgb * 0.6).astype(np.uint8)


def labelled(rgb: np.ndarray) -> np.ndarray:
    rgb = rgb.copy()
    cv2.putText(rgb, "PATIENT 42  OD  2024-05-01", (8, 40), 0, 1.0, (255, 255, 255), 2)
    cv2.putText(rgb, "Canon CR-2", (8, len(rgb) - 12), 0, 1.2, (200, 220, 255), 3)
    return rgb


def barred(rgb: np.ndarray) -> np.ndarray:
    rgb = rgb.copy()
    rgb[:, :14] = (240, 240, 240)
    rgb[-10:] = (90, 90, 200)
    return rgb


def noisy(rgb: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 12, rgb.shape)
    return np.clip(rgb + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [dark, hazy, labelled, barred, noisy], ids=lambda change: change.__name__)
@pytest.mark.parametrize("camera", CAMERAS[:3], ids=lambda camera: camera.name)
def test_circle_survives(change: Callable[[np.ndarray], np.ndarray], camera) -> None:  # type: ignore[no-untyped-def]
    photo = draw_photo(5, camera=camera, long_side=900)
    # A bar that covers part of the field edge reduces the confidence.
    least = 0.6 if change is barred else 0.8
    assert circle_error(change(photo.image), photo, confidence=least) < 1.5 * CIRCLE_RADII


@pytest.mark.parametrize("tone", [255, 128], ids=["white", "grey"])
def test_a_margin_is_no_field(tone: int) -> None:
    photo = draw_photo(1, camera=CAMERAS[1], long_side=900)
    framed = cv2.copyMakeBorder(photo.image, 60, 60, 90, 90, cv2.BORDER_CONSTANT, value=(tone,) * 3)
    assert circle_error(framed, photo, 90, 60) < CIRCLE_RADII
    small, _ = shrink(photo.image)
    assert without_margin(small) is small


def test_an_overexposed_field_that_touches_the_edge_is_no_margin() -> None:
    photo = draw_photo(2, camera=CAMERAS[2], long_side=900)
    bright = photo.image.copy()
    bright[-200:][photo.image[-200:].max(axis=2) > 20] = 255
    small, _ = shrink(bright)
    assert without_margin(small) is small


def test_an_off_centre_field() -> None:
    photo = draw_photo(3, long_side=700)
    frame = np.zeros((900, 1500, 3), np.uint8)
    frame[150:850, 750:1450] = photo.image
    assert circle_error(frame, photo, 750, 150) < CIRCLE_RADII
    # A fifth of the field is beyond the edge of the image.
    assert circle_error(frame[:, :1310], photo, 750, 150) < 2 * CIRCLE_RADII


@pytest.mark.parametrize("width", [0.65, 0.8, 0.9])
@pytest.mark.parametrize("cut", [0.0, 0.12], ids=["whole", "cut"])
def test_a_squeezed_field_is_an_oval_that_lies_within_the_circle(width: float, cut: float) -> None:
    """Exports to a square squeeze wide frames, as in ODIR; a single arc of an ellipse fits a circle that is far too
    large."""
    photo = draw_photo(4, long_side=900)
    top = round(cut * 900)
    squeezed = cv2.resize(photo.image[top : 900 - top], (round(900 * width), 900 - 2 * top))
    field, scale = found(squeezed)
    assert field.shape == "oval"
    assert field.oval.half_width / field.oval.half_height == pytest.approx(width, rel=0.04)
    rows, columns = np.nonzero(field.mask)
    distance = np.hypot(columns + 0.5 - field.circle.x_px, rows + 0.5 - field.circle.y_px)
    assert np.mean(distance <= field.circle.radius_px) > 0.99
    assert field.circle.radius_px * scale < 1.05 * photo.field.radius_px


def test_a_montage_is_irregular_and_whole() -> None:
    photo = draw_photo(6, long_side=400)
    frame = np.zeros((600, 800, 3), np.uint8)
    frame[:400, :400] = photo.image
    np.maximum(frame[150:550, 300:700], photo.image, out=frame[150:550, 300:700])
    field, _ = found(frame)
    assert field.shape == "irregular"
    assert field.circle.confidence < 0.8


def test_nothing_to_find() -> None:
    assert find_field(np.zeros((200, 256, 3), np.uint8)) is None
    assert find_field(np.full((200, 256, 3), 180, np.uint8)) is None
    # Cropped inside the field, so there is no dark frame.
    small, _ = shrink(draw_photo(7, long_side=900).image[250:650, 250:650])
    assert find_field(small) is None


def test_completeness_counts_what_is_missing_and_says_where() -> None:
    photo = draw_photo(8, long_side=600)
    share, missing = found(photo.image)[0].completeness()
    assert share > 0.97
    assert missing == ()
    covered = photo.image.copy()
    covered[:220] = 0
    share, missing = found(covered)[0].completeness()
    assert 0.5 < share < 0.85
    assert missing == ("top",)


def test_fits_by_hand() -> None:
    angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    points = np.stack([100 + 60 * np.cos(angle), 80 + 60 * np.sin(angle)], axis=1)
    circle = fit_circle(points, (160, 200))
    assert circle is not None
    np.testing.assert_allclose((circle.x, circle.y, circle.half_width), (100, 80, 60), atol=1e-6)
    assert explained(points, circle) == 1
    # A third of the points are on a straight edge, as from an eyelid.
    edge = np.stack([np.linspace(60, 140, 50), np.full(50, 55.0)], axis=1)
    circle = fit_circle(np.concatenate([points, edge]), (160, 200))
    assert circle is not None
    np.testing.assert_allclose((circle.x, circle.y, circle.half_width), (100, 80, 60), atol=0.5)
    squeezed = points * [0.7, 1]
    oval = fit_oval(squeezed, (160, 200))
    assert oval is not None
    np.testing.assert_allclose((oval.x, oval.y, oval.half_width, oval.half_height), (70, 80, 42, 60), atol=1e-6)
    # Collinear points are on no circle.
    assert fit_circle(np.stack([np.arange(50.0), np.arange(50.0)], axis=1), (160, 200)) is None


def test_agreement_by_hand() -> None:
    mask = np.zeros((160, 200), np.uint8)
    cv2.circle(mask, (100, 80), 60, 255, -1)
    assert agreement(mask, Oval(100.5, 80.5, 60.5, 60.5)) > 0.98
    assert agreement(mask, Oval(100.5, 80.5, 80, 80)) < 0.1
    assert agreement(mask, Oval(120.5, 80.5, 60.5, 60.5)) < 0.4
    (contour,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = outline(contour, mask.shape)
    assert 150 < len(points) < 400
    # Points are on the outer edge of the outermost pixels: a drawn circle of radius 60 covers 59.5 to 60.5.
    assert np.hypot(*(points - [100.5, 80.5]).T).mean() == pytest.approx(60.0, abs=0.3)


def test_agreement_with_the_centre_out_of_the_picture() -> None:
    """Regression test found by fuzzing: the outer side of the edge is visible, the inner one is not."""
    mask = np.zeros((128, 192), np.uint8)
    cv2.circle(mask, (185, 64), 40, 255, -1)
    for x in (185.0, 195.0, 230.0, 260.0):
        assert 0 <= agreement(mask, Oval(x, 64, 60, 60)) <= 1


def real_photos(folder: Path) -> list[Path]:
    kinds = {".jpg", ".jpeg", ".png", ".tif"}
    names = ("dme", "drishti/images", "drive/images", "eyepacs", "fullres_dr", "hard", "hrf/images", "idrid/images")
    paths = [path for name in (*names, "rfmid") for path in (folder / name).iterdir()]
    return sorted(path for path in paths if path.suffix.lower() in kinds)


@pytest.mark.real_data
def test_every_real_photograph_has_its_circle(real_data: Path) -> None:
    """All of them were inspected visually; the four without a field edge were cropped inside the field."""
    paths = real_photos(real_data)
    assert len(paths) > 80
    without = []
    for path in paths:
        small, _ = shrink(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))
        field = find_field(without_margin(small))
        if field is None:
            without.append(path.stem)
        else:
            assert field.shape == "round", path.name
            assert field.circle.confidence > 0.85, path.name
    assert without == ["1303_OD_f_4", "1311_OD_f_1", "1319_OI_f_4", "1321_OI_f_4"]


@pytest.mark.real_data
def test_real_field_masks(real_data: Path) -> None:
    """DRIVE provides field masks: the detected circle must cover the same disc."""
    for image in sorted(real_data.glob("drive/**/*_training.tif")):
        with Image.open(image.parents[1] / "mask" / f"{image.stem}_mask.gif") as stored:
            mask = np.array(stored) > 0
        field, scale = found(cv2.imread(str(image))[..., ::-1])
        rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
        circle = field.circle
        distance = np.hypot(columns + 0.5 - circle.x_px * scale, rows + 0.5 - circle.y_px * scale)
        covered = distance < circle.radius_px * scale
        dice = 2 * (covered & mask).sum() / (covered.sum() + mask.sum())
        assert dice > 0.985, image.name
