"""Finds photos of different patients that are the same: byte for byte, or by what they show.

Public sets hold photos twice, re-encoded, resized or mirrored, under two names and now and then with two labels. On two
sides of a split they let a model recognise what it should judge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import DUPLICATE_COLUMNS, photos_per_file
from fastfundus.data.store import PhotoArray, open_photos
from fastfundus.photo.look import LOOK_BITS, mirrored_looks, thumbnail

__all__ = ["MOST_BITS", "alike", "find_duplicates", "near_pairs", "same_bytes", "usable_looks", "write_duplicates"]

MOST_BITS = 24
"""Pairs whose looks differ in more of their 256 bits are not compared further."""
_LEAST_LIKENESS = 0.93
"""Correlation of details from which two photos look the same. Different eyes of ODIR reach 0.90 at most; re-encoded,
resized, brightened, padded or cut copies stay above 0.95 nearly always."""
_MANY = 200_000

Recognised = tuple[NDArray[np.int64], NDArray[np.uint8], PhotoArray]
"""Rows of photos, their looks, and the photos that the rows are of."""


def write_duplicates(folder: Path, photos_folder: Path, size: int) -> None:
    """Find the duplicates of the cache whose manifest is in `folder`, and write `duplicates.parquet` beside it."""
    manifest = pl.read_parquet(
        folder / "manifest.parquet", columns=["sha256", "patient", "status", "look"], memory_map=False
    )
    photos = open_photos(photos_folder, len(manifest), size, photos_per_file(size))
    find_duplicates(manifest, photos).write_parquet(folder / "duplicates.parquet")


def find_duplicates(manifest: pl.DataFrame, photos: PhotoArray) -> pl.DataFrame:
    """Find pairs of photos that are the same although their patients differ.

    Args:
        manifest: N rows with sha256, patient, status and look.
        photos: the N photos.

    Returns:
        The columns of `DUPLICATE_COLUMNS`; of photos with equal bytes, each is paired with the first.
    """
    patients = manifest["patient"].to_list()
    pairs = [
        (a, b, "same bytes", 1.0) for a, b in same_bytes(manifest["sha256"].to_list()) if patients[a] != patients[b]
    ]

    def across_patients(candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
        # Each pair once, and no photo with itself.
        return np.array([a < b and patients[a] != patients[b] for a, b in candidates.tolist()], bool)

    rows, looks = usable_looks(manifest)
    pairs += alike((rows, looks, photos), (rows, looks, photos), across_patients)
    return pl.DataFrame(sorted(pairs), schema=DUPLICATE_COLUMNS, orient="row")


def alike(
    mine: Recognised, theirs: Recognised, wanted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None
) -> Iterator[tuple[int, int, str, float]]:
    """Find photos that look the same, as they are or mirrored.

    Args:
        mine: rows and looks from `usable_looks`, and the photos that the rows are of.
        theirs: likewise.
        wanted: of int64 [P, 2] rows says which pairs are worth a look at the photos; None looks at all.

    Yields:
        Row of mine, row of theirs, kind and likeness of each pair.
    """
    rows, looks, photos = mine
    other_rows, other_looks, others = theirs
    for kind, turned in (("looks the same", other_looks), ("mirrored", mirrored_looks(other_looks))):
        found = near_pairs(looks, turned)
        candidates = np.stack([rows[found[:, 0]], other_rows[found[:, 1]]], axis=1)
        if wanted is not None:
            candidates = candidates[wanted(candidates)]
        yield from _confirm(candidates, photos, others, kind)


def usable_looks(manifest: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows of photos that can be recognised, and their looks, uint8 [N, 32].

    A photo too poor to grade shows too little; of photos with equal bytes, the first stands for all.
    """
    usable = manifest["look"].is_not_null() & (manifest["status"] == "ok")
    rows = np.flatnonzero(usable.to_numpy())
    rows = rows[np.sort(np.unique(manifest["sha256"].to_numpy()[rows], return_index=True)[1])]
    looks = [np.frombuffer(bytes.fromhex(look), np.uint8) for look in manifest["look"].gather(rows)]
    return rows, np.stack(looks) if looks else np.empty((0, 32), np.uint8)


def near_pairs(looks: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Find looks that differ in few bits.

    Bits are cut into bands; only pairs that agree in all bits of some band are compared. Sixteen bands find every pair
    that differs in up to 15 bits, and 98 of 100 of those that differ in 24. Beyond 200,000 photos eleven longer bands
    keep the work in proportion, and find every pair up to 10 bits.

    Args:
        looks: uint8 [N, 32].
        others: uint8 [M, 32].

    Returns:
        int64 [P, 2], positions in `looks` and `others`, each pair once, that differ in at most `MOST_BITS` bits.
    """
    both = np.concatenate([looks, others])
    is_other = np.arange(len(both)) >= len(looks)
    words = np.ascontiguousarray(both).view(np.uint64)
    found: list[NDArray[np.int64]] = []
    for band in _bands(both, 16 if len(looks) + len(others) <= 2 * _MANY else 11):
        order = np.argsort(band, kind="stable")
        sorted_band, step = band[order], 1
        left = np.arange(len(order) - 1)
        # Neighbours at distance 1, 2, ... in the sorted band, as long as any pair of them agrees.
        while len(left):
            left = left[left + step < len(order)]
            left = left[sorted_band[left] == sorted_band[left + step]]
            a, b = order[left], order[left + step]
            crossing = is_other[a] != is_other[b]
            a, b = np.where(is_other[a], b, a)[crossing], np.where(is_other[a], a, b)[crossing]
            near = np.bitwise_count(words[a] ^ words[b]).sum(axis=1) <= MOST_BITS
            found.append(np.stack([a[near], b[near] - len(looks)], axis=1))
            step += 1
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)


def _bands(looks: NDArray[np.uint8], count: int) -> Iterator[NDArray[np.uint32]]:
    bits = np.unpackbits(looks, axis=1)
    # Neighbouring cells are alike: every band takes bits from all over the photo.
    shuffled = np.random.default_rng(0).permutation(LOOK_BITS)
    for part in np.array_split(shuffled, count):
        yield bits[:, part].astype(np.uint32) @ (np.uint32(1) << np.arange(len(part), dtype=np.uint32))


def same_bytes(hashes: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Pair each photo with the first that has the same bytes; photos without a hash have no bytes to compare."""
    first: dict[str, int] = {}
    for row, sha256 in enumerate(hashes):
        if sha256 and first.setdefault(sha256, row) != row:
            yield first[sha256], row


def _confirm(
    candidates: NDArray[np.int64], photos: PhotoArray, others: PhotoArray, kind: str
) -> Iterator[tuple[int, int, str, float]]:
    """Compare candidates by their details, which their looks only sum up.

    Args:
        candidates: int64 [P, 2], rows of `photos` and of `others`.
        photos: uint8 [N, S, S, 3].
        others: uint8 [M, S, S, 3].
        kind: "looks the same" or "mirrored".

    Yields:
        Row, other row, kind and likeness of each pair that looks the same.
    """
    partners: dict[int, list[int]] = defaultdict(list)
    for a, b in candidates.tolist():
        partners[a].append(b)
    for a, rows in partners.items():
        mine = thumbnail(photos[a])
        if kind == "mirrored":
            mine = mine[:, ::-1]
        for b in rows:
            likeness = float(np.mean(mine * thumbnail(others[b])))
            if likeness >= _LEAST_LIKENESS:
                yield a, b, kind, round(likeness, 4)
