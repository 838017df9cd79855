"""Build an inference engine from a run, verified to give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.data.joined_cache import open_caches
from fastfundus.data.journal import locked
from fastfundus.data.masks import photos_with_masks
from fastfundus.engines.build import MAX_PARITY_MAPS, MAX_PARITY_PHOTOS, build_bundle
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.parity import ParityReport
from fastfundus.engines.quantize import MAX_CALIBRATION_PHOTOS
from fastfundus.engines.select_precision import ParityData
from fastfundus.errors import CheckpointError, DataError
from fastfundus.evaluation.guard import load_guard
from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.models.activation import ACTIVATIONS
from fastfundus.models.segmenter import STRIDE_PX
from fastfundus.screening.drift import reference_of
from fastfundus.training.run import Run, read_table
from fastfundus.training.tasks.segmentation import mask_column, masks_in_cache
from fastfundus.training.tasks.targets import read_targets
from fastfundus.workflow.inputs import open_any_run

__all__ = ["build_engine"]


def build_engine(
    run: str | Path | Run,
    output: str | Path,
    *,
    cache: str | Path | None = None,
    calibration: str | Path | None = None,
    backend: str = "openvino",
    precision: str = "auto",
    options: dict[str, Any] | None = None,
) -> tuple[Bundle, ParityReport]:
    """Build an engine from a run, and verify it on photos that the run has not trained on.

    Args:
        run: a finished run, or its folder.
        output: the bundle to write: a folder, or one file NAME.zip.
        cache: photos to verify it on; None uses the caches that the run was trained on.
        calibration: cache of photos for the ranges of 8-bit engines; None uses those the run was trained on.
        backend: "openvino", "onnxruntime", "aoti", "tensorrt" or "tensorrt-rtx".
        precision: "auto" builds every precision that this machine computes natively and keeps the fastest that passes.
        options: further options of the backend.

    Returns:
        The bundle, and the report of its comparison with the model.

    Raises:
        CheckpointError: the cache contains no photo that the run has not trained on, or the run is incomplete.
        GateRefused: no engine passes the gate.
        DataError: another process is building the same output.
        MissingDependency: the backend is not installed.

    Example:
        >>> bundle, report = fastfundus.build_engine("run/", "bundle.zip")
    """
    run = open_any_run(run)
    photos = _open_for(run, [Path(cache)] if cache else list(run.caches))
    ranges = _open_for(run, [Path(calibration)]) if calibration else photos
    chosen, calibration_rows = _choose_photos(run, photos, ranges)
    point = read_operating_point(run)
    labels, maps = point["labels"], run.config.task == "vessels"
    model = ScreeningModel(
        run.load_model(),
        run.spec,
        [float(entry["temperature"]) for entry in labels.values()],
        ACTIVATIONS[run.config.task],
        STRIDE_PX if maps else 1,
        load_guard(run, point.get("guard")),
    ).eval()
    provenance = {
        "run": str(run.path.absolute()),
        "backbone": run.config.model.backbone,
        "config": run.config.to_dict(),
        "initial_weights": run.provenance,
        "epoch": run.epoch,
        # Hash of weights and thresholds, by which a bundle is traced to the operating point that was locked.
        "lock": point["lock"],
        "parity_photos": [str(path.absolute()) for path in photos.paths],
        "calibration_photos": [str(path.absolute()) for path in ranges.paths],
    }
    data = ParityData(
        np.ascontiguousarray(photos.photos[chosen]),
        _truth(run, photos, chosen),
        np.ascontiguousarray(ranges.photos[calibration_rows]),
    )
    reference = None if maps else _reference(run, photos, run.labels)
    with locked(Path(output), Path(f"{output}.lock"), "built"):
        return build_bundle(
            model,
            run.spec,
            labels,
            data,
            Path(output),
            provenance=provenance,
            reference=reference,
            backend=backend,
            precision=precision,
            options=options,
        )


def _choose_photos(
    run: Run, photos: PhotoCache, calibration: PhotoCache
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of `photos` to verify the engine on, and the rows of `calibration` to calibrate it on."""
    splits = read_table(run.path, "splits.parquet")
    learned = splits.filter(pl.col("split") == "train")["sha256"]
    usable = pl.col("status") == "ok"
    rows = _rows(photos, usable & ~pl.col("sha256").is_in(learned.implode()))
    if not len(rows):
        raise CheckpointError(
            f"{photos.path} contains no photo that {run.path} has not trained on; give others with --cache"
        )
    chosen = _spread(rows, MAX_PARITY_MAPS if run.config.task == "vessels" else MAX_PARITY_PHOTOS)
    if calibration is photos:
        return chosen, _spread(
            _rows(photos, usable & pl.col("sha256").is_in(learned.implode())), MAX_CALIBRATION_PHOTOS
        )
    # Never calibrate on the photos that verify the engine.
    known = photos.manifest["sha256"].gather(chosen)
    pool = _rows(calibration, usable & ~pl.col("sha256").is_in(known.implode()))
    return chosen, _spread(pool, MAX_CALIBRATION_PHOTOS)


def _reference(run: Run, photos: PhotoCache, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the reference distributions for drift: scores of photos the run has not learned from, quality of all."""
    scores = read_table(run.path, "predictions.parquet")
    return {
        "scores": {name: reference_of(scores[f"p_{name}"].drop_nulls().to_numpy()) for name in labels},
        "quality": reference_of(photos.manifest["quality"].drop_nulls().to_numpy()),
    }


def _open_for(run: Run, paths: list[Path]) -> PhotoCache:
    photos = open_caches(*paths)
    photos.spec.require_same(run.spec, mine=f"the cache {photos.path}", theirs=f"the run {run.path}")
    return photos


def _rows(photos: PhotoCache, which: pl.Expr) -> NDArray[np.int64]:
    return np.flatnonzero(photos.manifest.select(which).to_series().to_numpy())


def _spread(rows: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return at most `limit` rows, spread over the whole set, because neighbours often belong to one patient."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), limit)).astype(int)] if len(rows) else rows


def _truth(run: Run, photos: PhotoCache, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return the ground truth of photos; None if there is none, because verifying an engine needs no labels."""
    try:
        if run.config.task != "vessels":
            return read_targets(photos.manifest, run.config.task, run.config.data.labels, run.labels).truth[rows]
        column = mask_column(run.config)
        known = np.isin(rows, photos_with_masks(photos.manifest, column))
        truth = np.full((len(rows), 1, *photos.photos.shape[1:3]), np.nan)
        masks = masks_in_cache(photos, rows[known], column)
        truth[known, 0] = np.where(masks[..., 1] > 127, masks[..., 0] > 127, np.nan)
        return truth
    except DataError:
        return None
