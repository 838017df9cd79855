"""``fastfundus evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("cache", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for metrics.json and predictions.csv."
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(run: Path, cache: tuple[Path, ...], output: Path, as_json: bool) -> None:
    r"""Measure RUN, with its locked threshold, on photos of CACHE it has not learned from.

    On the run's own cache these are its test patients; on any other, all photos whose bytes it has not seen.

    \b
    Example:
      fastfundus evaluate run/ cache/ --output evaluation/
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.cli.training import metrics_lines
    from fastfundus.data import PhotoCache
    from fastfundus.evaluate.operating_point import measure
    from fastfundus.evaluate.vessels import measure_vessels
    from fastfundus.train.run import Run

    opened = Run.open(run)
    measured = (measure_vessels if opened.config.task == "vessels" else measure)(opened, PhotoCache.open(*cache))
    output.mkdir(parents=True, exist_ok=True)
    document = {"run": str(run), "cache": [str(path) for path in cache], **measured.to_dict()}
    (output / "metrics.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    measured.predictions.write_csv(output / "predictions.csv")
    if as_json:
        click.echo(json.dumps(document))
    else:
        for line in metrics_lines(measured.labels, measured.overall):
            click.echo(f"{measured.which}: {line}")
