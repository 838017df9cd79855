"""Patient-grouped, stratified folds. A patient, and photos with the same bytes, never straddle two of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.config import DataConfig
from fastfundus.errors import DataError

__all__ = ["assign_splits", "group_photos"]


def group_photos(patients: Sequence[str], hashes: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of photos that must stay together.

    Args:
        patients: [N] patient of each photo.
        hashes: [N] sha256 of each photo; equal bytes under two patients tie these patients together.

    Returns:
        [N] group numbers, counted from 0 in order of appearance.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for patient, sha in zip(patients, hashes, strict=True):
        parent[root(f"patient {patient}")] = root(f"bytes {sha}")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(f"patient {patient}"), len(numbers)) for patient in patients])


def assign_splits(manifest: pl.DataFrame, labels: NDArray[np.float64], config: DataConfig) -> list[str]:
    """Say for each photo whether it trains, validates or tests.

    Splits that the label file fixed are kept. Otherwise patients are dealt into `config.folds` folds, balanced by
    label: fold `config.fold` tests, the next one validates, the others train.

    Args:
        manifest: a cache's manifest, N rows, or a part of it.
        labels: [N] 0 or 1.
        config: folds and seed.

    Returns:
        [N] of "train", "val", "test", "excluded".

    Raises:
        DataError: the photos or patients are too few, or fixed splits are incomplete or torn by equal photos.
    """
    fixed = manifest["split"].to_list()
    groups = group_photos(manifest["patient"].to_list(), manifest["sha256"].to_list())
    if any(name in ("train", "val", "test") for name in fixed):
        names = [name or "excluded" for name in fixed]
        _check_fixed(manifest, names, groups)
    else:
        names = _deal(groups, labels, config)
        names = ["excluded" if name == "excluded" else dealt for name, dealt in zip(fixed, names, strict=True)]
    for wanted in ("train", "val", "test"):
        seen = {int(label) for label, name in zip(labels, names, strict=True) if name == wanted}
        if seen != {0, 1}:
            raise DataError(
                f"the {wanted} split has {'only label ' + str(*seen) if seen else 'no photos'}: both classes are "
                "needed in each split; add photos, or change data.folds or data.split_seed"
            )
    return names


def _deal(groups: NDArray[np.int64], labels: NDArray[np.float64], config: DataConfig) -> list[str]:
    from sklearn.model_selection import StratifiedGroupKFold

    if len(set(groups.tolist())) < config.folds:
        raise DataError(
            f"{len(set(groups.tolist()))} patients cannot fill {config.folds} folds; add patients or lower data.folds"
        )
    splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.split_seed)
    try:
        with warnings.catch_warnings():
            # Said below, in our words, when a split ends up with one class.
            warnings.simplefilter("ignore", UserWarning)
            folds = [test for _, test in splitter.split(np.zeros(len(labels)), labels, groups)]
    except ValueError as error:
        raise DataError(f"the photos cannot be dealt into {config.folds} folds: {error}; add photos") from None
    names = np.full(len(labels), "train", dtype=object)
    names[folds[(config.fold + 1) % config.folds]] = "val"
    names[folds[config.fold]] = "test"
    return [str(name) for name in names]


def _check_fixed(manifest: pl.DataFrame, names: list[str], groups: NDArray[np.int64]) -> None:
    home: dict[int, tuple[str, str]] = {}
    for path, name, group in zip(manifest["path"].to_list(), names, groups.tolist(), strict=True):
        if name == "excluded":
            continue
        first, where = home.setdefault(group, (path, name))
        if where != name:
            raise DataError(
                f"{first} ({where}) and {path} ({name}) belong to one patient or are the same photo; "
                "put them into one split of the label file"
            )
