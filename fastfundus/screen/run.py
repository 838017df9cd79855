"""One screening run: sources and a bundle in, a folder of results out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import polars as pl

from fastfundus.data.source import SourceList
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import ConfigError
from fastfundus.screen.pipeline import ScreenedPhoto, Timing, screen_photos
from fastfundus.screen.report import Gallery, write_report
from fastfundus.screen.results import AuditLog, result_row, results_table, write_tables

__all__ = ["ScreeningRun", "screen_to_folder"]

_FILES = ("results.csv", "results.parquet", "patients.csv", "report.html", "audit.jsonl")


@dataclass(frozen=True, slots=True)
class ScreeningRun:
    """What a run left."""

    results: pl.DataFrame
    """One row per input."""
    timing: Timing
    report: Path


def screen_to_folder(
    listing: SourceList,
    bundle: Bundle,
    output: Path,
    *,
    sources: Sequence[Path],
    overwrite: bool = False,
    on_photo: Callable[[ScreenedPhoto, Timing], None] = lambda photo, timing: None,
) -> ScreeningRun:
    """Screen every photo of a listing and write results, report and audit log.

    Args:
        listing: the inputs.
        bundle: what to screen them with.
        output: a folder; made if absent.
        sources: what the user named, for the report.
        overwrite: replace the results of an earlier run in `output`.
        on_photo: called with every row.

    Raises:
        ConfigError: `output` holds results already, or the bundle makes maps.
    """
    if bundle.about["output"] != "probabilities":
        raise ConfigError(
            f"{bundle.path}: makes maps, and screening needs a probability a photo; give it a bundle of another task"
        )
    kept = [name for name in _FILES if (output / name).exists()]
    if kept and not overwrite:
        raise ConfigError(f"{output}: holds {kept[0]} already; add --overwrite, or choose another --output")
    for name in kept:
        (output / name).unlink()
    output.mkdir(parents=True, exist_ok=True)
    audit = AuditLog(output / "audit.jsonl")
    try:
        audit.write(
            "start",
            time=_now(),
            fastfundus=metadata.version("fastfundus"),
            bundle=bundle.fingerprint,
            backend=bundle.backend,
            precision=bundle.precision,
            spec=bundle.spec.fingerprint,
            thresholds=dict(zip(bundle.labels, bundle.thresholds, strict=True)),
            sources=[str(source) for source in sources],
            inputs=len(listing.photos),
        )
        timing, gallery, rows = Timing(), Gallery(), []
        for photo in screen_photos(listing.photos, bundle, timing):
            row = result_row(photo, bundle)
            audit.write("photo", **{key: value for key, value in row.items() if key != "bundle"})
            gallery.add(photo)
            rows.append(row)
            on_photo(photo, timing)
        results = results_table(rows, bundle)
        assert len(results) == len(listing.photos)
        write_tables(output, results, bundle)
        named = ", ".join(str(source) for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
        finished = datetime.fromtimestamp(time.time()).astimezone()
        write_report(output / "report.html", results, bundle, gallery, timing, source=named, finished=finished)
        audit.write("end", time=_now(), rows=len(results), seconds=round(timing.wall, 3))
    finally:
        audit.close()
    return ScreeningRun(results, timing, output / "report.html")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
