"""Pictures of other things are no fundus photographs; retinas are, however they are turned, cut or coloured."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bench.evidence import photos
from fastfundus.photo import prepare_photo
from fastfundus.photo.fundus_check import measure_texture
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo
from tests.conftest import write_rgb

SPEC = PreprocessSpec(size=224)
Rgb = NDArray[np.uint8]


def everyday_photos() -> dict[str, Rgb]:
    """Photographs and drawings that scikit-image, scikit-learn and Matplotlib install."""
    files = photos.everyday_photos()["other things, packages"]
    found = {file.name: cv2.imread(str(file), cv2.IMREAD_COLOR_RGB) for file in files}
    assert {"coffee.png", "chelsea.png", "astronaut.png", "flower.jpg", "grace_hopper.jpg"} <= found.keys()
    return found


def cuts(photo: Rgb) -> list[Rgb]:
    """The whole photo, five squares of it, and the same in sepia, whose colours are a retina's."""
    height, width = photo.shape[:2]
    side = int(0.6 * min(height, width))
    corners = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side)]
    corners.append(((height - side) // 2, (width - side) // 2))
    parts = [photo, *(photo[top : top + side, left : left + side] for top, left in corners)]
    grey = [part.mean(axis=2, keepdims=True) for part in parts]
    return parts + [(part * [1.0, 0.62, 0.35]).astype(np.uint8) for part in grey]


def test_everyday_photos_are_refused(tmp_path: Path) -> None:
    accepted, seen = [], 0
    for name, photo in everyday_photos().items():
        for number, part in enumerate(cuts(photo)):
            result = prepare_photo(write_rgb(tmp_path / "photo.png", part), SPEC)
            seen += 1
            if result.status is Status.OK:
                accepted.append((name, number))
    assert seen > 300
    assert not [name for name, number in accepted if number == 0], "whole photos"
    # A corner of a brown table, or a drawing in sepia, is harder than what reaches a screening programme.
    assert len(accepted) <= 0.01 * seen, accepted


def test_textures_are_refused(tmp_path: Path) -> None:
    """Marble, wood, fur and waves, drawn in the colours of a retina."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:400, :400] / 400
    noise = {octave: cv2.resize(generator.normal(size=(octave, octave)), (400, 400)) for octave in (8, 32, 100, 200)}
    drawn = {
        "marble": np.sin(20 * x + 3 * noise[8]),
        "wood": np.sin(90 * np.hypot(x - 0.3, y - 0.5) + noise[8]),
        "fur": noise[200],
        "waves": np.sin(60 * y + 2 * noise[32]),
        "checks": np.sign(np.sin(40 * x) * np.sin(40 * y)),
    }
    for name, height in drawn.items():
        grey = 128 + 80 * height[..., None] / np.abs(height).max()
        photo = np.clip(grey * [1.3, 0.8, 0.45], 0, 255).astype(np.uint8)
        result = prepare_photo(write_rgb(tmp_path / "photo.png", photo), SPEC)
        assert result.status is Status.NOT_FUNDUS, name


def variants(photo: Rgb) -> dict[str, Rgb]:
    side = photo.shape[0]
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), 37, 1.0)
    inner = slice(int(0.2 * side), int(0.8 * side))
    warm = np.clip(photo * [1.15, 0.9, 0.7], 0, 255).astype(np.uint8)
    return {
        "as taken": photo,
        "turned": cv2.warpAffine(photo, turn, (side, side), flags=cv2.INTER_LINEAR),
        "mirrored": np.ascontiguousarray(photo[:, ::-1]),
        "cut inside the field": np.ascontiguousarray(photo[inner, inner]),
        "warmer": warm,
        "darker": (photo * 0.7).astype(np.uint8),
        "small": cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA),
    }


def test_retinas_are_accepted_in_any_position_and_colour(tmp_path: Path) -> None:
    for seed in range(8):
        lesions = ((), ("exudates", "haemorrhages"), ("drusen",), ("cupping",))[seed % 4]
        photo = draw_photo(seed, camera=CAMERAS[seed % 4], lesions=lesions, long_side=640).image
        for name, variant in variants(photo).items():
            result = prepare_photo(write_rgb(tmp_path / "photo.png", variant), SPEC)
            assert result.status is not Status.NOT_FUNDUS, (seed, name, result.reason)


@pytest.mark.real_data
def test_real_retinas_are_accepted_in_any_position_and_colour(real_data: Path, tmp_path: Path) -> None:
    paths = sorted((real_data / "odir").rglob("*.jpg"))[::80] + sorted((real_data / "dr").rglob("*.jpg"))[::40]
    refused, seen = [], 0
    for path in paths:
        if prepare_photo(path, SPEC).status is not Status.OK:
            continue
        photo = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        for name, variant in variants(photo[:, : photo.shape[0]]).items():
            seen += 1
            if prepare_photo(write_rgb(tmp_path / "photo.png", variant), SPEC).status is Status.NOT_FUNDUS:
                refused.append(f"{path.name} {name}")
    assert seen > 100
    assert not refused


def test_the_check_takes_less_than_a_millisecond() -> None:
    """Not a benchmark: an order of magnitude, so that nobody adds a network here."""
    small = draw_photo(0, long_side=192).image
    mask = ((small.max(axis=2) > 20) * 255).astype(np.uint8)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        measure_texture(small, mask)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.005
