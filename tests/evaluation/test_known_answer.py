"""A study with a known answer: pretraining helps if the lesions are shared, and not otherwise.

Two upstream runs use the same photos. One learns the spots of the downstream task, the other learns left from right
eyes, which is unrelated to the spots.
"""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.data import build_cache, list_photos
from fastfundus.spec import PreprocessSpec
from fastfundus.study.run import run_study
from fastfundus.study.tables import write_tables
from fastfundus.synthetic import draw_photo
from tests.conftest import write_rgb

TEXT = """
[study]
folds = 3

[upstream.lesions]
caches = ["upstream"]
config.model.backbone = "test_resnet"
config.data.labels = ["abnormal"]
config.loop.epochs = 14
config.loop.batch_size = 16

[upstream.sides]
caches = ["upstream"]
config.model.backbone = "test_resnet"
config.data.labels = ["left"]
config.augment.flip_horizontal = false
config.loop.epochs = 14
config.loop.batch_size = 16

[tasks.eyes]
caches = ["downstream"]
config.model.backbone = "test_resnet"
config.data.labels = ["abnormal"]
config.loop.epochs = 5
config.loop.batch_size = 8
# Equal for every start: the default rates differ, and five epochs are few.
config.optimizer.learning_rate = 1e-3
config.optimizer.layer_decay = 1.0

[inits]
scratch = "scratch"
lesions = "upstream:lesions"
sides = "upstream:sides"
"""


def draw(folder: Path, patients: int, seed: int) -> None:
    """Draw both eyes of each patient, with six spots if the patient is diseased."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for patient in range(patients):
        rng = np.random.default_rng([seed, patient])
        sick = int(rng.uniform() < 0.5)
        for eye in "LR":
            seeds = [int(rng.integers(2**31)) for _ in range(2)]
            photo = draw_photo(seeds[0], patient_seed=seeds[1], eye=eye, lesions=(), long_side=200)
            image, field = photo.image.copy(), photo.field
            for _ in range(6 * sick):
                angle, reach = rng.uniform(0, 2 * np.pi), field.radius_px * np.sqrt(rng.uniform(0.05, 0.6))
                place = int(field.x_px + reach * np.cos(angle)), int(field.y_px + reach * np.sin(angle))
                cv2.circle(image, place, int(rng.integers(4, 7)), (70, 20, 10), -1, cv2.LINE_AA)
            name = f"{seed}_{patient}_{eye}.png"
            write_rgb(folder / "images" / name, image)
            rows.append((name, f"{seed}p{patient}", sick, int(eye == "L"), int(patient < 2 and sick)))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "patient", "abnormal", "left", "rare"), *rows])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    for name, patients, seed in (("upstream", 120, 1), ("downstream", 30, 2)):
        draw(folder / f"{name}_photos", patients, seed)
        listing = list_photos(folder / f"{name}_photos", labels=folder / f"{name}_photos" / "labels.csv")
        build_cache(listing.photos, folder / name, PreprocessSpec(size=64), source=listing.root)
    return folder


@pytest.mark.long
def test_pretraining_helps_when_lesions_are_shared_and_only_then(sets: Path) -> None:
    (sets / "study.toml").write_text(TEXT)
    study, results = run_study(sets / "study.toml", sets / "study")
    assert not [result.error for result in results if result.error]
    rows = {row["init"]: row for row in write_tables(study, results, sets / "study").rows(named=True)}
    assert rows["lesions"]["difference_low"] > 0
    assert rows["lesions"]["p_holm"] < 0.05
    # A head and features for another question can even hurt; they must not help.
    assert rows["sides"]["difference_low"] < 0
    assert rows["sides"]["difference_high"] < rows["lesions"]["difference"]


@pytest.mark.long
def test_folds_that_lack_a_class(sets: Path) -> None:
    """A finding that only two patients can have fails in every fold, and the tables report it."""
    tasks = TEXT[TEXT.index("[tasks.eyes]") : TEXT.index("[inits]")].replace("epochs = 5", "epochs = 1")
    (sets / "rare.toml").write_text("[study]\nfolds = 3\n" + tasks.replace('"abnormal"', '"rare"'))
    study, results = run_study(sets / "rare.toml", sets / "rare")
    assert all("photos of one class only" in result.error for result in results)
    (row,) = write_tables(study, results, sets / "rare").rows(named=True)
    assert (row["task"], row["init"], row["failed"], row["mean"]) == ("eyes", "scratch", 3, None)
    assert "not estimable" in (sets / "rare" / "table.md").read_text()
    assert "Failed runs" in (sets / "rare" / "study.html").read_text()
