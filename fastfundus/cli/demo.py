"""The ``fastfundus demo`` command: the whole workflow on synthetic photographs, in minutes on a CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

MIN_AUROC = 0.9
"""The demo fails if its model reaches less than this on held-out synthetic patients."""
_STAMP = ".fastfundus-demo"


@contextmanager
def _timed(what: str, times: list[tuple[str, float]]) -> Iterator[None]:
    from fastfundus.cli.console import remark

    remark(f"\n{what}")
    began = time.perf_counter()
    yield
    times.append((what, time.perf_counter() - began))


def _break_some(folder: Path) -> None:
    """Add an empty file, a text file named as a JPEG, and half a JPEG."""
    whole = next(iter(sorted(folder.glob("*.jpg")))).read_bytes()
    (folder / "broken_empty.jpg").write_bytes(b"")
    (folder / "broken_text.jpg").write_text("not a photograph\n")
    (folder / "broken_truncated.jpg").write_bytes(whole[: len(whole) // 2])


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to create."
)
@click.option("--overwrite", is_flag=True, help="Replace the output of an earlier demo.")
@click.option("--patients", type=click.IntRange(40, 5000), default=300, show_default=True, help="Patients to train on.")
@click.option("--epochs", type=click.IntRange(1, 1000), default=14, show_default=True)
def demo(output: Path, overwrite: bool, patients: int, epochs: int) -> None:
    r"""Run the whole workflow on synthetic photos: prepare, train, build-engine, screen, report.

    \b
    Example:
      fastfundus demo
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.cli.training_progress import TrainingBar
    from fastfundus.config import TrainConfig
    from fastfundus.data.source import list_photos
    from fastfundus.records import interval_text
    from fastfundus.screening.run import screen_to_folder
    from fastfundus.synthetic import write_dataset
    from fastfundus.workflow.build_engine import build_engine
    from fastfundus.workflow.prepare import prepare
    from fastfundus.workflow.train import train_run

    if output.exists() and any(output.iterdir()):
        # Only delete folders that a demo created.
        if not (overwrite and (output / _STAMP).is_file()):
            raise ConfigError(
                f"{output} is not empty; add --overwrite if it is the output of a demo, or choose another --output"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _STAMP).touch()
    photos, clinic, run_path = output / "photos", output / "clinic", output / "run"
    times: list[tuple[str, float]] = []

    with _timed(f"drawing {2 * patients} photos to train on, and 60 to screen", times):
        write_dataset(photos, patients, seed=1, long_sides=(512, 640, 768))
        write_dataset(clinic, 30, seed=6, abnormal_share=0.3, poor_share=0.12, long_sides=(1024, 1536, 2048))
        _break_some(clinic / "images")
    with _timed("prepare", times):
        cache = prepare(photos, output / "cache", labels=photos / "labels.csv", size=112, backend="cpu")
    with _timed("train --amp", times):
        settings = {
            "model": {"backbone": "resnet10t"},
            "loop": {"epochs": epochs},
            "optimizer": {"learning_rate": 3e-3},
        }
        with TrainingBar(epochs) as bar:
            point = train_run(cache, run_path, TrainConfig.from_dict(settings), observer=bar)["labels"]["abnormal"]
    with _timed("build-engine", times):
        bundle, parity = build_engine(run_path, output / "bundle")
    with _timed("screen", times):
        clinic_listing = list_photos(clinic, adapter="folder")
        screened = screen_to_folder(clinic_listing, bundle, output / "screening", sources=[clinic])

    auroc = point["test"]["auroc"]
    statuses = dict(screened.results["status"].value_counts(sort=True).iter_rows())
    click.echo("")
    rows = [(what, f"{seconds:.1f} s") for what, seconds in times]
    rows += [
        ("AUROC, held-out synthetic patients", interval_text(auroc)),
        ("engine and model, largest |dp|", f"{parity.largest_difference:.1e}"),
        ("engine speed, relative to torch float32", f"{parity.images_per_s / parity.torch_images_per_s:.1f} x"),
        ("clinic: inputs / rows", f"{len(clinic_listing.photos)} / {len(screened.results)}"),
        ("clinic: status", ", ".join(f"{count} {name}" for name, count in statuses.items())),
        ("screening speed", f"{screened.timing.images_per_s:.0f} photos/s end to end"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
    if auroc["value"] < MIN_AUROC:
        raise click.ClickException(f"AUROC {auroc['value']:.3f} is below {MIN_AUROC}: the demo's own check failed")
    if len(screened.results) != len(clinic_listing.photos):
        raise click.ClickException("some inputs have no row: the demo's own check failed")
    click.echo(f"\nrun:    {run_path / 'run.html'}\nreport: {screened.report}")
