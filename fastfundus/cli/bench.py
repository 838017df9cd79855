"""The ``fastfundus bench`` command."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastfundus.engines.bundle import Bundle
    from fastfundus.records import SourcePhoto

_SUITES = ("prepare", "engine", "screen", "all")
_SOME = 64


@click.command()
@click.argument("suite", type=click.Choice(_SUITES), default="all")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle to measure; without it, only preparing.")
@click.option(
    "--photos", type=click.Path(path_type=Path), help="Photos to use  [default: synthetic ones of 8 megapixels]"
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="Minimum duration of each measurement in seconds.",
)
@click.option("--predict", is_flag=True, help="Also predict the throughput of another machine.")
@click.option("--cores", type=click.IntRange(1), help="CPU cores of the other machine  [default: as here]")
@click.option("--gpus", type=click.IntRange(0), default=0, help="GPUs of the other machine  [default: 0]")
@click.option(
    "--gpu-rate",
    type=click.FloatRange(0, min_open=True),
    metavar="IMAGES/S",
    help="Engine throughput per GPU of the other machine.",
)
@click.option(
    "--storage", type=click.FloatRange(0, min_open=True), metavar="MB/S", help="Read throughput of its storage."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def bench(
    suite: str,
    bundle: Path | None,
    photos: Path | None,
    seconds: float,
    predict: bool,
    cores: int | None,
    gpus: int,
    gpu_rate: float | None,
    storage: float | None,
    as_json: bool,
) -> None:
    r"""Measure the throughput of this machine and find its bottleneck.

    Measures preparing photos (prepare), running the engine (engine), and screening end to end (screen); by default, all
    of them.

    With --predict, also predicts the hourly throughput and the bottleneck of another machine, described by --cores,
    --gpus, --gpu-rate and --storage. Its cores are assumed to be as fast as those of this machine, and its photos to be
    like those measured here. For a TensorRT bundle, --gpu-rate defaults to the measured rate.

    \b
    Example:
      fastfundus bench --bundle bundle/ --photos photos/
      fastfundus bench --bundle bundle/ --photos photos/ --predict --cores 64 --storage 1200
      fastfundus bench --bundle bundle/ --photos photos/ --predict --cores 64 --gpus 4 --gpu-rate 9000
    """
    from tempfile import TemporaryDirectory

    from fastfundus.engines.bundle import Bundle
    from fastfundus.errors import ConfigError
    from fastfundus.spec import PreprocessSpec

    if (suite in ("engine", "screen") or predict) and bundle is None:
        raise ConfigError(f"{'--predict' if predict else suite} needs an engine; add --bundle")
    if not predict and (cores or gpus or gpu_rate or storage):
        raise ConfigError("--cores, --gpus, --gpu-rate and --storage apply to --predict only; add it")
    opened = Bundle.open(bundle) if bundle else None
    with ExitStack() as stack:
        if photos:
            sources = _listed(photos)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="fastfundus-")))
            sources = _drawn(folder)
        found = _measured(suite, opened, sources, opened.spec if opened else PreprocessSpec(), seconds)
        if predict:
            found["prediction"] = _predicted(found, cores, gpus, gpu_rate, storage)
    if as_json:
        click.echo(json.dumps(found))
        return
    _say(found)


def _listed(source: Path) -> list[SourcePhoto]:
    """List photos spread evenly over a source, repeated if there are few."""
    from fastfundus.data.source import list_photos

    listing = list_photos([source], adapter="folder").photos
    step = max(1, len(listing) // _SOME)
    some = listing[::step][:_SOME]
    return (some * -(-_SOME // 2 // len(some)))[: max(len(some), _SOME // 2)]


def _drawn(folder: Path, count: int = 32, kinds: int = 4) -> list[SourcePhoto]:
    """Draw a few photos of camera resolution into a folder, and list each of them several times."""
    import cv2

    from fastfundus.records import SourcePhoto
    from fastfundus.synthetic import draw_photo

    paths = []
    for seed in range(kinds):
        path = folder / f"{seed}.jpg"
        image = draw_photo(seed, lesions=("exudates",), long_side=3456).image
        cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        paths.append(path)
    return [SourcePhoto(paths[number % kinds], f"{number}.jpg", f"p{number}") for number in range(count)]


def _measured(
    suite: str, bundle: Bundle | None, photos: list[SourcePhoto], spec: Any, seconds: float
) -> dict[str, Any]:
    import numpy as np

    from fastfundus.errors import DataError, PhotoError
    from fastfundus.machine import usable_cores
    from fastfundus.sizing.cost import kind_of
    from fastfundus.sizing.throughput import engine_rate, prepare_rate, screen_rate

    known = {}
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
    from fastfundus.errors import ConfigError
    from fastfundus.sizing.cost import Machine, predict

    if "prepare" not in found or "engine" not in found:
        raise ConfigError("--predict needs all measurements; omit SUITE or use all")
    if found["backend"] == "tensorrt" and not gpu_rate:
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


def _say(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['photos']} photos of {found['megapixels']:.1f} megapixels and {found['megabytes']:.2f} MB, to "
        f"{found['size']} px; {found['cores']} cores"
        + (f"; {found['left_out']} inputs that are not photos were left out" if found["left_out"] else "")
    )
    names = {"prepare": "reading, decoding, cropping", "engine": "engine alone", "screen": "screening, end to end"}
    for key, title in names.items():
        if key not in found:
            continue
        entry = found[key]
        rate, further = entry["photos_per_s"], ""
        if key == "prepare":
            further = f"; {rate * found['megapixels']:.0f} megapixels/s, {rate * found['megabytes']:.0f} MB/s"
        elif key == "engine":
            flops = f", {rate * found['gflop']:.0f} GFLOP/s" if found["gflop"] else ""
            further = f"; {found['backend']} {found['precision']}{flops}"
        elif "prepare" in found and "engine" in found:
            alone = 1 / (1 / found["prepare"]["photos_per_s"] + 1 / found["engine"]["photos_per_s"])
            further = f"; bottleneck: {entry['limit']}; {rate / alone:.0%} of both in sequence on these cores"
        click.echo(f"{title:28} {rate:8.1f} photos/s ({entry['least']:.1f} to {entry['most']:.1f}){further}")
    if "prediction" not in found:
        return
    prediction, machine = found["prediction"], found["prediction"]["machine"]
    gpus = f" and {machine['gpus']} GPUs" if machine["gpus"] else ""
    stages = ", ".join(f"{name} {rate:,.0f}" for name, rate in prediction["stages"].items())
    click.echo(
        f"{machine['cores']} cores{gpus}: {prediction['photos_per_hour']:,.0f} photos per hour; bottleneck: "
        f"{prediction['limit']} (photos/s of each stage alone: {stages})"
    )
