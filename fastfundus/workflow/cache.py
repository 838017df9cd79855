"""Inspect, verify, audit and split a photo cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from fastfundus.config import DataConfig, TrainConfig
from fastfundus.data.cache import MANIFEST_COLUMNS, PhotoCache
from fastfundus.data.leakage import LeakageReport, check_leakage, overlap, pair_positions
from fastfundus.data.split import assign_splits, read_split_file, side_counts, write_split_file
from fastfundus.errors import DataError, close_matches
from fastfundus.training.tasks.targets import read_targets, usable_rows

__all__ = [
    "CacheAudit", "CacheSplit", "audit_cache", "draw_augmentations", "split_cache", "summarise_cache", "verify_cache",
]  # fmt: skip

MOST_VALUES = 8
"""Maximum number of values per label in a summary; the most frequent ones are kept."""


def summarise_cache(folder: str | Path) -> dict[str, Any]:
    """Summarise the content of a cache.

    Args:
        folder: the cache.

    Returns:
        Plain data: numbers of photos, patients and duplicates, labels, preprocessing, source and size on disk.

    Raises:
        DataError: the folder is not a cache, or is damaged.
    """
    opened, folder = PhotoCache.open(folder), Path(folder)
    table = opened.manifest
    used = table.filter(pl.col("pixels_crc32").is_not_null())
    return {
        "cache": str(folder),
        "photos": len(table),
        "status": _counts(table["status"]),
        "patients": table["patient"].filter(table["patient_known"]).n_unique(),
        "patients_unknown": int((~table["patient_known"]).sum()),
        "patients_hashed": opened.salted is not None,
        "eyes": _counts(table["eye"].fill_null("unknown")),
        "splits": _counts(table["split"].drop_nulls()),
        "origins": opened.origins,
        "notes": list(opened.notes),
        "cameras": _counts(table["camera"].drop_nulls()),
        "field_shapes": _counts(used["field_shape"].fill_null("whole frame")),
        "duplicate_pairs": len(opened.duplicates()),
        "labels": {name: _label_summary(table[name]) for name in table.columns[len(MANIFEST_COLUMNS) :]},
        "spec": opened.spec.to_pixels_dict(),
        "fingerprint": opened.spec.fingerprint,
        "source": str(opened.source),
        "bytes_on_disk": sum(path.stat().st_blocks * 512 for path in folder.iterdir()),
    }


def verify_cache(
    folder: str | Path, *, sources: bool = False, on_photo: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Compare every photo of a cache with its checksum.

    Args:
        folder: the cache.
        sources: also compare the source files with their hashes.
        on_photo: called with the number of photos compared and their total.

    Returns:
        Plain data: "cache", the number of "photos", and "faults", one line each.

    Raises:
        DataError: the folder is not a cache, or is damaged.
    """
    opened, number = PhotoCache.open(folder), itertools.count(1)
    total = len(opened.manifest)
    faults = list(opened.verify(sources=sources, on_photo=lambda: on_photo(next(number), total)))
    return {"cache": str(folder), "photos": total, "faults": faults}


