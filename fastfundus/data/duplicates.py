"""Detection of duplicates and near duplicates among photos of different patients.

Public data sets contain some photos twice, re-encoded, resized or flipped, under different names and occasionally with
different labels. On two sides of a split, such pairs let a model recognise a photo instead of assessing it.
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
from fastfundus.photo.perceptual_hash import HASH_BITS, flipped_hashes, local_contrast

__all__ = ["MAX_BITS", "alike", "find_duplicates", "near_pairs", "same_bytes", "usable_hashes", "write_duplicates"]

MAX_BITS = 24
"""Pairs whose 256-bit perceptual hashes differ in more bits are not compared further."""
_MIN_LIKENESS = 0.93
"""Minimum correlation of details for a near duplicate. Different eyes of ODIR reach at most 0.90; re-encoded, resized,
brightened, padded or cropped copies nearly always stay above 0.95."""
_MANY = 200_000

Recognised = tuple[NDArray[np.int64], NDArray[np.uint8], PhotoArray]
"""Rows of photos, their perceptual hashes, and the array of photos that the rows index."""


def write_duplicates(folder: Path, photos_folder: Path, size: int) -> None:
    """Find the duplicates of the cache whose manifest is in `folder`, and write `duplicates.parquet` there."""
    manifest = pl.read_parquet(
        folder / "manifest.parquet", columns=["sha256", "patient", "status", "look"], memory_map=False
    )
    photos = open_photos(photos_folder, len(manifest), size, photos_per_file(size))
    find_duplicates(manifest, photos).write_parquet(folder / "duplicates.parquet")


def find_duplicates(manifest: pl.DataFrame, photos: PhotoArray) -> pl.DataFrame:
    """Find duplicates and near duplicates among photos of different patients.

    Args:
        manifest: N rows with sha256, patient, status and look.
        photos: the N photos.

    Returns:
        A table with `DUPLICATE_COLUMNS`; photos with equal bytes are each paired with the first of them.
    """
    patients = manifest["patient"].to_list()
    pairs = [
        (a, b, "same bytes", 1.0) for a, b in same_bytes(manifest["sha256"].to_list()) if patients[a] != patients[b]
    ]

    def across_patients(candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
        # Keep each pair once, and no photo paired with itself.
        return np.array([a < b and patients[a] != patients[b] for a, b in candidates.tolist()], bool)

    rows, hashes = usable_hashes(manifest)
    pairs += alike((rows, hashes, photos), (rows, hashes, photos), across_patients)
    return pl.DataFrame(sorted(pairs), schema=DUPLICATE_COLUMNS, orient="row")


def alike(
    mine: Recognised, theirs: Recognised, wanted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None
) -> Iterator[tuple[int, int, str, float]]:
    """Find near duplicates, unchanged or flipped.

    Args:
        mine: rows and perceptual hashes from `usable_hashes`, and the photos that the rows index.
        theirs: the same for the other set of photos.
        wanted: receives int64 [P, 2] rows and selects the pairs whose photos are compared; None compares all.

    Yields:
        Row in `mine`, row in `theirs`, kind and likeness of each pair.
    """
    rows, hashes, photos = mine
    other_rows, other_hashes, others = theirs
    for kind, turned in (("looks the same", other_hashes), ("mirrored", flipped_hashes(other_hashes))):
        found = near_pairs(hashes, turned)
        candidates = np.stack([rows[found[:, 0]], other_rows[found[:, 1]]], axis=1)
        if wanted is not None:
            candidates = candidates[wanted(candidates)]
        yield from _confirm(candidates, photos, others, kind)


def usable_hashes(manifest: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the rows of photos suitable for comparison and their perceptual hashes, uint8 [N, 32].

    Photos of insufficient quality show too little detail; of photos with equal bytes, only the first is included.
    """
    usable = manifest["look"].is_not_null() & (manifest["status"] == "ok")
    rows = np.flatnonzero(usable.to_numpy())
    rows = rows[np.sort(np.unique(manifest["sha256"].to_numpy()[rows], return_index=True)[1])]
    hashes = [np.frombuffer(bytes.fromhex(code), np.uint8) for code in manifest["look"].gather(rows)]
    return rows, np.stack(hashes) if hashes else np.empty((0, 32), np.uint8)


def near_pairs(hashes: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Find perceptual hashes that differ in few bits.

    The bits are divided into bands, and only pairs that agree in all bits of at least one band are compared. Sixteen
    bands find every pair that differs in up to 15 bits and 98 % of those that differ in 24. Beyond 200,000 photos,
    eleven longer bands limit the work and find every pair that differs in up to 10 bits.

    Args:
        hashes: uint8 [N, 32].
        others: uint8 [M, 32].

    Returns:
        int64 [P, 2] positions in `hashes` and `others` of the pairs that differ in at most `MAX_BITS` bits, each once.
    """
    both = np.concatenate([hashes, others])
    is_other = np.arange(len(both)) >= len(hashes)
    words = np.ascontiguousarray(both).view(np.uint64)
    found: list[NDArray[np.int64]] = []
    for band in _bands(both, 16 if len(hashes) + len(others) <= 2 * _MANY else 11):
        order = np.argsort(band, kind="stable")
        sorted_band, step = band[order], 1
        left = np.arange(len(order) - 1)
        # Compare neighbours at distance 1, 2, ... in the sorted band as long as any of these pairs agrees.
        while len(left):
            left = left[left + step < len(order)]
            left = left[sorted_band[left] == sorted_band[left + step]]
            a, b = order[left], order[left + step]
            crossing = is_other[a] != is_other[b]
            a, b = np.where(is_other[a], b, a)[crossing], np.where(is_other[a], a, b)[crossing]
            near = np.bitwise_count(words[a] ^ words[b]).sum(axis=1) <= MAX_BITS
            found.append(np.stack([a[near], b[near] - len(hashes)], axis=1))
            step += 1
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)


def _bands(hashes: NDArray[np.uint8], count: int) -> Iterator[NDArray[np.uint32]]:
    bits = np.unpackbits(hashes, axis=1)
    # Neighbouring cells are correlated, so every band takes bits from all over the photo.
    shuffled = np.random.default_rng(0).permutation(HASH_BITS)
    for part in np.array_split(shuffled, count):
        yield bits[:, part].astype(np.uint32) @ (np.uint32(1) << np.arange(len(part), dtype=np.uint32))


def same_bytes(hashes: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Pair each photo with the first one that has the same bytes; photos without a hash are skipped."""
    first: dict[str, int] = {}
    for row, sha256 in enumerate(hashes):
        if sha256 and first.setdefault(sha256, row) != row:
            yield first[sha256], row


def _confirm(
    candidates: NDArray[np.int64], photos: PhotoArray, others: PhotoArray, kind: str
) -> Iterator[tuple[int, int, str, float]]:
    """Compare the details of candidate pairs, which their perceptual hashes only summarise.

    Args:
        candidates: int64 [P, 2], rows of `photos` and of `others`.
        photos: uint8 [N, S, S, 3].
        others: uint8 [M, S, S, 3].
        kind: "looks the same" or "mirrored".

    Yields:
        Row, other row, kind and likeness of each near duplicate.
    """
    partners: dict[int, list[int]] = defaultdict(list)
    for a, b in candidates.tolist():
        partners[a].append(b)
    for a, rows in partners.items():
        mine = local_contrast(photos[a])
        if kind == "mirrored":
            mine = mine[:, ::-1]
        for b in rows:
            likeness = float(np.mean(mine * local_contrast(others[b])))
            if likeness >= _MIN_LIKENESS:
                yield a, b, kind, round(likeness, 4)
