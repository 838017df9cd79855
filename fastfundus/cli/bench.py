"""The ``fastfundus bench`` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_SUITES = ("prepare", "engine", "screen", "all")


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
    from fastfundus.workflow.bench import measure_machine

    found = measure_machine(
        suite,  # type: ignore[arg-type]
        bundle=bundle,
        photos=photos,
        seconds=seconds,
        prediction=predict,
        cores=cores,
        gpus=gpus,
        gpu_rate=gpu_rate,
        storage=storage,
    )
    if as_json:
        click.echo(json.dumps(found))
        return
    _say(found)


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
