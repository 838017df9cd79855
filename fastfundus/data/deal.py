"""Assignment of groups of photos to folds: equal in size and in classes, in one pass for millions of photos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

__all__ = ["deal_few", "deal_groups", "group_photos"]

_RESERVE = 4
"""Interchangeable groups per fold that are kept to even out what groups of other kinds leave uneven."""


def group_photos(
    patients: Sequence[str], hashes: Sequence[str], pairs: Sequence[tuple[int, int]] = ()
) -> NDArray[np.int64]:
    """Number the groups of photos that must stay together.

    Args:
        patients: [N] patient of each photo.
        hashes: [N] sha256 of each photo; patients that share a file are merged into one group.
        pairs: positions of near duplicates; their patients are merged too.

    Returns:
        [N] group numbers, counted from 0 in order of appearance.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(patients):
        return np.zeros(0, np.int64)
    patient, sha256 = _numbered(patients), _numbered(hashes)
    first = patient.max() + 1
    # A graph of patients and files; photos and near duplicates are its edges.
    a, b = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    starts = np.concatenate([patient, patient[a]])
    ends = np.concatenate([first + sha256, patient[b]])
    nodes = int(first + sha256.max() + 1)
    graph = coo_array((np.ones(len(starts), np.bool_), (starts, ends)), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    return _numbered(component[patient])


def _numbered(values: Sequence[str] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Replace values by numbers, counted from 0 in order of appearance."""
    series = pl.Series("value", values)
    names = series.unique(maintain_order=True)
    places = pl.DataFrame({"value": names, "number": np.arange(len(names))})
    return series.to_frame().join(places, on="value", how="left", maintain_order="left")["number"].to_numpy()


def deal_groups(groups: NDArray[np.int64], strata: NDArray[np.int64], parts: int, seed: int) -> NDArray[np.int64]:
    """Deal groups of photos to folds that agree in size and in the share of each class.

    Groups with the same number of photos of each class are interchangeable: most are dealt to all folds alike. A
    reserve, and groups without a double, then go one by one to the fold that they balance best, those with the most
    uneven classes first.

    Args:
        groups: [N] group of each photo, counted from 0.
        strata: [N] class of each photo.
        parts: number of folds.
        seed: seed of the random choice among interchangeable groups.

    Returns:
        [N] fold of each photo, 0 to parts - 1.

    Source of the order of the remainder: StratifiedGroupKFold of scikit-learn, which deals all
    groups one by one.
    """
    classes, stratum = np.unique(strata, return_inverse=True)
    count = int(groups.max()) + 1
    table = np.bincount(groups * len(classes) + stratum, minlength=count * len(classes)).reshape(count, len(classes))
    shuffled = np.random.default_rng(seed).permutation(count)
    kind = _kinds(table)[shuffled]
    order = shuffled[np.argsort(kind, kind="stable")]
    sizes = np.bincount(kind)
    place = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    even = place < np.repeat(np.maximum(sizes // parts - _RESERVE, 0) * parts, sizes)
    fold = np.empty(count, np.int64)
    fold[order[even]] = place[even] % parts
    rest = np.zeros(count, np.bool_)
    rest[order[~even]] = True
    # In random order: kind by kind, the first folds of a hold-out split would be of one class.
    _deal_remainder(shuffled[rest[shuffled]], table, fold, parts)
    return fold[groups]


def deal_few(
    groups: NDArray[np.int64], strata: NDArray[np.int64], shares: tuple[float, float], seed: int
) -> NDArray[np.int64]:
    """Deal a few groups to three sides, so that each side has every class of which there are three groups.

    Args:
        groups: [N] group of each photo, counted from 0.
        strata: [N] class of each photo.
        shares: share of groups of the second and of the third side.
        seed: seed of the random choice.

    Returns:
        [N] side of each photo: 0 for the rest, 1 and 2 for the shares.
    """
    classes, stratum = np.unique(strata, return_inverse=True)
    count = int(groups.max()) + 1
    table = np.bincount(groups * len(classes) + stratum, minlength=count * len(classes)).reshape(count, len(classes))
    # A group belongs to the rarest class among its photos.
    rank = np.argsort(np.argsort(table.sum(axis=0), kind="stable"), kind="stable")
    rarest = np.where(table > 0, rank, len(classes)).argmin(axis=1)
    side = np.zeros(count, np.int64)
    generator = np.random.default_rng(seed)
    for value in range(len(classes)):
        members = generator.permutation(np.flatnonzero(rarest == value))
        first, second = (max(1, round(len(members) * share)) for share in shares)
        while len(members) and first + second >= len(members) and first + second > 2:
            first, second = (first - 1, second) if first >= second else (first, second - 1)
        side[members[:first]] = 1
        side[members[first : first + second]] = 2
    return side[groups]


def _kinds(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the distinct rows of a table [G, C] of counts."""
    kind = np.zeros(len(table), np.int64)
    for column in table.T:
        # Numbered after each column, so that the product cannot overflow.
        kind = np.unique(kind * (int(column.max()) + 1) + column, return_inverse=True)[1]
    return kind


def _deal_remainder(
    remainder: NDArray[np.int64], table: NDArray[np.int64], fold: NDArray[np.int64], parts: int
) -> None:
    total = table.sum(axis=0)
    rest = np.zeros(len(table), np.bool_)
    rest[remainder] = True
    filled = np.zeros((parts, table.shape[1]))
    np.add.at(filled, fold[~rest], table[~rest])
    filled /= total
    shares, sizes = table / total, table.sum(axis=1)
    photos = (filled * total).sum(axis=1)
    uneven = np.argsort(-table[remainder].std(axis=1), kind="stable")
    for group in remainder[uneven].tolist():
        # The spread of a class over the folds grows with the sum of squares: x to x + d adds d (2 x + d).
        share = shares[group]
        growth = (share * (2 * filled + share)).sum(axis=1)
        # Among equally good folds, the smallest.
        best = int(np.lexsort((photos, np.round(growth, 12)))[0])
        fold[group] = best
        filled[best] += share
        photos[best] += sizes[group]
