"""Tests of the quality check: poor photos are rejected with the right reason, good ones pass, at any resolution."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.photo import PreparedPhoto, prepare_photo
from fastfundus.photo.quality import MARKS, MIN_QUALITY, Quality, measure_quality
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo
from tests.conftest import write_rgb

SPEC = PreprocessSpec(size=256)


def prepared(folder: Path, rgb: np.ndarray) -> PreparedPhoto:
    return prepare_photo(write_rgb(folder / "photo.png", rgb), SPEC)


@pytest.mark.parametrize(
    ("quality", "reason", "least"), [("dark", "too dark", 9), ("blur", "out of focus", 9), ("cut", "field", 12)]
)
def test_spoilt_photos_are_refused_for_the_right_reason(tmp_path: Path, quality: str, reason: str, least: int) -> None:
    """Rates on synthetic photos; real photos are assessed in the published evidence, not by a threshold here."""
    results = []
    for seed in range(12):
        photo = draw_photo(seed, camera=CAMERAS[seed % 4], quality=quality, long_side=640)
        results.append(prepared(tmp_path, photo.image))
    refused = [result for result in results if result.status is Status.UNGRADABLE]
    assert len(refused) >= least
    assert sum(reason in result.reason for result in refused) >= least


def test_good_photos_pass_with_any_finding_and_camera(tmp_path: Path) -> None:
    for seed in range(12):
        lesions = ((), ("exudates", "haemorrhages"), ("drusen",), ("cupping",))[seed % 4]
        photo = draw_photo(seed, camera=CAMERAS[seed // 3], lesions=lesions, long_side=640)
        assert prepared(tmp_path, photo.image).status is Status.OK


def test_each_fault_has_its_words(tmp_path: Path) -> None:
    photo = draw_photo(0, long_side=640).image
    lit = photo.max(axis=2, keepdims=True) > 20
    faults = {
        "too bright": np.where(lit, np.clip(photo.astype(float) * 3 + 100, 0, 255), photo),
        "haze": np.where(lit, 110 + 0.08 * photo.astype(float), photo),
        "field cut at top": np.where(np.arange(640)[:, None, None] < 300, 0, photo),
        "field cut at left": np.where(np.arange(640)[None, :, None] < 300, 0, photo),
        "unnatural colours": np.where(lit & (np.arange(640)[None, :, None] < 400), photo[..., [2, 1, 0]], photo),
    }
    for reason, rgb in faults.items():
        result = prepared(tmp_path, rgb.astype(np.uint8))
        assert (result.status, reason in result.reason) == (Status.UNGRADABLE, True), (reason, result.reason)


@pytest.mark.parametrize("quality", ["good", "blur", "dark"])
def test_the_score_does_not_depend_on_resolution(quality: str) -> None:
    large = draw_photo(7, long_side=1600, quality=quality).image
    scores = [measure_quality(cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA)) for side in (400, 800)]
    for smaller in scores:
        for mark in MARKS:
            # Halving by 2x2 blocks differs from interpolation by at most a twentieth of the scale from 0 to 1.
            assert getattr(smaller, mark) == pytest.approx(getattr(measure_quality(large), mark), abs=0.05)


def test_marks_by_hand() -> None:
    black = measure_quality(np.zeros((300, 300, 3), np.uint8))
    assert black.score == 0
    flat = np.full((300, 300, 3), (200, 90, 40), np.uint8)
    quality = measure_quality(flat, 0.85, ())
    assert (quality.exposure, quality.completeness, quality.colour) == (1, 1, 1)
    # The inside of the circle is flat, without any detail.
    assert quality.sharpness == 0
    assert quality.contrast == 0
    assert measure_quality(flat, 0.675, ()).completeness == pytest.approx(0.5)


def test_reasons_by_hand() -> None:
    fine = dict.fromkeys(MARKS, 1.0)
    assert Quality(**fine).reason == ""
    assert Quality(**fine).score == 1
    assert Quality(**{**fine, "exposure": 0.1}).reason == "too dark"
    assert Quality(**{**fine, "exposure": 0.1}, too_bright=True).reason == "too bright"
    poor = Quality(**{**fine, "sharpness": 0.2, "completeness": 0.2}, missing=("top", "left"))
    assert poor.reason == "out of focus, field cut at top and left"
    assert poor.score == 0.2 < MIN_QUALITY
    assert "most of the field" in Quality(**{**fine, "completeness": 0.0}).reason
