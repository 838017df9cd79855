"""Ground truth of a task from the columns of a manifest: one value per output, NaN where it is unknown."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.errors import ConfigError, DataError, close_matches
from fastfundus.records import NORMAL_NAMES, Status

__all__ = [
    "Targets",
    "both_classes",
    "finding_outputs",
    "grades",
    "label_columns",
    "read_auxiliary",
    "read_targets",
    "usable_rows",
]

_NORMAL_OUTPUTS = NORMAL_NAMES | {"no_finding", "no finding", "eye_n"}
"""Lower-case names of outputs that mean that nothing was found."""
_MAX_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Targets:
    """Ground truth of every photo of a manifest."""

    truth: NDArray[np.float64]
    """[N, L] 1 for positive, 0 for negative, NaN for unknown."""
    outputs: tuple[str, ...]
    """L names, as shown in results."""
    summary: str
    """Description of what is learned."""

    @property
    def strata(self) -> NDArray[np.int64]:
        """[N] one class per photo, by which splits and samplers balance: 0, or 1 + its rarest positive output."""
        known = np.nan_to_num(self.truth)
        rare_first = np.argsort(known.sum(axis=0), kind="stable")
        result = np.zeros(len(known), np.int64)
        for output in rare_first[::-1]:
            result[known[:, output] == 1] = 1 + output
        return result


def read_targets(
    manifest: pl.DataFrame, task: str, labels: tuple[str, ...] = (), outputs: tuple[str, ...] = ()
) -> Targets:
    """Read the ground truth of a task.

    Args:
        manifest: manifest of a cache, N rows.
        task: any task except "vessels".
        labels: see `DataConfig.labels`.
        outputs: outputs of a run that is to be evaluated on these photos; empty derives them from the manifest.

    Raises:
        DataError: a column is absent or has invalid values.
        ConfigError: too many or too few columns are given.
    """
    return _READERS[task](manifest, labels, outputs)


def read_auxiliary(
    manifest: pl.DataFrame, patterns: tuple[str, ...], used: tuple[str, ...] = ()
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Read the auxiliary labels of a manifest.

    Args:
        manifest: manifest of a cache, N rows.
        patterns: see `DataConfig.auxiliary`.
        used: columns that are learned already, which patterns leave out.

    Returns:
        [N, A] 1 for positive, 0 for negative, NaN for unknown; and the A columns.

    Raises:
        DataError: nothing matches a pattern, or a column has other values.
    """
    names: list[str] = []
    for pattern in patterns:
        choices = [name for name in label_columns(manifest) if name not in used]
        found = [pattern] if pattern in choices else fnmatch.filter(choices, pattern)
        if not found:
            raise DataError(f"data.auxiliary: no label column matches {pattern!r}{close_matches(pattern, choices)}")
        names += [name for name in found if name not in names]
    values = [_yes_or_no(manifest, name) for name in names]
    return np.stack(values, axis=1) if values else np.empty((len(manifest), 0)), tuple(names)


def usable_rows(manifest: pl.DataFrame, targets: Targets) -> NDArray[np.int64]:
    """Return the rows usable for training or testing: the photo is `ok` and at least one of its labels is known."""
    usable = (manifest["status"] == Status.OK.value).to_numpy() & np.isfinite(targets.truth).any(axis=1)
    return np.flatnonzero(usable)


