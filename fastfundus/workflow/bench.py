"""Measure the throughput of this machine, and predict that of another one."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import cv2
import numpy as np

from fastfundus.data.source import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import ConfigError, DataError, PhotoError
from fastfundus.machine import usable_cores
from fastfundus.records import SourcePhoto
from fastfundus.sizing.cost import Machine, PhotoKind, kind_of, predict
from fastfundus.sizing.throughput import engine_rate, prepare_rate, screen_rate
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo

__all__ = ["measure_machine"]

Suite = Literal["prepare", "engine", "screen", "all"]
_SOME = 64
"""Maximum number of photos to measure on; at least half as many are used."""


def measure_machine(
    suite: Suite = "all",
    *,
    bundle: str | Path | Bundle | None = None,
    photos: str | Path | None = None,
    seconds: float = 5.0,
    prediction: bool = False,
    cores: int | None = None,
    gpus: int = 0,
    gpu_rate: float | None = None,
    storage: float | None = None,
) -> dict[str, Any]:
    """Measure preparing photos, running the engine, and screening end to end.

    Args:
        suite: what to measure.
        bundle: the bundle to measure, or its path; None measures only preparing.
        photos: photos to use; None draws synthetic ones of 8 megapixels.
        seconds: minimum duration of each measurement.
        prediction: also predict the throughput of another machine.
        cores: CPU cores of the other machine; None means as many as here.
        gpus: GPUs of the other machine.
        gpu_rate: images/s of the engine on one of its GPUs; None uses the measured rate for a TensorRT bundle.
        storage: read throughput of its storage in MB/s; None means no limit.

    Returns:
        Plain data: the properties of the photos, one entry per measurement, and "prediction".

    Raises:
        ConfigError: the bundle or a measurement that is needed is missing, or another machine is described without a
            prediction.
        DataError: none of the photos is readable.
        BundleError: the bundle cannot be used on this machine.
    """
    if (suite in ("engine", "screen") or prediction) and bundle is None:
        raise ConfigError(f"{'--predict' if prediction else suite} needs an engine; add --bundle")
    if not prediction and (cores or gpus or gpu_rate or storage):
        raise ConfigError("--cores, --gpus, --gpu-rate and --storage apply to --predict only; add it")
    opened = Bundle.open(Path(bundle)) if isinstance(bundle, str | Path) else bundle
    with ExitStack() as stack:
        if photos is not None:
            sources = _listed(Path(photos))
        else:
            sources = _drawn(Path(stack.enter_context(TemporaryDirectory(prefix="fastfundus-"))))
        found = _measured(suite, opened, sources, opened.spec if opened else PreprocessSpec(), seconds)
        if prediction:
            found["prediction"] = _predicted(found, cores, gpus, gpu_rate, storage)
    return found


def _listed(source: Path) -> list[SourcePhoto]:
    """List photos spread evenly over a source, repeated if there are few."""
    listing = list_photos([source], adapter="folder").photos
    step = max(1, len(listing) // _SOME)
    some = listing[::step][:_SOME]
    return (some * -(-_SOME // 2 // len(some)))[: max(len(some), _SOME // 2)]


def _drawn(folder: Path, count: int = 32, kinds: int = 4) -> list[SourcePhoto]:
    """Draw a few photos of camera resolution into a folder, and list each of them several times."""
    paths = []
    for seed in range(kinds):
        path = folder / f"{seed}.jpg"
        image = draw_photo(seed, lesions=("exudates",), long_side=3456).image
        cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        paths.append(path)
    return [SourcePhoto(paths[number % kinds], f"{number}.jpg", f"p{number}") for number in range(count)]


def _measured(
    suite: Suite, bundle: Bundle | None, photos: list[SourcePhoto], spec: PreprocessSpec, seconds: float
) -> dict[str, Any]:
    known: dict[Path, PhotoKind] = {}
    for path in {photo.path for photo in photos}:
        # Inputs that are not photos cost next to nothing and would distort the rates.
        with suppress(PhotoError, OSError):
            known[path] = kind_of(path.read_bytes(), spec)
    if not known:
        raise DataError(f"none of the {len(photos)} inputs is a readable photo; the first is {photos[0].path}")
    inputs, photos = len(photos), [photo for photo in photos if photo.path in known]
    kinds = [known[photo.path] for photo in photos]
    found: dict[str, Any] = {
        "cores": usable_cores(),
        "photos": len(photos),
        "left_out": inputs - len(photos),
        "size": spec.size,
        "megapixels": float(np.mean([kind.megapixels for kind in kinds])),
        "megabytes": float(np.mean([kind.megabytes for kind in kinds])),
    }
    if suite in ("prepare", "all"):
        found["prepare"] = asdict(prepare_rate(photos, spec, seconds))
    if bundle is None:
        return found
    found |= {"backend": bundle.backend, "precision": bundle.precision, "gflop": bundle.metadata.get("gflop")}
    if suite in ("engine", "all"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, spec.size, spec.size, 3), dtype=np.uint8)
        with bundle.load() as engine:
            found["engine"] = asdict(engine_rate(engine, pixels, seconds))
    if suite in ("screen", "all"):
        rate, timing = screen_rate(photos, bundle, seconds)
        found["screen"] = asdict(rate) | {"busy": timing.busy, "limit": timing.limit}
    return found


def _predicted(
    found: dict[str, Any], cores: int | None, gpus: int, gpu_rate: float | None, storage: float | None
) -> dict[str, Any]:
    if "prepare" not in found or "engine" not in found:
        raise ConfigError("--predict needs all measurements; omit SUITE or use all")
    if found["backend"].startswith("tensorrt") and not gpu_rate:
        gpu_rate = found["engine"]["photos_per_s"]
    machine = Machine(cores or found["cores"], gpus, storage)
    prediction = predict(
        machine,
        prepare_s=found["cores"] / found["prepare"]["photos_per_s"],
        megabytes=found["megabytes"],
        engine_s=found["cores"] / found["engine"]["photos_per_s"],
        gpu_images_per_s=gpu_rate,
    )
    return {"machine": asdict(machine), **asdict(prediction), "photos_per_hour": prediction.photos_per_s * 3600}
