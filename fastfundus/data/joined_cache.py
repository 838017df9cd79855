"""Joined caches, for training on several data sets with different labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fastfundus.data.cache import PhotoCache
from fastfundus.data.duplicates import find_duplicates
from fastfundus.data.store import JoinedPhotos
from fastfundus.errors import DataError

__all__ = ["JoinedCache", "join_caches", "open_caches"]


# No slots: cached_property stores the pairs in the instance's __dict__.
@dataclass(frozen=True, repr=False)
class JoinedCache(PhotoCache):
    """Several caches read as one. A column that a cache lacks is unknown for its photos."""

    parts: tuple[PhotoCache, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of the caches."""
        return tuple(part.path for part in self.parts)

    def duplicates(self) -> pl.DataFrame:
        """Return duplicates and near duplicates among photos of different patients, within and across the caches."""
        return self._pairs

    @functools.cached_property
    def _pairs(self) -> pl.DataFrame:
        # Computed once rather than once per fold.
        return find_duplicates(self.manifest, self.photos)


def open_caches(path: Path, *more: Path) -> PhotoCache:
    """Open a cache, or several joined into one.

    Raises:
        DataError: a folder is not a cache, or is incomplete, damaged or of another version of FastFundus.
        SpecMismatch: the preprocessing of a cache differs from that of the first.
    """
    first = PhotoCache.open(path)
    return join_caches([first, *map(PhotoCache.open, more)]) if more else first


def join_caches(caches: Sequence[PhotoCache]) -> PhotoCache:
    """Join caches into one.

    Paths are prefixed with the name of their cache. Patient identifiers are unchanged, so a patient who is in two data
    sets counts once. If unrelated patients share an identifier, the only effect is that they stay on the same side of
    a split.

    Raises:
        SpecMismatch: the preprocessing of a cache differs from that of the first.
        DataError: a cache is given twice, or a column is text in one cache and numeric in another.
    """
    first = caches[0]
    names = [cache.path.absolute().name for cache in caches]
    if len({cache.path.resolve() for cache in caches}) < len(caches):
        raise DataError("is given twice; give each cache once", path=first.path)
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    tables = []
    for cache, name in zip(caches, names, strict=True):
        cache.spec.require_same(first.spec, mine=f"the cache {cache.path}", theirs=f"the cache {first.path}")
        if cache.salted != first.salted:
            raise DataError(f"hashes patients differently from {first.path}; use one salt for both", path=cache.path)
        own = pl.lit(f"{name}/") + pl.col("path")
        # Mask paths are relative to the source folder of their data set.
        masks = [
            (pl.lit(f"{cache.source}/") + pl.col(column)).alias(column)
            for column in cache.manifest.columns
            if column.startswith("mask_") and cache.manifest.schema[column] == pl.String
        ]
        patient = pl.when(pl.col("patient_known")).then(pl.col("patient")).otherwise(own).alias("patient")
        tables.append(cache.manifest.with_columns(patient, own.alias("path"), *masks))
    for table, cache in zip(tables, caches, strict=True):
        for column, kind in table.schema.items():
            other = next(seen for seen in tables if column in seen.columns).schema[column]
            if kind != other:
                raise DataError(f"column {column!r} is {kind} here but {other} elsewhere; rename one", path=cache.path)
    manifest = pl.concat(tables, how="diagonal")
    photos = JoinedPhotos([cache.photos for cache in caches])
    return JoinedCache(first.path, first.spec, photos, manifest, first.source, first.salted, parts=tuple(caches))
