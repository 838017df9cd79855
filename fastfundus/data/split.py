"""Patient-grouped, stratified splits that never separate photos of one patient, duplicates or near duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.config import DataConfig
from fastfundus.data.deal import deal_few, deal_groups, group_photos
from fastfundus.data.duplicates import same_bytes
from fastfundus.data.tables import read_cells
from fastfundus.errors import DataError

__all__ = [
    "SIDES",
    "SplitAssignment",
    "assign_splits",
    "read_split_file",
    "side_counts",
    "write_split_file",
]

SIDES = ("train", "val", "test")
_DEALS = 20
"""A hold-out split divides patients into this many parts and takes as many parts as its shares correspond to."""
_FEW = 200
"""With fewer groups of photos, parts of a twentieth cannot all have every class."""


@dataclass(slots=True)
class SplitAssignment:
    """Assignment of each photo to a side of the split."""

    names: list[str]
    """[N] names, each "train", "val", "test" or "excluded"."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user, one line each."""


def side_counts(names: Iterable[str]) -> dict[str, int]:
    """Count the photos on each side."""
    counts = Counter(names)
    return {side: counts[side] for side in SIDES}


def assign_splits(
    manifest: pl.DataFrame,
    classes: NDArray[np.int64] | None,
    config: DataConfig,
    pairs: Sequence[tuple[int, int]] = (),
) -> SplitAssignment:
    """Assign each photo to training, validation or test.

    Splits fixed by `config.split_file` or the label file are kept, with two adjustments: training photos that are
    duplicates or near duplicates of photos on another side are excluded, and a side without photos (official splits
    often lack validation) is filled from the training patients according to the shares. Otherwise patients are assigned
    with stratification by class: either into `config.folds` folds, where fold `config.fold` is the test set, the next
    one the validation set and the others the training set; or as one hold-out split according to the shares.

    Args:
        manifest: N rows of a cache's manifest.
        classes: [N] class of each photo for stratification; None without classes.
        config: the split settings.
        pairs: positions of duplicates and near duplicates of different patients; ignored if
            `config.duplicates` is "ignore".

    Raises:
        DataError: there are too few photos or patients, a patient is on two sides, or a split file does not match.
    """
    if config.duplicates == "ignore":
        pairs = ()
    strata = np.zeros(len(manifest), np.int64) if classes is None else classes
    fixed = manifest["split"].to_list()
    if config.split_file:
        fixed = read_split_file(Path(config.split_file), manifest)
    if any(name in SIDES for name in fixed):
        split = SplitAssignment([name or "excluded" for name in fixed])
        _check_patients(manifest, split.names)
        if config.duplicates == "together":
            _drop_copies(manifest, split, pairs)
        _deal_missing(manifest, strata, split, config, pairs)
    else:
        assigned = _deal(_groups(manifest, config, pairs), strata, config)
        split = SplitAssignment(
            ["excluded" if name == "excluded" else side for name, side in zip(fixed, assigned, strict=True)]
        )
    if config.label_fraction < 1:
        split.notes.append(_forget_labels(manifest, strata, split, config, pairs))
    names = np.array(split.names)
    for wanted in SIDES:
        seen = np.unique(strata[names == wanted])
        if not len(seen) or (classes is not None and len(seen) < 2):
            raise DataError(
                f"the {wanted} split has {'photos of one class only' if len(seen) else 'no photos'}: each split needs "
                "at least two classes; add photos, or change data.folds or data.split_seed"
            )
    return split


def _deal_missing(
    manifest: pl.DataFrame,
    strata: NDArray[np.int64],
    split: SplitAssignment,
    config: DataConfig,
    pairs: Sequence[tuple[int, int]],
) -> None:
    missing = [name for name in ("val", "test") if name not in split.names]
    rows = np.array([row for row, name in enumerate(split.names) if name == "train"], np.int64)
    if not missing or not len(rows):
        return
    place = {int(row): position for position, row in enumerate(rows)}
    inside = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
    assigned = _deal(_groups(manifest[rows], config, inside), strata[rows], replace(config, split="holdout"))
    for row, name in zip(rows.tolist(), assigned, strict=True):
        if name in missing:
            split.names[row] = name
    counts = " and ".join(f"{split.names.count(name)} photos to {name}" for name in missing)
    split.notes.append(
        f"the given split has no {' and no '.join(missing)}: moved {counts} from the training patients "
        "(data.val_share, data.test_share)"
    )


