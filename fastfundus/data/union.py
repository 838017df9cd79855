"""Several caches as one: data sets with different labels, trained on together."""

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

__all__ = ["CacheUnion", "join_caches"]


# Without slots: the pairs are kept in its dictionary.
@dataclass(frozen=True)
class CacheUnion(PhotoCache):
    """Several caches, read like one. A column that one of them lacks is unknown for its photos."""

    parts: tuple[PhotoCache, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of the caches."""
        return tuple(part.path for part in self.parts)

    def duplicates(self) -> pl.DataFrame:
        """Pairs of photos of different patients that are or look the same, in one cache or across them."""
        return self._pairs

    @functools.cached_property
    def _pairs(self) -> pl.DataFrame:
        # Sought once, not once a fold.
        return find_duplicates(self.manifest, self.photos)


def join_caches(caches: Sequence[PhotoCache]) -> PhotoCache:
    """Read caches as one.

    Paths get the name of their cache in front. Patients keep theirs: one who is in two sets is one patient, and equal
    numbers of strangers only keep two patients on one side of a split.

    Raises:
        SpecMismatch: one was prepared in another way than the first.
        DataError: one is given twice, or a column is text here and numbers there.
    """
    first = caches[0]
    names = [cache.path.absolute().name for cache in caches]
    if len({cache.path.resolve() for cache in caches}) < len(caches):
        raise DataError("is given twice; name each cache once", path=first.path)
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    tables = []
    for cache, name in zip(caches, names, strict=True):
        cache.spec.require_same(first.spec, mine=f"the cache {cache.path}", theirs=f"the cache {first.path}")
        if cache.salted != first.salted:
            raise DataError(f"hashes patients otherwise than {first.path}; prepare both with one salt", path=cache.path)
        own = pl.lit(f"{name}/") + pl.col("path")
        # Masks are named relative to where their set lies.
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
                raise DataError(f"its column {column!r} is {kind}, elsewhere {other}; rename one", path=cache.path)
    manifest = pl.concat(tables, how="diagonal")
    photos = JoinedPhotos([cache.photos for cache in caches])
    return CacheUnion(first.path, first.spec, photos, manifest, first.source, first.salted, tuple(caches))
