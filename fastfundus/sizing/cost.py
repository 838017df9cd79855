"""Cost model: core-seconds per photo fitted on measurements, and the predicted throughput of a machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastfundus.errors import ConfigError
from fastfundus.photo.decode_plan import plan_decode
from fastfundus.photo.header import read_header
from fastfundus.photo.prepare import min_side
from fastfundus.spec import PreprocessSpec

__all__ = ["Machine", "PhotoCost", "PhotoKind", "Prediction", "fit_photo_cost", "kind_of", "predict"]


@dataclass(frozen=True, slots=True)
class PhotoKind:
    """Properties of a photo that determine how long it takes to prepare."""

    megapixels: float
    """Megapixels of the file."""
    decoded_megapixels: float
    """Megapixels that remain when a JPEG is decoded at a fraction of its size."""
    megabytes: float
    """File size in 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class PhotoCost:
    """Core-seconds to prepare a photo: a fixed part, and parts that scale with its size."""

    fixed_s: float
    per_megapixel_s: float
    """Per megapixel of the file: every JPEG block is transformed, however small the decoded image is."""
    per_decoded_megapixel_s: float
    per_megabyte_s: float
    """Per megabyte of the file: entropy decoding processes every bit."""

    def seconds(self, kind: PhotoKind) -> float:
        """Return the core-seconds for one photo."""
        return (
            self.fixed_s
            + self.per_megapixel_s * kind.megapixels
            + self.per_decoded_megapixel_s * kind.decoded_megapixels
            + self.per_megabyte_s * kind.megabytes
        )


def kind_of(data: bytes, spec: PreprocessSpec) -> PhotoKind:
    """Read the properties that determine a photo's cost from its header.

    Args:
        data: contents of the file.
        spec: preprocessing to apply.

    Raises:
        PhotoError: the file is not a photo.
    """
    header = read_header(data)
    plan = plan_decode(header, min_side(spec))
    return PhotoKind(header.width * header.height / 1e6, plan.width * plan.height / 1e6, len(data) / 1e6)


def fit_photo_cost(kinds: Sequence[PhotoKind], seconds: Sequence[float]) -> PhotoCost:
    """Fit non-negative costs by least squares on relative errors.

    Args:
        kinds: properties of the measured photos; at least four distinct ones.
        seconds: measured core-seconds per photo of each.

    Raises:
        ConfigError: there are fewer than four distinct kinds.
    """
    if len(set(kinds)) < 4:
        raise ConfigError(f"a cost of four parts needs photos of four kinds or more, got {len(set(kinds))}")
    rows = np.array([[1, kind.megapixels, kind.decoded_megapixels, kind.megabytes] for kind in kinds])
    measured = np.asarray(seconds)
    # Divide each equation by its result, so that one large photo does not outweigh ten small ones.
    rows = rows / measured[:, None]
    best, least = np.zeros(4), np.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(4), count) for count in range(1, 5)):
        found, *_ = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)
        error = float(np.square(rows[:, used] @ found - 1).sum())
        if (found >= 0).all() and error < least:
            least, best = error, np.zeros(4)
            best[list(used)] = found
    return PhotoCost(*best.tolist())


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that runs the screening."""

    cores: int
    gpus: int = 0
    """Number of GPUs that run engines; 0 runs the engine on the cores."""
    storage_mb_per_s: float | None = None
    """Read throughput of the storage; None means no limit."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted throughput and its bottleneck."""

    photos_per_s: float
    stages: dict[str, float]
    """Photos/s of each stage if it ran alone with all its resources."""
    limit: str
    """The slowest stage."""


def predict(
    machine: Machine,
    *,
    prepare_s: float,
    megabytes: float,
    engine_s: float | None = None,
    gpu_images_per_s: float | None = None,
) -> Prediction:
    """Predict the throughput of a machine.

    On a CPU, preparation and inference share the cores; with GPUs they run in parallel, and the slower one is the
    bottleneck.

    Args:
        machine: its cores, GPUs and storage.
        prepare_s: core-seconds to prepare one photo.
        megabytes: file size of one photo, in 10^6 bytes.
        engine_s: core-seconds of inference per photo; required without GPUs.
        gpu_images_per_s: images/s of the engine on one GPU; required with GPUs.

    Raises:
        ConfigError: a number is missing or not positive.
    """
    if machine.cores < 1 or prepare_s <= 0 or megabytes <= 0:
        raise ConfigError(
            f"cores, seconds and megabytes must be above 0, got {machine.cores}, {prepare_s:g}, {megabytes:g}"
        )
    stages = {"preparing": machine.cores / prepare_s}
    if machine.gpus:
        if not gpu_images_per_s:
            raise ConfigError("GPUs need the engine's images/s on one GPU: --gpu-rate, from a bundle built on that GPU")
        stages["engine"] = machine.gpus * gpu_images_per_s
        rate = min(stages.values())
    else:
        if not engine_s:
            raise ConfigError("without GPUs the engine's core-seconds per photo must be given")
        stages["engine"] = machine.cores / engine_s
        rate = machine.cores / (prepare_s + engine_s)
    if machine.storage_mb_per_s:
        stages["storage"] = machine.storage_mb_per_s / megabytes
    limit = min(stages, key=lambda name: stages[name])
    return Prediction(min(rate, stages.get("storage", rate)), stages, limit)