@dataclass(frozen=True, slots=True)
class CacheAudit:
    """Result of the audit of one cache."""

    report: LeakageReport
    """Duplicates and near duplicates of different patients, and which of them the split separates."""
    shared: dict[str, pl.DataFrame]
    """Photos shared with each other cache, by its path."""

    @property
    def leaking(self) -> bool:
        """True if a photo is on two sides of the split, or in another cache."""
        return any(len(table) for table in (self.report.leaks, *self.shared.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "photos": self.report.photos,
            "patients": self.report.patients,
            "photos_of_unknown_patients": self.report.unknown_patients,
            "pairs": self.report.pairs.to_dicts(),
            "leaks": self.report.leaks.to_dicts(),
            "shared": {path: table.to_dicts() for path, table in self.shared.items()},
        }


def audit_cache(
    folder: str | Path,
    *,
    splits: str | Path | None = None,
    against: Sequence[str | Path] = (),
    labels: Sequence[str] = (),
    output: str | Path | None = None,
) -> CacheAudit:
    """Check a cache for leakage between patients, splits and caches.

    Args:
        folder: the cache.
        splits: the split to check: a CSV or Parquet file, or a run folder.
        against: other caches that must not share photos with this one.
        labels: labels by which pairs are compared.
        output: CSV file for all pairs; None writes nothing.

    Raises:
        DataError: a cache or the split cannot be read, or there is no such label.
    """
    opened = PhotoCache.open(folder)
    for label in labels:
        if label not in opened.manifest.columns:
            raise DataError(f"there is no label {label!r}{close_matches(label, opened.manifest.columns)}", path=folder)
    file = Path(splits) if splits is not None else None
    names = read_split_file(file / "splits.parquet" if file.is_dir() else file, opened.manifest) if file else None
    report = check_leakage(opened, names, labels)
    shared = {str(path): overlap(opened, PhotoCache.open(path)) for path in against}
    if output is not None:
        report.pairs.write_csv(output)
    return CacheAudit(report, shared)


@dataclass(frozen=True, slots=True)
class CacheSplit:
    """Summary of a split that was written to a file."""

    photos: int
    patients: int
    targets: str
    """Description of the labels."""
    sides: dict[str, int]
    """Number of photos on each side."""


def split_cache(
    folder: str | Path,
    output: str | Path,
    *,
    task: str = "abnormality",
    labels: Sequence[str] = (),
    folds: int | None = None,
    fold: int = 0,
    holdout: tuple[float, float] | None = None,
    seed: int = 0,
    ignore_duplicates: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> CacheSplit:
    """Split the labelled photos of a cache by patient, and write the split to a file.

    Args:
        folder: the cache.
        output: CSV or .parquet file to write.
        task: any task except "vessels".
        labels: labels that select the photos and the classes to stratify by, as for training.
        folds: number of folds; None uses 5.
        fold: index of the test fold; the next one validates.
        holdout: test and validation shares, instead of folds.
        seed: seed of the split.
        ignore_duplicates: split by patient alone, even if this separates duplicates.
        say: receives notes about the split.

    Raises:
        DataError: a label is missing, or there are too few photos or patients.
        ConfigError: a setting is out of range, or the labels do not match the task.
    """
    opened = PhotoCache.open(folder)
    targets = read_targets(opened.manifest, task, tuple(labels))
    rows = usable_rows(opened.manifest, targets)
    shares = {"split": "holdout", "test_share": holdout[0], "val_share": holdout[1]} if holdout else {}
    duplicates = "ignore" if ignore_duplicates else "together"
    config = DataConfig(folds=folds or 5, fold=fold, split_seed=seed, duplicates=duplicates, **shares)  # type: ignore[arg-type]
    part = opened.manifest[rows]
    assigned = assign_splits(part, targets.strata[rows], config, pair_positions(opened, rows))
    for note in assigned.notes:
        say(note)
    write_split_file(Path(output), part, assigned.names)
    return CacheSplit(len(rows), part["patient"].n_unique(), targets.summary, side_counts(assigned.names))


def draw_augmentations(
    folder: str | Path, output: str | Path, *, config: str | Path | None = None, photos: int, draws: int, seed: int = 0
) -> tuple[int, int, int]:
    """Draw a contact sheet: one row per photo, with the original and random augmentations.

    Args:
        folder: the cache.
        output: PNG or JPEG file to write.
        config: TOML file of a run; None uses the defaults.
        photos: maximum number of photos.
        draws: number of augmentations per photo.
        seed: seed of photos and augmentations.

    Returns:
        The number of photos, and the width and height of the sheet in pixels.

    Raises:
        DataError: the cache contains no usable photo.
        ConfigError: the configuration is invalid.
    """
    # Imported late, because it imports torch.
    from fastfundus.training.augment import augmentation_sheet

    opened, output = PhotoCache.open(folder), Path(output)
    settings = TrainConfig.from_toml(config) if config else TrainConfig()
    usable = opened.manifest.with_row_index("row").filter(pl.col("status") == "ok")["row"].to_numpy()
    if not len(usable):
        raise DataError("no photo has status ok", path=folder)
    rows = np.sort(np.random.default_rng(seed).permutation(usable)[:photos]).astype(np.int64)
    sheet = augmentation_sheet(opened.photos, rows, opened.spec, settings.augment, draws=draws, seed=seed)
    written, encoded = cv2.imencode(output.suffix, sheet[..., ::-1])
    assert written
    output.write_bytes(encoded.tobytes())
    return len(rows), sheet.shape[1], sheet.shape[0]


def _counts(values: pl.Series) -> dict[Any, int]:
    return dict(values.value_counts(sort=True).rows())


def _label_summary(column: pl.Series) -> dict[str, Any]:
    known = column.drop_nulls()
    counts = known.value_counts(sort=True).rows()
    return {
        "known": len(known),
        "values": {f"{value:g}" if isinstance(value, float) else value: n for value, n in counts[:MOST_VALUES]},
        "distinct": len(counts),
    }
