"""``fastfundus evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastfundus.data import PhotoCache
    from fastfundus.evaluate.operating_point import Measured
    from fastfundus.train.run import Run


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("cache", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for metrics.json, predictions.csv, model_card.md.",
)
@click.option("--by", multiple=True, metavar="COLUMN", help="Also by camera, eye, quality, ...; may be repeated.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="RUN", help="Compare with another run on the same photos."
)
@click.option(
    "--prevalence", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of positives where it will be used: for the predictive values.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(
    run: Path,
    cache: tuple[Path, ...],
    output: Path,
    by: tuple[str, ...],
    against: Path | None,
    prevalence: float | None,
    as_json: bool,
) -> None:
    r"""Measure RUN, with its locked threshold, on photos of CACHE it has not learned from.

    On the run's own cache these are its test patients; on any other, all photos whose bytes it has not seen. Intervals
    are of patients, 95 %.

    \b
    Example:
      fastfundus evaluate run/ cache/ --output evaluation/ --by camera --by eye --against other_run/
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.cli.training import metrics_lines
    from fastfundus.data import PhotoCache
    from fastfundus.evaluate.card import model_card
    from fastfundus.evaluate.operating_point import measure
    from fastfundus.evaluate.vessels import measure_vessels
    from fastfundus.train.run import Run

    opened, photos = Run.open(run), PhotoCache.open(*cache)
    vessels = opened.config.task == "vessels"
    if vessels and (by or against or prevalence):
        raise ConfigError("--by, --against and --prevalence are for runs that give probabilities, not for vessels")
    measured = measure_vessels(opened, photos) if vessels else measure(opened, photos, prevalence=prevalence)
    document: dict[str, Any] = {"run": str(run), "cache": [str(path) for path in cache], **measured.to_dict()}
    if by:
        document["subgroups"] = _by_group(opened, photos, measured, by)
    if against:
        document["against"] = {"run": str(against), **_against(opened, measured, Run.open(against), photos)}
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    measured.predictions.write_csv(output / "predictions.csv")
    if not vessels:
        (output / "model_card.md").write_text(model_card(opened, document), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(document))
        return
    for line in metrics_lines(measured.labels, measured.overall):
        click.echo(f"{measured.which}: {line}")
    for line in _further_lines(document):
        click.echo(line)


def _by_group(run: Run, photos: PhotoCache, measured: Measured, by: tuple[str, ...]) -> dict[str, Any]:
    from fastfundus.evaluate.operating_point import read_operating_point
    from fastfundus.evaluate.subgroups import subgroup_metrics

    points = read_operating_point(run)["labels"]
    thresholds = {name: float(points[name]["threshold"]) for name in run.labels}
    return subgroup_metrics(measured.predictions, photos.manifest, by, thresholds)


def _against(run: Run, measured: Measured, other: Run, photos: PhotoCache) -> dict[str, Any]:
    from fastfundus.evaluate.compare import compare_predictions
    from fastfundus.evaluate.operating_point import measure, read_operating_point

    mine, theirs = (read_operating_point(one)["labels"] for one in (run, other))
    thresholds = {name: (mine[name]["threshold"], theirs[name]["threshold"]) for name in run.labels if name in theirs}
    return compare_predictions(measured.predictions, measure(other, photos).predictions, thresholds)


def _further_lines(document: dict[str, Any]) -> Iterator[str]:
    from fastfundus.records import interval_text

    for column, outputs in document.get("subgroups", {}).items():
        for name, groups in outputs.items():
            for group in groups:
                what = f"{column} {group['group']}, {name}: {group['photos']} photos of {group['patients']} patients"
                figures = "" if not group["photos"] else f", AUROC {interval_text(group['auroc'])}"
                yield f"{what}{figures}{' (few: read with care)' if group['small'] else ''}"
    for name, found in document.get("against", {}).get("labels", {}).items():
        for key, title in (("auroc", "AUROC"), ("sensitivity", "sensitivity"), ("specificity", "specificity")):
            entry = found[key]
            shown = interval_text({"value": entry["difference"], "low": entry["low"], "high": entry["high"]})
            p = entry.get("p_holm", entry["p"])
            yield f"{name}, {title}: first minus second {shown}{'' if p is None else f', p = {p:.3g}'}"
