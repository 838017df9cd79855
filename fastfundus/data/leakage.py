"""Leakage check: duplicate photos of different patients, on different sides of a split, or in two caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from fastfundus.data.cache import PhotoCache
from fastfundus.data.duplicates import alike, usable_hashes
from fastfundus.data.split import SIDES

__all__ = ["LeakageReport", "check_leakage", "overlap", "pair_positions"]


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """Result of the leakage check of one cache."""

    photos: int
    patients: int
    unknown_patients: int
    """Number of photos whose patient is unknown; each counts as a separate patient."""
    pairs: pl.DataFrame
    """path_a, patient_a, path_b, patient_b, kind, likeness, labels_differ and, with a split, split_a and split_b."""

    @property
    def leaks(self) -> pl.DataFrame:
        """Pairs on different sides of the split; empty without a split."""
        if "split_a" not in self.pairs.columns:
            return self.pairs.clear()
        sides = pl.col("split_a").is_in(SIDES) & pl.col("split_b").is_in(SIDES)
        return self.pairs.filter(sides & (pl.col("split_a") != pl.col("split_b")))


def check_leakage(
    cache: PhotoCache, names: Sequence[str | None] | None = None, labels: Sequence[str] = ()
) -> LeakageReport:
    """List duplicates and near duplicates among photos of different patients.

    Args:
        cache: the cache to check.
        names: split side of each row; None without a split.
        labels: label columns to compare; if the labels of a pair differ, one of them is wrong.
    """
    manifest, pairs = cache.manifest, cache.duplicates()
    columns = {}
    for side in "ab":
        rows = pairs[f"row_{side}"]
        columns[f"path_{side}"] = manifest["path"].gather(rows)
        columns[f"patient_{side}"] = manifest["patient"].gather(rows)
        if names is not None:
            columns[f"split_{side}"] = pl.Series(list(names), dtype=pl.String).gather(rows)
    differ = np.zeros(len(pairs), bool)
    for label in labels:
        a, b = manifest[label].gather(pairs["row_a"]), manifest[label].gather(pairs["row_b"])
        differ |= (a != b).fill_null(False).to_numpy()
    table = pl.DataFrame({**columns, "kind": pairs["kind"], "likeness": pairs["likeness"], "labels_differ": differ})
    unknown = int((~manifest["patient_known"]).sum())
    return LeakageReport(len(manifest), manifest["patient"].n_unique(), unknown, table)


def pair_positions(cache: PhotoCache, rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the cache's pairs as positions in `rows`, omitting pairs that are not entirely in it."""
    place = {int(row): position for position, row in enumerate(rows)}
    pairs = cache.duplicates().select("row_a", "row_b").rows()
    return [(place[a], place[b]) for a, b in pairs if a in place and b in place]


def overlap(cache: PhotoCache, other: PhotoCache) -> pl.DataFrame:
    """List photos shared by two caches, such as a pretraining and a test set: path_a, path_b, kind, likeness."""
    found: dict[tuple[int, int], tuple[str, float]] = {}
    mine, theirs = ({sha: row for row, sha in enumerate(c.manifest["sha256"]) if sha} for c in (cache, other))
    for sha in mine.keys() & theirs.keys():
        found[mine[sha], theirs[sha]] = ("same bytes", 1.0)
    hashes, other_hashes = ((*usable_hashes(c.manifest), c.photos) for c in (cache, other))
    for a, b, kind, likeness in alike(hashes, other_hashes):
        found.setdefault((a, b), (kind, likeness))
    lines = [
        (cache.manifest["path"][a], other.manifest["path"][b], kind, likeness)
        for (a, b), (kind, likeness) in sorted(found.items())
    ]
    schema = {"path_a": pl.String, "path_b": pl.String, "kind": pl.String, "likeness": pl.Float64}
    return pl.DataFrame(lines, schema=schema, orient="row")
