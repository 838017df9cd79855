"""Tests that synthetic photographs are repeatable, match their labels, and resemble retinas."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.errors import ConfigError
from fastfundus.synthetic import CAMERAS, LESIONS, QUALITIES, draw_photo, plan_dataset, write_dataset


def test_equal_arguments_give_equal_bytes() -> None:
    first, second = (draw_photo(9, lesions=("drusen",), long_side=300) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    assert not np.array_equal(first.image, draw_photo(10, lesions=("drusen",), long_side=300).image)


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: camera.name)
@pytest.mark.parametrize("quality", QUALITIES)
def test_frame_and_masks(camera, quality: str) -> None:  # type: ignore[no-untyped-def]
    photo = draw_photo(2, camera=camera, quality=quality, lesions=LESIONS, long_side=400)
    height, width = round(400 / camera.aspect), 400
    assert photo.image.shape == (height, width, 3)
    assert photo.image.dtype == np.uint8
    masks = [photo.vessel_mask, photo.disc_mask, photo.cup_mask, *photo.lesion_masks.values()]
    for mask in masks:
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) <= {0, 255}
    assert tuple(photo.lesion_masks) == LESIONS
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(columns + 0.5 - photo.field.x_px, rows + 0.5 - photo.field.y_px)
    # The notch of some cameras extends 6 % beyond the edge of the field.
    outside = distance > 1.08 * photo.field.radius_px
    assert photo.image[outside].max(initial=0) < 12
    assert not photo.vessel_mask[outside].any()
    if quality == "good":
        assert np.median(photo.image[distance < 0.9 * photo.field.radius_px], axis=0)[0] > 60


@pytest.mark.parametrize("kind", LESIONS)
@pytest.mark.parametrize("eye", ["L", "R"])
def test_a_lesion_changes_only_the_picture_where_it_is(kind: str, eye: str) -> None:
    sick = draw_photo(4, eye=eye, lesions=(kind,), long_side=600)
    assert sick.lesions == (kind,)
    mask = sick.lesion_masks[kind]
    assert mask.any()
    if kind == "cupping":
        area = lambda m: np.count_nonzero(m)  # noqa: E731
        well = draw_photo(4, eye=eye, long_side=600)
        assert area(sick.cup_mask) / area(sick.disc_mask) > 0.45 > area(well.cup_mask) / area(well.disc_mask)
        return
    inside = mask > 0
    around = (cv2.dilate(mask, np.ones((15, 15), np.uint8)) > 0) & ~inside & (sick.vessel_mask == 0)
    around &= sick.disc_mask == 0
    inside &= (sick.vessel_mask == 0) & (sick.disc_mask == 0)
    green = sick.image[..., 1].astype(float)
    darker = green[inside].mean() < green[around].mean()
    assert darker == (kind == "haemorrhages")


def test_vessels_are_darker_than_their_surroundings() -> None:
    photo = draw_photo(6, long_side=900)
    near = cv2.dilate(photo.vessel_mask, np.ones((11, 11), np.uint8)) > 0
    vessel = (photo.vessel_mask > 0) & (photo.disc_mask == 0)
    beside = near & (photo.vessel_mask == 0) & (photo.disc_mask == 0)
    green = photo.image[..., 1].astype(float)
    assert green[vessel].mean() < 0.93 * green[beside].mean()
    # The share of a vessel tree, not of a blot: public masks mark 7 to 16 % of the field.
    share = np.count_nonzero(photo.vessel_mask) / (np.pi * photo.field.radius_px**2)
    assert 0.03 < share < 0.20


def test_the_disc_is_on_the_nasal_side() -> None:
    for seed in range(6):
        for eye, sign in (("R", 1), ("L", -1)):
            photo = draw_photo(seed, eye=eye, long_side=400)
            columns = np.nonzero(photo.disc_mask)[1]
            assert sign * (columns.mean() - photo.field.x_px) > 0


def test_eyes_of_a_patient_share_their_pigment() -> None:
    def colour(photo) -> np.ndarray:  # type: ignore[no-untyped-def]
        return photo.image[photo.image.max(axis=2) > 40].mean(axis=0)

    pairs = [[colour(draw_photo(10 * p + e, patient_seed=p, long_side=200)) for e in (0, 1)] for p in range(8)]
    within = np.mean([np.abs(a - b).mean() for a, b in pairs])
    between = np.mean([np.abs(pairs[i][0] - pairs[i - 1][1]).mean() for i in range(8)])
    assert within < between


def test_plans_begin_alike_and_group_patients() -> None:
    short, long = plan_dataset(5, seed=3), plan_dataset(9, seed=3)
    assert long[:10] == short
    assert [plan.eye for plan in short] == ["L", "R"] * 5
    assert len({plan.patient for plan in short}) == 5
    share = np.mean([bool(plan.lesions) for plan in plan_dataset(1000, seed=0)])
    # Half of the patients are diseased; 70 % of these in both eyes, the others in one: 0.425 of the eyes.
    assert share == pytest.approx(0.425, abs=0.04)  # five standard deviations


def test_written_labels_match_the_plans(tmp_path: Path) -> None:
    plans = write_dataset(tmp_path, 3, seed=2, long_sides=(200,), masks=True, workers=2)
    with (tmp_path / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"images/{plan.stem}.jpg" for plan in plans]
    for row, plan in zip(rows, plans, strict=True):
        assert (tmp_path / row["file"]).is_file()
        assert (tmp_path / "masks" / "disc" / f"{plan.stem}.png").is_file()
        assert int(row["abnormal"]) == int(bool(plan.lesions))
        assert [kind for kind in LESIONS if row[kind] == "1"] == [kind for kind in LESIONS if kind in plan.lesions]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eye": "X"}, "eye 'X'"),
        ({"lesions": ("exudate",)}, "did you mean 'exudates'"),
        ({"quality": "blurr"}, "did you mean 'blur'"),
        ({"long_side": 10}, "64 to 8192"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_photo(0, **arguments)  # type: ignore[arg-type]
