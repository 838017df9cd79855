"""Splits: patient-grouped, free of duplicates across sides, stratified and reproducible."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from fastfundus.config import DataConfig
from fastfundus.data.deal import deal_groups, group_photos
from fastfundus.data.split import assign_splits, read_split_file, write_split_file
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


def largest_spread(fold: np.ndarray, strata: np.ndarray) -> float:
    """Return the largest standard deviation over five folds of the share of a class."""
    table = np.zeros((5, strata.max() + 1))
    np.add.at(table, (fold, strata), 1)
    return float((table / np.maximum(table.sum(axis=0), 1)).std(axis=0).max())


@pytest.mark.parametrize(
    ("photos", "classes", "each"), [(60, 2, 2), (300, 2, 2), (1601, 2, 2), (4000, 8, 2), (4000, 5, 6), (3000, 10, 3)]
)
def test_folds_are_as_balanced_as_those_of_scikit_learn(photos: int, classes: int, each: int) -> None:
    generator = np.random.default_rng(photos + classes)
    groups = np.unique(generator.integers(0, photos // each, photos), return_inverse=True)[1]
    strata = generator.choice(classes, photos, p=generator.dirichlet(np.ones(classes)))
    ours = deal_groups(groups, strata, 5, seed=0)
    peer = np.empty(photos, np.int64)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # It warns of classes with fewer photos than folds.
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, test) in enumerate(splitter.split(np.zeros(photos), strata, groups)):
            peer[test] = number
    counts = np.bincount(strata)
    # One photo of the rarest class is the step in which either can differ.
    assert largest_spread(ours, strata) <= largest_spread(peer, strata) + 0.5 / counts[counts > 0].min()
    assert np.ptp(np.bincount(ours, minlength=5)) <= max(np.ptp(np.bincount(peer, minlength=5)), 2 * each)
    assert len(np.unique(groups * 5 + ours)) == groups.max() + 1, "a group is never divided"


def test_half_a_million_photos_are_dealt_at_once() -> None:
    """Folds of interchangeable patients differ by a few photos."""
    generator = np.random.default_rng(0)
    groups = np.unique(generator.integers(0, 250_000, 500_000), return_inverse=True)[1]
    strata = (generator.random(500_000) < 0.1).astype(np.int64)
    fold = deal_groups(groups, strata, 5, seed=0)
    assert np.ptp(np.bincount(fold)) < 20
    assert largest_spread(fold, strata) < 1e-3
    assert not np.array_equal(fold, deal_groups(groups, strata, 5, seed=1))


def test_equal_bytes_tie_patients_together() -> None:
    groups = group_photos(["a", "b", "c", "a", "d"], ["1", "2", "3", "2", "4"])
    assert groups.tolist() == [0, 0, 1, 0, 2]


@pytest.mark.parametrize("fold", range(5))
def test_no_patient_on_two_sides_and_labels_balanced(fold: int) -> None:
    table, labels = many()
    names = assign_splits(table, labels, DataConfig(fold=fold)).names
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
    folds = [assign_splits(table, labels, DataConfig(fold=fold)).names for fold in range(5)]
    tested = [[fold[row] for fold in folds].count("test") for row in range(len(table))]
    assert set(tested) == {1}
    assert assign_splits(table, labels, DataConfig(fold=2)).names == folds[2]
    assert assign_splits(table, labels, DataConfig(fold=2, split_seed=1)).names != folds[2]


def test_fixed_splits_are_kept() -> None:
    names: list[str | None] = ["train", "train", "val", "val", "test", "test", None, "excluded"]
    table = manifest(list("abcdefgh"), names)
    got = assign_splits(table, np.array([0, 1] * 4, float), DataConfig()).names
    assert got == ["train", "train", "val", "val", "test", "test", "excluded", "excluded"]


def test_missing_sides_are_drawn_from_training() -> None:
    table, labels = many(100)
    sides = ["test" if patient in table["patient"][:40].to_list() else "train" for patient in table["patient"]]
    fixed = table.with_columns(split=pl.Series(sides))
    split = assign_splits(fixed, labels, DataConfig(val_share=0.2))
    assert [name == "test" for name in split.names] == [name == "test" for name in sides]
    assert split.names.count("val") == pytest.approx(0.2 * sides.count("train"), abs=4)
    assert split.names[::2] == split.names[1::2]
    assert split.notes == [
        f"the given split has no val: moved {split.names.count('val')} photos to val from the training patients "
        "(data.val_share, data.test_share)"
    ]


def test_copies_on_two_fixed_sides_leave_the_training_side() -> None:
    """An official split is kept, but copies of validation and test photos are excluded from training."""
    sides: list[str | None] = ["train", "train", "train", "train", "val", "val", "test", "test"]
    table = manifest(list("abcdefgh"), sides, hashes=["1", "2", "3", "4", "5", "6", "7", "1"])
    labels = np.array([0, 1] * 4, float)
    # Rows 0 and 7 have equal bytes; 3 and 4 are near duplicates, and so are 5 and 6.
    with pytest.raises(DataError, match="the val split has photos of one class only"):
        assign_splits(table, labels, DataConfig(), [(3, 4), (5, 6)])
    with pytest.raises(DataError, match="train split has photos of one class only"):
        assign_splits(table[[0, 1, 3, 4, 5, 6, 7]], labels[[0, 1, 3, 4, 5, 6, 7]], DataConfig())
    split = assign_splits(table, labels, DataConfig(), [(3, 4)])
    assert split.names == ["excluded", "train", "train", "excluded", "val", "val", "test", "test"]
    assert split.notes == [
        "2 photos excluded as copies on another side: 0.jpg (train) is a copy of 7.jpg (test); "
        "3.jpg (train) is a copy of 4.jpg (val)"
    ]
    assert assign_splits(table, labels, DataConfig(duplicates="ignore"), [(3, 4)]).names == sides


def test_photos_that_look_the_same_stay_together() -> None:
    table, labels = many()
    # A chain of near duplicates through eleven patients, and one pair with equal bytes.
    pairs = [(2 * patient, 2 * patient + 2) for patient in range(10)]
    table = table.with_columns(pl.Series("sha256", [*table["sha256"][:-1], table["sha256"][30]]))
    for fold in range(5):
        names = assign_splits(table, labels, DataConfig(fold=fold), pairs).names
        assert len(set(names[:22])) == 1
        assert names[-1] == names[30]
    ignoring = [
        assign_splits(table, labels, DataConfig(fold=fold, duplicates="ignore"), pairs).names for fold in range(5)
    ]
    assert any(len(set(names[:22])) > 1 for names in ignoring)


@pytest.mark.parametrize(("test", "val"), [(0.2, 0.1), (0.5, 0.25), (0.1, 0.1)])
def test_a_hold_out_has_its_shares_and_keeps_patients_whole(test: float, val: float) -> None:
    table, labels = many(200)
    names = np.array(assign_splits(table, labels, DataConfig(split="holdout", test_share=test, val_share=val)).names)
    for name, share in [("test", test), ("val", val), ("train", 1 - test - val)]:
        assert (names == name).mean() == pytest.approx(share, abs=0.03)
        assert labels[names == name].mean() == pytest.approx(labels.mean(), abs=0.08)
    assert (names[::2] == names[1::2]).all()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_split_file_is_shared_and_read_again(tmp_path: Path, ending: str) -> None:
    table, labels = many()
    names = assign_splits(table, labels, DataConfig()).names
    path = tmp_path / f"split.{ending}"
    write_split_file(path, table, names)
    config = DataConfig(split_file=str(path))
    assert assign_splits(table, labels, config).names == names
    # A different order, and a photo that the file does not list.
    other = pl.concat([table[::-1], manifest(["new"]).with_columns(path=pl.lit("new.jpg"))])
    assert assign_splits(other, np.append(labels[::-1], 0), config).names == [*names[::-1], "excluded"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\n0.jpg,train\n", "has no column 'path'; columns: file, split"),
        ("path,split\n0.jpg,dev\n", "line 2: split 'dev' is not one of train, val, test"),
        ("path,split\n0.jpg,train\n0.jpg,test\n", "line 3: 0.jpg is listed twice, as train and test"),
        ("path,split\nelsewhere.jpg,train\n", "lists no photo of this cache"),
        ("path,split,sha256\n0.jpg,train,abc\n", "line 2: 0.jpg differs from the photo this split was"),
    ],
)
def test_a_wrong_split_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_split_file(path, many()[0])
    with pytest.raises(DataError, match="cannot be read"):
        read_split_file(tmp_path / "none.csv", many()[0])


def test_a_patient_on_two_fixed_sides_is_refused() -> None:
    names: list[str | None] = ["train", "train", "val", "val", "test", "test"]
    table = manifest(list("abcdea"), names)
    with pytest.raises(DataError, match=r"0.jpg .train. and 5.jpg .test. are of the same patient, a; put them into"):
        assign_splits(table, np.array([0, 1] * 3, float), DataConfig())


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(DataError, match="3 patients cannot fill 5 folds"):
        assign_splits(manifest(["a", "b", "c"]), np.array([0.0, 1, 0]), DataConfig())
    table, _ = many()
    with pytest.raises(DataError, match="split has photos of one class only"):
        assign_splits(table, np.zeros(len(table)), DataConfig())
    # Without classes, no class is required in any split.
    assert set(assign_splits(table, None, DataConfig()).names) == {"train", "val", "test"}


def learned(fraction: float, table: pl.DataFrame, labels: np.ndarray, **settings: int) -> set[str]:
    split = assign_splits(table, labels, DataConfig(label_fraction=fraction, **settings))
    rows = [row for row, name in enumerate(split.names) if name == "train"]
    kept = {table["patient"][row] for row in rows}
    # Patients are kept or excluded as a whole.
    assert len(rows) == 2 * len(kept)
    if fraction < 1:
        assert f"label_fraction is {fraction:g}: training on {len(kept)} of " in split.notes[-1]
    return kept


@pytest.mark.parametrize("fold", [0, 3])
def test_label_fractions_are_nested_and_stratified(fold: int) -> None:
    table, labels = many(400)
    positive = {patient for patient, label in zip(table["patient"], labels, strict=True) if label}
    whole = learned(1.0, table, labels, fold=fold)
    chosen = [learned(fraction, table, labels, fold=fold) for fraction in (0.05, 0.1, 0.25, 0.5)]
    for smaller, larger in itertools.pairwise([*chosen, whole]):
        assert smaller < larger
    for fraction, kept in zip((0.05, 0.1, 0.25, 0.5), chosen, strict=True):
        for stratum in (positive, set(table["patient"]) - positive):
            assert len(kept & stratum) == math.ceil(fraction * len(whole & stratum))
    few, all_of_it = (
        assign_splits(table, labels, DataConfig(fold=fold, label_fraction=fraction)).names for fraction in (0.1, 1.0)
    )
    for left, right in zip(few, all_of_it, strict=True):
        assert left == right or (left, right) == ("excluded", "train")
    # Another seed selects other patients.
    assert learned(0.1, table, labels, fold=fold, split_seed=1) != chosen[1]


def test_few_labels_do_not_depend_on_the_order_of_photos() -> None:
    table, labels = many(100)
    fixed = table.with_columns(split=pl.Series(assign_splits(table, labels, DataConfig()).names))
    order = np.random.default_rng(0).permutation(len(table))
    assert learned(0.2, fixed, labels) == learned(0.2, fixed[order], labels[order])


@pytest.mark.parametrize(("photos", "positive"), [(30, 13), (30, 17), (12, 3), (20, 10), (10, 5), (8, 4)])
@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.1, 0.1), (0.3, 0.15)])
def test_few_photos_can_be_held_out_with_both_classes_on_each_side(
    photos: int, positive: int, shares: tuple[float, float]
) -> None:
    classes = np.array([1] * positive + [0] * (photos - positive))
    for seed in range(5):
        config = DataConfig(split="holdout", test_share=shares[0], val_share=shares[1], split_seed=seed)
        names = np.array(assign_splits(manifest([f"p{i}" for i in range(photos)]), classes, config).names)
        assert all(set(classes[names == side]) == {0, 1} for side in ("train", "val", "test"))
        assert (names == "train").sum() >= (names == "test").sum()
