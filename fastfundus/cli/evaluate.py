"""The ``fastfundus evaluate`` command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("cache", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for metrics.json, predictions.csv, model_card.md, evaluation.html.",
)
@click.option(
    "--map", "rules", multiple=True, metavar="OUTPUT=COLUMN",
    help="Define an output by labels of another data set: abnormal=dr_grade>=1, dr=!normal, or a=b|c (any of them); "
    "may be repeated.",
)  # fmt: skip
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help="Also report subgroups by this column, such as camera, eye or quality; may be repeated.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="RUN", help="Compare with another run on the same photos."
)
@click.option(
    "--prevalence", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Prevalence in the target population, for predictive values.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(
    run: Path,
    cache: tuple[Path, ...],
    output: Path,
    rules: tuple[str, ...],
    by: tuple[str, ...],
    against: Path | None,
    prevalence: float | None,
    as_json: bool,
) -> None:
    r"""Evaluate RUN on the photos of CACHE that it has not learned from.

    In the run's own cache, these are the test patients; in any other cache, all photos except byte-identical copies of
    photos that the run has learned from. Thresholds are those locked in RUN. The 95 % confidence intervals are
    clustered by patient.

    \b
    Example:
      fastfundus evaluate run/ cache/ --output evaluation/ --by camera --by eye --against other_run/
      fastfundus evaluate run/ messidor/ --output external/ --map "abnormal=dr_grade>=1"
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.cli.console import remark
    from fastfundus.cli.training_progress import metrics_lines
    from fastfundus.workflow.evaluate import evaluate as evaluate_run

    if (output / "metrics.json").is_file():
        remark(f"{output}: holds an evaluation, which the new one replaces")
    measured, document = evaluate_run(run, cache, output, rules=rules, by=by, against=against, prevalence=prevalence)
    if as_json:
        click.echo(json.dumps(document))
        return
    for line in metrics_lines(measured.labels, measured.overall):
        click.echo(f"{measured.which}: {line}")
    for line in _further_lines(document):
        click.echo(line)
    remark(f"page: {output / 'evaluation.html'}")


def _further_lines(document: dict[str, Any]) -> Iterator[str]:
    from fastfundus.evaluation.figures import METRIC_NAMES, differences
    from fastfundus.records import interval_text

    for column, outputs in document.get("subgroups", {}).items():
        for name, groups in outputs.items():
            for group in groups:
                what = f"{column} {group['group']}, {name}: {group['photos']} photos of {group['patients']} patients"
                key = "dice" if "dice" in group else "auroc"
                figures = f", {METRIC_NAMES[key]} {interval_text(group[key])}" if group["photos"] else ""
                yield f"{what}{figures}{' (small group, interpret with care)' if group['small'] else ''}"
    for name, figure, shown, p in differences(document.get("against")):
        yield f"{name}, {figure}: first minus second {shown}, p = {p}"