def finding_outputs(outputs: tuple[str, ...], chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Return the outputs that make a photo positive.

    Raises:
        ConfigError: `chosen` contains a name that is not an output.
    """
    for name in chosen:
        if name not in outputs:
            raise ConfigError(f"data.findings: {name!r} is not an output{close_matches(name, outputs)}")
    return chosen or tuple(name for name in outputs if name.lower() not in _NORMAL_OUTPUTS) or outputs


def both_classes(truth: NDArray[np.float64]) -> bool:
    """Return whether ground truth [N] of one output has both positives and negatives; NaN is unknown."""
    return bool((truth == 1).any() and (truth == 0).any())


def grades(reached: NDArray[np.floating | np.bool_]) -> NDArray[np.int64]:
    """Return grades [N], counted from 0, of ordinal ground truth or decisions [N, L], one output per grade step."""
    return np.nan_to_num(reached).sum(axis=1).astype(np.int64)


def _one(labels: tuple[str, ...], task: str, default: str) -> str:
    if len(labels) > 1:
        raise ConfigError(f"data.labels has {len(labels)} columns; {task} takes one, multilabel takes several")
    return labels[0] if labels else default


def label_columns(manifest: pl.DataFrame) -> list[str]:
    """Return the columns that come from the label file or an adapter."""
    return [name for name in manifest.columns if name not in MANIFEST_COLUMNS]


def _column(manifest: pl.DataFrame, label: str) -> pl.Series:
    choices = label_columns(manifest)
    if not choices:
        raise DataError("the cache was prepared without labels; prepare it again with --labels or an adapter")
    if label not in choices:
        raise DataError(f"the cache has no label column {label!r}{close_matches(label, choices)}")
    return manifest[label]


def _check(manifest: pl.DataFrame, label: str, sound: Callable[[float], bool], allowed: str) -> NDArray[np.float64]:
    """Read a numeric column, NaN where it is empty."""
    values = _column(manifest, label)
    # One cell of text makes the whole column one of text.
    wrong = {value for value in values.drop_nulls().unique().to_list() if not _is_sound(value, sound)}
    row = next((row for row, value in enumerate(values) if value in wrong), None)
    if row is not None:
        raise DataError(
            f"label {label!r} must be {allowed}, got {values[row]!r} for {manifest['path'][row]}; correct the label "
            "file and prepare again"
        )
    return values.cast(pl.Float64).to_numpy().astype(np.float64)


def _is_sound(value: str | float, sound: Callable[[float], bool]) -> bool:
    try:
        return sound(float(value))
    except ValueError:
        return False


def _yes_or_no(manifest: pl.DataFrame, label: str) -> NDArray[np.float64]:
    return _check(manifest, label, lambda value: value in (0.0, 1.0), "0 or 1")


def _abnormality(manifest: pl.DataFrame, labels: tuple[str, ...], outputs: tuple[str, ...]) -> Targets:
    label = _one(labels, "abnormality", "")
    if not label:
        by_lower = {name.lower(): name for name in reversed(label_columns(manifest))}
        label = next((by_lower[name] for name in ("abnormal", "normal") if name in by_lower), "")
    if not label:
        have = label_columns(manifest)
        said = f"its columns are {', '.join(have)}" if have else "it was prepared without labels"
        raise DataError(f"the cache has no column 'abnormal' or 'normal' ({said}); select a column with --label")
    truth, description = _yes_or_no(manifest, label), label
    if label.lower() == "normal":
        truth, description = 1 - truth, "1 - normal"
    return Targets(truth[:, None], ("abnormal",), description)


def _multilabel(manifest: pl.DataFrame, labels: tuple[str, ...], outputs: tuple[str, ...]) -> Targets:
    labels = outputs or labels
    if len(labels) < 2 or len(set(labels)) < len(labels):
        numbers = [name for name in label_columns(manifest) if manifest[name].dtype.is_numeric()]
        fit = [name for name in numbers if manifest[name].drop_nulls().is_in([0.0, 1.0]).all()]
        raise ConfigError(
            "multilabel needs two or more different columns: give --label for each; columns of 0 and 1 in this cache: "
            f"{', '.join(fit) or 'none'}"
        )
    # A data set that does not label a finding leaves it unknown, which is not the same as negative.
    truth = [
        _yes_or_no(manifest, name) if name in manifest.columns or not outputs else np.full(len(manifest), np.nan)
        for name in labels
    ]
    return Targets(np.stack(truth, axis=1), tuple(labels), ", ".join(labels))


def _multiclass(manifest: pl.DataFrame, labels: tuple[str, ...], outputs: tuple[str, ...]) -> Targets:
    label = _one(labels, "multiclass", "class")
    values = _column(manifest, label)
    names = [None if value is None else f"{value:g}" if isinstance(value, float) else value for value in values]
    classes = outputs or tuple(sorted({name for name in names if name is not None}, key=_natural))
    if not 2 <= len(classes) <= _MAX_CLASSES:
        raise DataError(f"label {label!r} has {len(classes)} classes; multiclass needs 2 to {_MAX_CLASSES}")
    number = {name: index for index, name in enumerate(classes)}
    truth = np.full((len(names), len(classes)), np.nan)
    for row, name in enumerate(names):
        if name in number:
            truth[row] = 0
            truth[row, number[name]] = 1
    return Targets(truth, classes, label)


def _natural(name: str) -> tuple[int, float, str]:
    """Return a sort key that puts numbers first, by value, then text."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _ordinal(manifest: pl.DataFrame, labels: tuple[str, ...], outputs: tuple[str, ...]) -> Targets:
    label = _one(labels, "ordinal", "dr_grade")
    values = _check(manifest, label, lambda value: value >= 0 and value == int(value), "a whole number of 0 or more")
    highest = len(outputs) if outputs else int(np.nanmax(values, initial=0))
    if not 1 <= highest < _MAX_CLASSES:
        raise DataError(f"label {label!r} has {highest + 1} grades; ordinal needs 2 to {_MAX_CLASSES}")
    truth = (values[:, None] >= np.arange(1, highest + 1)).astype(np.float64)
    truth[np.isnan(values)] = np.nan
    return Targets(truth, outputs or tuple(f"{label}_ge{grade}" for grade in range(1, highest + 1)), label)


_READERS: dict[str, Callable[[pl.DataFrame, tuple[str, ...], tuple[str, ...]], Targets]] = {
    "abnormality": _abnormality,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "ordinal": _ordinal,
}
