"""Splits: no patient and no photo on two sides, balanced, repeatable."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import polars as pl
import pytest

from fastfundus.config import DataConfig
from fastfundus.data.split import assign_splits, group_photos
from fastfundus.errors import DataError


def manifest(
    patients: list[str], split: list[str | None] | None = None, hashes: list[str] | None = None
) -> pl.DataFrame:
    count = len(patients)
    return pl.DataFrame(
        {
            "path": [f"{index}.jpg" for index in range(count)],
            "sha256": hashes or [f"{index:064x}" for index in range(count)],
            "patient": patients,
            "split": pl.Series(split or [None] * count, dtype=pl.String),
        }
    )


def many(patients: int = 60) -> tuple[pl.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    names = [f"p{index // 2}" for index in range(2 * patients)]
    return manifest(names), (rng.uniform(size=2 * patients) < 0.3).astype(float)


def test_equal_bytes_tie_patients_together() -> None:
    groups = group_photos(["a", "b", "c", "a", "d"], ["1", "2", "3", "2", "4"])
    assert groups.tolist() == [0, 0, 1, 0, 2]


@pytest.mark.parametrize("fold", range(5))
def test_no_patient_on_two_sides_and_labels_balanced(fold: int) -> None:
    table, labels = many()
    names = assign_splits(table, labels, DataConfig(fold=fold))
    sides = defaultdict(set)
    for patient, name in zip(table["patient"], names, strict=True):
        sides[patient].add(name)
    assert all(len(side) == 1 for side in sides.values())
    for name, share in [("train", 0.6), ("val", 0.2), ("test", 0.2)]:
        chosen = np.array([value == name for value in names])
        assert chosen.mean() == pytest.approx(share, abs=0.03)
        assert labels[chosen].mean() == pytest.approx(labels.mean(), abs=0.08)


def test_folds_tile_the_photos_and_repeat() -> None:
    table, labels = many()
    folds = [assign_splits(table, labels, DataConfig(fold=fold)) for fold in range(5)]
    tested = [[fold[row] for fold in folds].count("test") for row in range(len(table))]
    assert set(tested) == {1}
    assert assign_splits(table, labels, DataConfig(fold=2)) == folds[2]
    assert assign_splits(table, labels, DataConfig(fold=2, split_seed=1)) != folds[2]


def test_fixed_splits_are_kept() -> None:
    names: list[str | None] = ["train", "train", "val", "val", "test", "test", None, "excluded"]
    table = manifest(list("abcdefgh"), names)
    got = assign_splits(table, np.array([0, 1] * 4, float), DataConfig())
    assert got == ["train", "train", "val", "val", "test", "test", "excluded", "excluded"]


def test_fixed_splits_torn_by_equal_photos_are_refused() -> None:
    names: list[str | None] = ["train", "train", "val", "val", "test", "test"]
    table = manifest(list("abcdef"), names, hashes=["1", "2", "3", "4", "5", "1"])
    with pytest.raises(DataError, match=r"0.jpg .train. and 5.jpg .test. belong to one patient or are the same photo"):
        assign_splits(table, np.array([0, 1] * 3, float), DataConfig())


def test_too_little_is_said() -> None:
    with pytest.raises(DataError, match="3 patients cannot fill 5 folds"):
        assign_splits(manifest(["a", "b", "c"]), np.array([0.0, 1, 0]), DataConfig())
    table, _ = many()
    with pytest.raises(DataError, match="split has only label 0"):
        assign_splits(table, np.zeros(len(table)), DataConfig())
