"""Building an engine from a run folder: gathers what `engines.build` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data import PhotoCache
from fastfundus.data.masks import photos_with_masks
from fastfundus.engines.build import MOST_PARITY_MAPS, MOST_PARITY_PHOTOS, build_bundle
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.parity import ParityReport
from fastfundus.engines.quantize import MOST_CALIBRATION_PHOTOS
from fastfundus.engines.trials import Evidence
from fastfundus.errors import CheckpointError, DataError
from fastfundus.evaluate.measured import read_operating_point
from fastfundus.models.activation import ACTIVATIONS
from fastfundus.models.segmenter import STRIDE_PX
from fastfundus.screen.drift import reference_of
from fastfundus.train.run import Run
from fastfundus.train.targets import read_targets
from fastfundus.train.vessels import mask_column, masks_in_cache

__all__ = ["build_from_run"]


def build_from_run(
    run: Run,
    output: Path,
    *,
    cache: Path | None = None,
    calibration: Path | None = None,
    backend: str = "openvino",
    precision: str = "auto",
    options: dict[str, Any] | None = None,
) -> tuple[Bundle, ParityReport]:
    """Build an engine and prove it on photos that the run did not train on.

    Args:
        run: a finished run.
        output: as for `build_bundle`.
        cache: photos to prove it on; None takes the cache the run was trained on.
        calibration: photos that integer engines learn their ranges on; None takes those the run was trained on.
        backend: as for `build_bundle`.
        precision: as for `build_bundle`.
        options: as for `build_bundle`.

    Raises:
        CheckpointError: the cache holds no photo that was kept out of training.
    """
    maps = run.config.task == "vessels"
    photos = _opened(run, [cache] if cache else list(run.caches))
    splits = pl.read_parquet(run.path / "splits.parquet")
    learned = splits.filter(pl.col("split") == "train")["sha256"]
    usable = pl.col("status") == "ok"
    rows = _rows(photos, usable & ~pl.col("sha256").is_in(learned.implode()))
    if not len(rows):
        raise CheckpointError(
            f"{photos.path}: holds no photo that {run.path} did not train on; give others with --cache"
        )
    chosen = _spread(rows, MOST_PARITY_MAPS if maps else MOST_PARITY_PHOTOS)
    if calibration:
        teaching = _opened(run, [calibration])
        # Never what the engine is proven on.
        known = photos.manifest["sha256"].gather(chosen)
        pool = _rows(teaching, usable & ~pl.col("sha256").is_in(known.implode()))
    else:
        teaching, pool = photos, _rows(photos, usable & pl.col("sha256").is_in(learned.implode()))
    teachers = _spread(pool, MOST_CALIBRATION_PHOTOS)
    point = read_operating_point(run)
    labels = point["labels"]
    model = ScreeningModel(
        run.load_model(),
        run.spec,
        [float(entry["temperature"]) for entry in labels.values()],
        ACTIVATIONS[run.config.task],
        STRIDE_PX if maps else 1,
    ).eval()
    provenance = {
        "run": str(run.path.absolute()),
        "backbone": run.config.model.backbone,
        "config": run.config.to_dict(),
        "epoch": run.epoch,
        # Of weights and thresholds: a bundle is traced to the very operating point that was locked.
        "lock": point["lock"],
        "parity_photos": [str(path.absolute()) for path in photos.paths],
        "calibration_photos": [str(path.absolute()) for path in teaching.paths],
    }
    evidence = Evidence(
        np.ascontiguousarray(photos.photos[chosen]),
        _truth(run, photos, chosen),
        np.ascontiguousarray(teaching.photos[teachers]),
    )
    return build_bundle(
        model, run.spec, labels, evidence, output,
        provenance=provenance, reference=None if maps else _reference(run, photos, run.labels),
        backend=backend, precision=precision, options=options,
    )  # fmt: skip


def _reference(run: Run, photos: PhotoCache, labels: tuple[str, ...]) -> dict[str, Any]:
    """What drift is measured from: scores of photos the run did not learn from, and the quality of all of them."""
    scores = pl.read_parquet(run.path / "predictions.parquet")
    return {
        "scores": {name: reference_of(scores[f"p_{name}"].drop_nulls().to_numpy()) for name in labels},
        "quality": reference_of(photos.manifest["quality"].drop_nulls().to_numpy()),
    }


def _opened(run: Run, paths: list[Path]) -> PhotoCache:
    photos = PhotoCache.open(*paths)
    photos.spec.require_same(run.spec, mine=f"the cache {photos.path}", theirs=f"the run {run.path}")
    return photos


def _rows(photos: PhotoCache, which: pl.Expr) -> NDArray[np.int64]:
    return np.flatnonzero(photos.manifest.select(which).to_series().to_numpy())


def _spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Some rows, spread over the whole set: neighbours are often of one patient."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)] if len(rows) else rows


def _truth(run: Run, photos: PhotoCache, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """What is known of photos; None where nothing is: photos to prove an engine on need no labels."""
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
