"""What a run is worth on validation and test, and the lock on what was fitted.

operating_point.json   schema, task, and by output: temperature, threshold, the target it was chosen for, metrics of
                       validation and test; `overall`, metrics of all outputs together; `lock`, a hash of the weights
                       and of what was fitted for them
predictions.parquet    what every photo of validation and test was given
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.files import replaced
from fastfundus.spec import fingerprint_of
from fastfundus.train.ancestry import learned_before, learned_photos
from fastfundus.train.run import Run

__all__ = [
    "Measured", "is_measured", "read_operating_point", "rows_by_split", "rows_to_measure", "weights_hash",
    "write_operating_point",
]  # fmt: skip

SCHEMA = 3
_FILE = "operating_point.json"
_SIDES = ("validation", "test")


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, as locked, on photos it has not learned from."""

    labels: dict[str, dict[str, Any]]
    """Metrics by output, plain data."""
    overall: dict[str, dict[str, Any]]
    """Of all outputs together."""
    predictions: pl.DataFrame
    """path, sha256, patient, label_<output>, p_<output>; of vessels dice, cldice, auroc."""
    which: str
    """In words, which photos."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"photos": self.which, "labels": self.labels, "overall": self.overall}


def weights_hash(run: Run) -> str:
    """Sha256 of the best checkpoint, as 64 hex digits."""
    with (run.path / "best.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(run: Run, labels: dict[str, dict[str, Any]]) -> str:
    points = {name: {key: value for key, value in entry.items() if key not in _SIDES} for name, entry in labels.items()}
    return fingerprint_of({"weights": weights_hash(run), "points": points})


def write_operating_point(run: Run, points: dict[str, dict[str, Any]], measured: dict[str, Measured]) -> dict[str, Any]:
    """Write `operating_point.json` and `predictions.parquet`.

    Args:
        run: where to.
        points: what was fitted, by output.
        measured: what "val" and "test" then gave.

    Returns:
        The content of operating_point.json.
    """
    sides = dict(zip(_SIDES, (measured["val"], measured["test"]), strict=True))
    labels = {
        name: point | {side: entry.labels[name] for side, entry in sides.items()} for name, point in points.items()
    }
    overall = {side: entry.overall for side, entry in sides.items()}
    lock = _lock(run, labels)
    document = {"schema": SCHEMA, "task": run.config.task, "labels": labels, "overall": overall, "lock": lock}
    parts = [entry.predictions.with_columns(split=pl.lit(name)) for name, entry in measured.items()]
    with replaced(run.path / "predictions.parquet") as partial:
        pl.concat(parts).write_parquet(partial)
    with replaced(run.path / _FILE) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def is_measured(folder: Path) -> bool:
    """Whether a run's folder has its operating point, which is what is written last."""
    return (folder / _FILE).is_file()


def read_operating_point(run: Run) -> dict[str, Any]:
    """Read `operating_point.json`.

    Raises:
        CheckpointError: the run has none, or it or the weights were changed after it was locked.
    """
    file = run.path / _FILE
    try:
        document: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{run.path}: has no {_FILE}; finish the run: fastfundus train ... --resume") from None
    anew = f"remove {_FILE} and finish the run again: fastfundus train ... --resume"
    if document.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: has schema {document.get('schema')}, this FastFundus reads {SCHEMA}; {anew}")
    if document["lock"] != _lock(run, document["labels"]):
        raise CheckpointError(
            f"{file}: its thresholds or temperatures, or the weights beside it, were changed after they were locked; "
            f"{anew}"
        )
    return document


def rows_by_split(run: Run, cache: PhotoCache) -> dict[str, NDArray[np.int64]]:
    """Rows of the run's validation and test photos in its cache."""
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    splits = pl.read_parquet(run.path / "splits.parquet")
    place = {(path, sha): row for row, (path, sha) in enumerate(cache.manifest.select("path", "sha256").iter_rows())}
    result = {}
    for name in ("val", "test"):
        keys = splits.filter(pl.col("split") == name).select("path", "sha256").rows()
        missing = [key for key in keys if key not in place]
        if missing:
            raise CheckpointError(
                f"{run.path}: its {name} photo {missing[0][0]} is not in {cache.path}; give its own cache"
            )
        result[name] = np.array([place[key] for key in keys], dtype=np.int64)
    return result


def rows_to_measure(run: Run, cache: PhotoCache, usable: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Photos that a run has not learned from: its test patients, or of other caches all whose bytes it has not seen.

    Args:
        run: what is to be measured.
        cache: its own, or another.
        usable: rows of the cache that are labelled.

    Returns:
        Rows, and in words which they are.
    """
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    if tuple(path.absolute() for path in cache.paths) == run.caches:
        rows = rows_by_split(run, cache)["test"]
        known = cache.manifest["sha256"].gather(rows).is_in(list(learned_before(run.path))).sum()
        flattered = f" ({known} photos of them were learned from by the run it started from: too good)" if known else ""
        return rows, f"test patients{flattered}"
    seen, hashes = learned_photos(run.path), cache.manifest["sha256"].to_list()
    rows = np.array([row for row in usable if hashes[row] not in seen], dtype=np.int64)
    return rows, f"external photos ({len(usable) - len(rows)} left out: the run learned from them)"