def _groups(manifest: pl.DataFrame, config: DataConfig, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    hashes = manifest["sha256"].to_list()
    if config.duplicates == "ignore":
        hashes = [str(index) for index in range(len(hashes))]
    return group_photos(manifest["patient"].to_list(), hashes, pairs)


def _forget_labels(
    manifest: pl.DataFrame,
    strata: NDArray[np.int64],
    split: SplitAssignment,
    config: DataConfig,
    pairs: Sequence[tuple[int, int]],
) -> str:
    """Exclude training photos until the given share of training patients remains, the same share of every class.

    Patients are ordered by a hash, so in every fold a smaller share is a subset of any larger one, and adding photos
    to the cache later does not change the order of existing patients.
    """
    hashes = manifest["sha256"].to_list()
    groups = _groups(manifest, config, pairs)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups.tolist()):
        if split.names[index] == "train":
            members.setdefault(group, []).append(index)
    kept = 0
    for value in np.unique(strata):
        # A patient belongs to the highest class among their photos, so disease takes precedence over none.
        stratum = [rows for rows in members.values() if strata[rows].max() == value]
        places = [
            hashlib.sha256(f"{config.split_seed} {min(hashes[row] for row in rows)}".encode()).digest()
            for rows in stratum
        ]
        count = -(-len(stratum) * config.label_fraction // 1)
        kept += int(count)
        for place in sorted(range(len(stratum)), key=places.__getitem__)[int(count) :]:
            for row in stratum[place]:
                split.names[row] = "excluded"
    return (
        f"data.label_fraction is {config.label_fraction:g}: training on {kept} of {len(members)} training patients, "
        f"{split.names.count('train')} photos"
    )


def read_split_file(path: Path, manifest: pl.DataFrame) -> list[str | None]:
    """Read the side of each photo of a manifest; None for photos that the file does not list.

    Raises:
        DataError: the file cannot be read, lacks a column, uses an unknown side, lists no photo of the manifest, or was
            made for a different file under the same name.
    """
    table = _read_table(path)
    for column in ("path", "split"):
        if column not in table.columns:
            raise DataError(f"has no column {column!r}; columns: {', '.join(table.columns)}", path=path)
    sides: dict[str, str] = {}
    hashes = table["sha256"].to_list() if "sha256" in table.columns else [None] * len(table)
    expected = dict(manifest.select("path", "sha256").iter_rows())
    for row, (name, side, sha256) in enumerate(zip(table["path"], table["split"], hashes, strict=True), start=2):
        if side not in (*SIDES, "excluded"):
            raise DataError(f"split {side!r} is not one of {', '.join(SIDES)} or excluded", path=path, row=row)
        if sides.setdefault(name, side) != side:
            raise DataError(f"{name} is listed twice, as {sides[name]} and {side}", path=path, row=row)
        if sha256 and expected.get(name, sha256) != sha256:
            raise DataError(
                f"{name} differs from the photo this split was made for; make a new split or restore the photo",
                path=path,
                row=row,
            )
    if not sides.keys() & expected.keys():
        raise DataError("lists no photo of this cache; paths must match its manifest", path=path)
    return [sides.get(name) for name in manifest["path"]]


def _read_table(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        try:
            return pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"cannot be read ({error}); give a CSV or Parquet file", path=path) from None
    lines = read_cells(path).lines
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    rows = [[*cells, *[""] * (len(header) - len(cells))][: len(header)] for _, cells in lines[1:]]
    return pl.DataFrame(rows, schema=dict.fromkeys(header, pl.String), orient="row")


def write_split_file(path: Path, manifest: pl.DataFrame, names: Sequence[str]) -> None:
    """Write a split file with path, sha256, patient and split: Parquet if `path` ends in .parquet, CSV otherwise."""
    table = manifest.select("path", "sha256", "patient").with_columns(pl.Series("split", names))
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path)


def _deal(groups: NDArray[np.int64], strata: NDArray[np.int64], config: DataConfig) -> list[str]:
    count = int(groups.max()) + 1 if len(groups) else 0
    parts = config.folds if config.split == "folds" else _DEALS
    needed = max(parts, 3) if config.split == "folds" else 3
    if count < needed:
        raise DataError(f"{count} patients cannot fill {needed} folds; add patients or lower data.folds")
    if config.split == "holdout" and count < _FEW:
        few = deal_few(groups, strata, (config.val_share, config.test_share), config.split_seed)
        return [SIDES[side] for side in few.tolist()]
    fold = deal_groups(groups, strata, parts, config.split_seed)
    if config.split == "folds":
        sides = np.where(fold == config.fold, 2, np.where(fold == (config.fold + 1) % parts, 1, 0))
    else:
        test, val = (max(1, round(parts * share)) for share in (config.test_share, config.val_share))
        sides = np.where(fold < test, 2, np.where(fold < test + val, 1, 0))
    return [SIDES[side] for side in sides.tolist()]


def _check_patients(manifest: pl.DataFrame, names: list[str]) -> None:
    home: dict[str, tuple[str, str]] = {}
    for path, patient, name in zip(manifest["path"], manifest["patient"], names, strict=True):
        if name == "excluded":
            continue
        first, where = home.setdefault(patient, (path, name))
        if where != name:
            raise DataError(
                f"{first} ({where}) and {path} ({name}) are of the same patient, {patient}; put them into one split"
            )


def _drop_copies(manifest: pl.DataFrame, split: SplitAssignment, pairs: Sequence[tuple[int, int]]) -> None:
    """Exclude copies that are on two sides: the test photo is kept first, then the validation photo."""
    rank = {"train": 0, "val": 1, "test": 2, "excluded": -1}
    paths, dropped = manifest["path"].to_list(), []
    for a, b in [*same_bytes(manifest["sha256"].to_list()), *pairs]:
        lower, upper = sorted((a, b), key=lambda row: rank[split.names[row]])
        if 0 <= rank[split.names[lower]] < rank[split.names[upper]]:
            dropped.append(f"{paths[lower]} ({split.names[lower]}) is a copy of {paths[upper]} ({split.names[upper]})")
            split.names[lower] = "excluded"
    if dropped:
        split.notes.append(f"{len(dropped)} photos excluded as copies on another side: {'; '.join(dropped[:3])}")
