"""What a photo costs in core-seconds, fitted on measurements, and what a machine does with it in an hour."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastfundus.errors import ConfigError
from fastfundus.photo.header import read_header
from fastfundus.photo.plan import plan_decode
from fastfundus.photo.prepare import least_side
from fastfundus.spec import PreprocessSpec

__all__ = ["Machine", "PhotoCost", "PhotoKind", "Prediction", "fit_photo_cost", "kind_of", "predict"]


@dataclass(frozen=True, slots=True)
class PhotoKind:
    """What decides how long a photo takes to be prepared."""

    megapixels: float
    """Of the file."""
    decoded_megapixels: float
    """That are left when a JPEG is decoded at a fraction of its size."""
    megabytes: float
    """Of the file, 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class PhotoCost:
    """Core-seconds to prepare a photo: a fixed part, and parts that grow with it."""

    fixed_s: float
    per_megapixel_s: float
    """Of the file: each block of a JPEG is transformed, however small the picture becomes."""
    per_decoded_megapixel_s: float
    per_megabyte_s: float
    """Entropy decoding goes bit by bit."""

    def seconds(self, kind: PhotoKind) -> float:
        """Core-seconds of one photo."""
        return (
            self.fixed_s
            + self.per_megapixel_s * kind.megapixels
            + self.per_decoded_megapixel_s * kind.decoded_megapixels
            + self.per_megabyte_s * kind.megabytes
        )


def kind_of(data: bytes, spec: PreprocessSpec) -> PhotoKind:
    """Read what decides a photo's cost from its header.

    Args:
        data: the file.
        spec: what is to be made of it.

    Raises:
        PhotoError: it is no photo.
    """
    header = read_header(data)
    plan = plan_decode(header, least_side(spec))
    return PhotoKind(header.width * header.height / 1e6, plan.width * plan.height / 1e6, len(data) / 1e6)


def fit_photo_cost(kinds: Sequence[PhotoKind], seconds: Sequence[float]) -> PhotoCost:
    """Fit costs that are not negative, by relative errors.

    Args:
        kinds: of what was measured, four or more that differ.
        seconds: core-seconds a photo of each.

    Raises:
        ConfigError: there are fewer.
    """
    if len(set(kinds)) < 4:
        raise ConfigError(f"a cost of four parts takes photos of four kinds or more, got {len(set(kinds))}")
    rows = np.array([[1, kind.megapixels, kind.decoded_megapixels, kind.megabytes] for kind in kinds])
    measured = np.asarray(seconds)
    # Each equation divided by its result: a large photo must not outweigh ten small ones.
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
    """What screens."""

    cores: int
    gpus: int = 0
    """That run engines; 0: the cores do."""
    storage_mb_per_s: float | None = None
    """What storage delivers; None is no limit."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Photos/s, and why not more."""

    photos_per_s: float
    stages: dict[str, float]
    """Photos/s of each stage alone, with all that it may use."""
    limit: str
    """The stage that takes most of the time."""


def predict(
    machine: Machine,
    *,
    prepare_s: float,
    megabytes: float,
    engine_s: float | None = None,
    gpu_images_per_s: float | None = None,
) -> Prediction:
    """Say what a machine will do.

    On a CPU preparing and inferring share the cores; with GPUs they go on at the same time, and the slower one limits.

    Args:
        machine: what it has.
        prepare_s: core-seconds to prepare a photo.
        megabytes: of a file.
        engine_s: core-seconds of the engine a photo, where the cores run it.
        gpu_images_per_s: of one GPU, where it does.

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
            raise ConfigError("GPUs take the engine's images/s of one: --gpu-rate, from a bundle that was built on it")
        stages["engine"] = machine.gpus * gpu_images_per_s
        rate = min(stages.values())
    else:
        if not engine_s:
            raise ConfigError("without GPUs the engine's core-seconds a photo must be known")
        stages["engine"] = machine.cores / engine_s
        rate = machine.cores / (prepare_s + engine_s)
    if machine.storage_mb_per_s:
        stages["storage"] = machine.storage_mb_per_s / megabytes
    limit = min(stages, key=lambda name: stages[name])
    return Prediction(min(rate, stages.get("storage", rate)), stages, limit)
