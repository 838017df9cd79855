"""``fastfundus demo``: the whole way once, on synthetic photographs, in minutes on a CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

LEAST_AUROC = 0.9
"""The demo fails when its model separates its held-out synthetic patients worse than this."""
_STAMP = ".fastfundus-demo"


@contextmanager
def _timed(what: str, times: list[tuple[str, float]]) -> Iterator[None]:
    from fastfundus.cli.console import remark

    remark(f"\n{what}")
    began = time.perf_counter()
    yield
    times.append((what, time.perf_counter() - began))


def _break_some(folder: Path) -> None:
    """Add an empty file, a text that calls itself a JPEG, and half a JPEG."""
    whole = next(iter(sorted(folder.glob("*.jpg")))).read_bytes()
    (folder / "broken_empty.jpg").write_bytes(b"")
    (folder / "broken_text.jpg").write_text("not a photograph\n")
    (folder / "broken_truncated.jpg").write_bytes(whole[: len(whole) // 2])


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to be made."
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left there.")
@click.option("--patients", type=click.IntRange(40, 5000), default=300, show_default=True, help="To train on.")
@click.option("--epochs", type=click.IntRange(1, 1000), default=22, show_default=True)
def demo(output: Path, overwrite: bool, patients: int, epochs: int) -> None:
    r"""Synthetic photos -> prepare -> train -> build-engine -> screen -> report, in minutes on a CPU.

    \b
    Example:
      fastfundus demo
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.cli.building import build_from_run
    from fastfundus.cli.training import TrainingBar
    from fastfundus.config import TrainConfig
    from fastfundus.data import build_cache, list_photos
    from fastfundus.evaluate.operating_point import fit_operating_point
    from fastfundus.evaluate.page import write_run_page
    from fastfundus.records import interval_text
    from fastfundus.screen.run import screen_to_folder
    from fastfundus.spec import PreprocessSpec
    from fastfundus.synthetic import write_dataset
    from fastfundus.train.loop import train
    from fastfundus.train.run import Run

    if output.exists() and any(output.iterdir()):
        # Only ever delete a folder that a demo made.
        if not (overwrite and (output / _STAMP).is_file()):
            raise ConfigError(f"{output}: is not empty; add --overwrite if a demo made it, or choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _STAMP).touch()
    photos, clinic, run_path = output / "photos", output / "clinic", output / "run"
    times: list[tuple[str, float]] = []

    with _timed(f"drawing {2 * patients} photos to learn from, and 60 of a clinic to screen", times):
        write_dataset(photos, patients, seed=1, long_sides=(512, 640, 768))
        write_dataset(clinic, 30, seed=6, abnormal_share=0.3, poor_share=0.12, long_sides=(1024, 1536, 2048))
        _break_some(clinic / "images")
    with _timed("prepare", times):
        listing = list_photos(photos, labels=photos / "labels.csv")
        cache = build_cache(listing.photos, output / "cache", PreprocessSpec(size=144), source=listing.root)
    with _timed("train --amp", times):
        settings = {"model": {"backbone": "resnet18"}, "loop": {"epochs": epochs}, "optimiser": {"learning_rate": 2e-3}}
        with TrainingBar(epochs) as bar:
            train(cache, run_path, TrainConfig.from_dict(settings), observer=bar)
        run = Run.open(run_path)
        point = fit_operating_point(run, cache)["labels"]["abnormal"]
        write_run_page(run, cache)
    with _timed("build-engine", times):
        bundle, parity = build_from_run(run, output / "bundle")
    with _timed("screen", times):
        clinic_listing = list_photos(clinic, adapter="folder")
        screened = screen_to_folder(clinic_listing, bundle, output / "screening", sources=[clinic])

    auroc = point["test"]["auroc"]
    statuses = dict(screened.results["status"].value_counts(sort=True).iter_rows())
    click.echo("")
    rows = [(what, f"{seconds:.1f} s") for what, seconds in times]
    rows += [
        ("AUROC, held-out synthetic patients", interval_text(auroc)),
        ("engine against model, largest |dp|", f"{parity.largest_difference:.1e}"),
        ("engine against torch float32", f"{parity.images_per_s / parity.torch_images_per_s:.1f} x"),
        ("clinic: inputs / rows", f"{len(clinic_listing.photos)} / {len(screened.results)}"),
        ("clinic: status", ", ".join(f"{count} {name}" for name, count in statuses.items())),
        ("screening speed", f"{screened.timing.images_per_s:.0f} photos/s end to end"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
    if auroc["value"] < LEAST_AUROC:
        raise click.ClickException(f"AUROC {auroc['value']:.3f} is below {LEAST_AUROC}: the demo's own check failed")
    if len(screened.results) != len(clinic_listing.photos):
        raise click.ClickException("some inputs have no row: the demo's own check failed")
    click.echo(f"\nrun:    {run_path / 'run.html'}\nreport: {screened.report}")
