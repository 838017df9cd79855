"""Results on disk: `results.csv` and `results.parquet` with one row per input, `patients.csv`, `audit.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.engines.bundle import Bundle
from fastfundus.records import Status, identity
from fastfundus.screen.pipeline import ScreenedPhoto

__all__ = ["AuditLog", "patient_table", "result_row", "results_table", "write_tables"]

_SEVERITY = {"positive": 3, "retake": 2, None: 1, "negative": 0}


def _schema(bundle: Bundle) -> dict[str, Any]:
    return {
        "path": pl.String,
        "sha256": pl.String,
        "status": pl.String,
        "reason": pl.String,
        "patient": pl.String,
        "eye": pl.String,
        "quality": pl.Float64,
        **{f"p_{label}": pl.Float64 for label in bundle.labels},
        "decision": pl.String,
        "bundle": pl.String,
    }


def result_row(photo: ScreenedPhoto, bundle: Bundle) -> dict[str, Any]:
    """One row of the results."""
    scores = photo.probabilities or (None,) * len(bundle.labels)
    patient, _, eye = identity(photo.source, photo.prepared.facts)
    return {
        "path": photo.source.name,
        "sha256": photo.prepared.sha256 or None,
        "status": photo.prepared.status.value,
        "reason": photo.prepared.reason or None,
        "patient": patient,
        "eye": eye,
        "quality": photo.prepared.quality,
        **{f"p_{label}": score for label, score in zip(bundle.labels, scores, strict=True)},
        "decision": photo.decision,
        "bundle": bundle.fingerprint,
    }


def results_table(rows: Iterable[dict[str, Any]], bundle: Bundle) -> pl.DataFrame:
    """Rows as a table with fixed column types."""
    return pl.DataFrame(list(rows), schema=_schema(bundle), orient="row")


def patient_table(results: pl.DataFrame, bundle: Bundle) -> pl.DataFrame:
    """Roll photos up to patients: the worst decision counts, and every patient has a row.

    The order from worst: positive, retake (a photo was ungradable), not screened, negative.
    """
    first = f"p_{bundle.labels[0]}"
    severity = pl.col("decision").replace_strict(
        {key: value for key, value in _SEVERITY.items() if key is not None}, default=1, return_dtype=pl.Int8
    )
    names = {value: key or "not screened" for key, value in _SEVERITY.items()}
    return (
        results.with_columns(severity=severity)
        .group_by("patient", maintain_order=True)
        .agg(
            photos=pl.len(),
            screened=(pl.col("status") == Status.OK.value).sum(),
            eyes=pl.col("eye").drop_nulls().unique().sort().str.join("+"),
            highest=pl.col(first).max(),
            severity=pl.col("severity").max(),
        )
        .with_columns(decision=pl.col("severity").replace_strict(names, return_dtype=pl.String))
        .drop("severity")
        .rename({"highest": f"highest_{first}"})
    )


def write_tables(folder: Path, results: pl.DataFrame, bundle: Bundle) -> None:
    """Write both result tables and the patients, each complete or not at all."""
    writers: dict[str, Callable[[Path], object]] = {
        "results.parquet": results.write_parquet,
        "results.csv": results.write_csv,
        "patients.csv": patient_table(results, bundle).write_csv,
    }
    for name, write in writers.items():
        partial = folder / f"{name}.partial"
        write(partial)
        partial.replace(folder / name)


class AuditLog:
    """Appends what happened, a JSON object a line, so that a run can be recounted later."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Append one event."""
        self._file.write(json.dumps({"event": event, **facts}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
