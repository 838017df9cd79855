"""Building an engine from a run folder: gathers what `engines.build` asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from fastfundus.data import PhotoCache
from fastfundus.engines.build import MOST_PARITY_PHOTOS, build_bundle
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.parity import ParityReport
from fastfundus.errors import CheckpointError, ConfigError, DataError
from fastfundus.evaluate.operating_point import read_operating_point
from fastfundus.models.activation import ACTIVATIONS
from fastfundus.train.run import Run
from fastfundus.train.targets import read_targets

__all__ = ["build_from_run"]


def build_from_run(
    run: Run, output: Path, *, cache: Path | None = None, backend: str = "openvino", precision: str = "auto"
) -> tuple[Bundle, ParityReport]:
    """Build an engine and prove it on photos that the run did not train on.

    Args:
        run: a finished run.
        output: the bundle's folder.
        cache: photos to prove it on; None takes the cache the run was trained on.
        backend: as for `build_bundle`.
        precision: as for `build_bundle`.

    Raises:
        CheckpointError: the cache holds no photo that was kept out of training.
        ConfigError: the run maps vessels.
    """
    if run.config.task == "vessels":
        raise ConfigError(
            f"{run.path} maps vessels; engines give photos probabilities so far: build one of another task"
        )
    photos = PhotoCache.open(*([cache] if cache else run.caches))
    photos.spec.require_same(run.spec, mine=f"the cache {photos.path}", theirs=f"the run {run.path}")
    splits = pl.read_parquet(run.path / "splits.parquet")
    learned = splits.filter(pl.col("split") == "train")["sha256"]
    usable = (pl.col("status") == "ok") & ~pl.col("sha256").is_in(learned.implode())
    rows = np.flatnonzero(photos.manifest.select(usable).to_series().to_numpy())
    if not len(rows):
        raise CheckpointError(
            f"{photos.path}: holds no photo that {run.path} did not train on; give others with --cache"
        )
    # Spread over the whole set: neighbours are often of one patient.
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_PARITY_PHOTOS)).astype(int)]
    labels = read_operating_point(run)["labels"]
    try:
        truth = read_targets(photos.manifest, run.config.task, run.config.data.labels, run.labels).truth[chosen]
    except DataError:
        # Photos to prove an engine on need no labels: the report then has no loss of AUROC, and says None.
        truth = None
    provenance = {
        "run": str(run.path.absolute()),
        "backbone": run.config.model.backbone,
        "config": run.config.to_dict(),
        "epoch": run.epoch,
        "parity_photos": [str(path.absolute()) for path in photos.paths],
    }
    return build_bundle(
        run.load_model(),
        run.spec,
        labels,
        np.ascontiguousarray(photos.photos[chosen]),
        output,
        provenance=provenance,
        truth=truth,
        activation=ACTIVATIONS[run.config.task],
        backend=backend,
        precision=precision,
    )
