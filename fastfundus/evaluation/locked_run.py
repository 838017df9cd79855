"""Locked runs: fitted operating points with metrics on validation and test, protected by a hash.

operating_point.json   schema, task, and by output: temperature, threshold, the target it was chosen for, metrics on
                       validation and test; `overall`, metrics of all outputs together; `lock`, a hash of the weights
                       and of the values fitted for them
predictions.parquet    predictions for every validation and test photo
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.files import atomic_write, hash_file, read_small
from fastfundus.spec import fingerprint_of
from fastfundus.training.run import Run, learned_before, learned_photos, read_table

__all__ = [
    "Measured", "is_locked", "read_operating_point", "rows_by_split", "rows_to_measure", "weights_hash",
    "write_operating_point",
]  # fmt: skip

SCHEMA = 3
_FILE = "operating_point.json"
_SIDES = ("validation", "test")


@dataclass(frozen=True, slots=True)
class Measured:
    """Results of a locked run on photos it has not learned from."""

    labels: dict[str, dict[str, Any]]
    """Metrics by output, as plain data."""
    overall: dict[str, dict[str, Any]]
    """Metrics of all outputs together."""
    predictions: pl.DataFrame
    """Columns path, sha256, patient, label_<output>, p_<output>; for vessels dice, cldice, auroc."""
    which: str
    """Description of which photos were measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"photos": self.which, "labels": self.labels, "overall": self.overall}


def weights_hash(run: Run) -> str:
    """Return the SHA-256 of the best checkpoint as 64 hex digits."""
    return hash_file(run.path / "best.safetensors")


def _lock(run: Run, labels: dict[str, dict[str, Any]], guard: dict[str, Any] | None) -> str:
    points = {name: {key: value for key, value in entry.items() if key not in _SIDES} for name, entry in labels.items()}
    # Runs of version 0.1 have no guard.
    locked = {"weights": weights_hash(run), "points": points} | ({} if guard is None else {"guard": guard})
    return fingerprint_of(locked)


def write_operating_point(
    run: Run,
    points: dict[str, dict[str, Any]],
    measured: dict[str, Measured],
    guard: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `operating_point.json` and `predictions.parquet`.

    Args:
        run: the run to write into.
        points: fitted values by output.
        measured: results for "val" and "test" at these values.
        guard: see `fit_guard`; None for runs that output maps.

    Returns:
        The content of operating_point.json.
    """
    sides = dict(zip(_SIDES, (measured["val"], measured["test"]), strict=True))
    labels = {
        name: point | {side: entry.labels[name] for side, entry in sides.items()} for name, point in points.items()
    }
    overall = {side: entry.overall for side, entry in sides.items()}
    lock = _lock(run, labels, guard)
    document = {"schema": SCHEMA, "task": run.config.task, "labels": labels, "overall": overall, "lock": lock}
    document |= {} if guard is None else {"guard": guard}
    parts = [entry.predictions.with_columns(split=pl.lit(name)) for name, entry in measured.items()]
    with atomic_write(run.path / "predictions.parquet") as partial:
        pl.concat(parts).write_parquet(partial)
    with atomic_write(run.path / _FILE) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def is_locked(folder: Path) -> bool:
    """Return whether a run's folder contains its operating point, which is written last."""
    return (folder / _FILE).is_file()


def read_operating_point(run: Run) -> dict[str, Any]:
    """Read `operating_point.json`.

    Raises:
        CheckpointError: the file is missing or has another schema, or it or the weights changed after locking.
    """
    file = run.path / _FILE
    anew = f"remove {_FILE} and finish the run again: fastfundus train ... --resume"
    try:
        document: dict[str, Any] = json.loads(read_small(file))
        schema, locked = document.get("schema"), document.get("lock")
        same = schema == SCHEMA and locked == _lock(run, document["labels"], document.get("guard"))
    except FileNotFoundError:
        raise CheckpointError(f"{run.path} has no {_FILE}; finish the run: fastfundus train ... --resume") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged ({error}); {anew}") from None
    if schema != SCHEMA:
        raise CheckpointError(f"{file} has schema {schema}, this FastFundus reads {SCHEMA}; {anew}")
    if not same:
        raise CheckpointError(
            f"{file}: the thresholds, the temperatures or the run's weights were changed after they were locked; {anew}"
        )
    return document


def rows_by_split(run: Run, cache: PhotoCache) -> dict[str, NDArray[np.int64]]:
    """Return the rows of the run's validation and test photos in its cache."""
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    splits = read_table(run.path, "splits.parquet")
    place = {(path, sha): row for row, (path, sha) in enumerate(cache.manifest.select("path", "sha256").iter_rows())}
    result = {}
    for name in ("val", "test"):
        keys = splits.filter(pl.col("split") == name).select("path", "sha256").rows()
        missing = [key for key in keys if key not in place]
        if missing:
            raise CheckpointError(
                f"{run.path}: its {name} photo {missing[0][0]} is not in {cache.path}; use the cache it was trained on"
            )
        result[name] = np.array([place[key] for key in keys], dtype=np.int64)
    return result


def rows_to_measure(run: Run, cache: PhotoCache, usable: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Return the photos that a run has not learned from.

    In the run's own cache these are its test patients, in other caches all photos whose bytes it has not seen.

    Args:
        run: the run to measure.
        cache: its own cache or another.
        usable: labelled rows of the cache.

    Returns:
        The rows, and a description of which they are.
    """
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    if tuple(path.absolute() for path in cache.paths) == run.caches:
        rows = rows_by_split(run, cache)["test"]
        known = cache.manifest["sha256"].gather(rows).is_in(list(learned_before(run.path))).sum()
        flattered = f" ({known} of them seen by the run it started from: overestimates performance)" if known else ""
        return rows, f"test patients{flattered}"
    seen, hashes = learned_photos(run.path), cache.manifest["sha256"].to_list()
    rows = np.array([row for row in usable if hashes[row] not in seen], dtype=np.int64)
    return rows, f"external photos ({len(usable) - len(rows)} left out: the run learned from them)"
