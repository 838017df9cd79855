"""Evaluation of a run on photos it has not learned from, written as files and as one page.

metrics.json      all results as plain data
predictions.csv   labels and predictions of every photo
model_card.md     see `model_card`; only for runs that output probabilities
evaluation.html   the same results as a page, with curves
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfundus.csv_cells import csv_text
from fastfundus.data.cache import PhotoCache
from fastfundus.evaluation.compare import compare_predictions
from fastfundus.evaluation.figures import (
    METRIC_NAMES,
    calibration_curves,
    decision_curves,
    differences,
    prevalence_of,
    roc_curves,
)
from fastfundus.evaluation.label_map import LabelMap
from fastfundus.evaluation.locked_run import Measured, read_operating_point
from fastfundus.evaluation.model_card import model_card
from fastfundus.evaluation.operating_point import measure
from fastfundus.evaluation.subgroups import MIN_PATIENTS, subgroup_metrics
from fastfundus.pages import write_page
from fastfundus.records import interval_text
from fastfundus.training.run import Run

__all__ = ["evaluate_run", "write_evaluation"]

_OF_GROUPS = ("auroc", "auprc", "dice", "cldice", "sensitivity", "specificity")


def evaluate_run(
    run: Run,
    cache: PhotoCache,
    *,
    by: Sequence[str] = (),
    against: Run | None = None,
    prevalence: float | None = None,
    rules: Sequence[str] = (),
) -> tuple[Measured, dict[str, Any]]:
    """Measure a run, optionally by subgroup and compared with another run.

    Args:
        run: a finished run.
        cache: its own cache, of which the test patients are used, or another cache.
        by: columns of the manifest by which to measure subgroups.
        against: another run to compare with on the same photos.
        prevalence: share of positives, 0 to 1, where the model will be used; for the predictive values.
        rules: how the cache's labels map to the run's outputs; see `LabelMap.parse`.

    Returns:
        The measured results, and the content of metrics.json.

    Raises:
        ConfigError, DataError, CheckpointError, SpecMismatch: see `LabelMap.parse`, `measure`, `subgroup_metrics` and
            `compare_predictions`.
    """
    label_map = LabelMap.parse(rules, run.labels) if rules else None
    measured = measure(run, cache, prevalence=prevalence, label_map=label_map)
    points = read_operating_point(run)
    thresholds = {name: float(point["threshold"]) for name, point in points["labels"].items()}
    document: dict[str, Any] = {
        "run": str(run.path),
        "cache": [str(path) for path in cache.paths],
        "lock": points["lock"],
        "map": label_map.said if label_map else {},
        **measured.to_dict(),
    }
    if by:
        document["subgroups"] = subgroup_metrics(measured.predictions, cache.manifest, by, thresholds)
    if against:
        theirs = {name: float(point["threshold"]) for name, point in read_operating_point(against)["labels"].items()}
        document["against"] = {
            "run": str(against.path),
            **compare_predictions(
                measured.predictions,
                measure(against, cache, label_map=label_map).predictions,
                {name: (value, theirs[name]) for name, value in thresholds.items() if name in theirs},
            ),
        }
    return measured, document


def write_evaluation(run: Run, measured: Measured, document: dict[str, Any], output: Path) -> None:
    """Write all files of an evaluation into a folder, creating it if necessary."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    (output / "predictions.csv").write_text(csv_text(measured.predictions), encoding="utf-8", newline="")
    vessels = run.config.task == "vessels"
    if not vessels:
        (output / "model_card.md").write_text(model_card(run, document), encoding="utf-8")
    known = [name for name in run.labels if not vessels and measured.labels[name]["photos"]]
    table = measured.predictions
    write_page(
        output / "evaluation.html",
        "evaluation/evaluation.html",
        run=run,
        document=document,
        head=[METRIC_NAMES[key] for key in _keys(document["labels"])],
        rows=list(_rows(document["labels"])),
        overall=[(METRIC_NAMES[key], interval_text(entry)) for key, entry in document["overall"].items()]
        if vessels or len(run.labels) > 1 else [],
        prevalence=prevalence_of(document["labels"]),
        figures=[(title, draw(table, known), said) for title, draw, said in _CURVES] if known else [],
        groups=[_group_table(column, outputs) for column, outputs in document.get("subgroups", {}).items()],
        min_patients=MIN_PATIENTS,
        differences=list(differences(document.get("against"))),
    )  # fmt: skip


_CURVES = (
    ("ROC curves", roc_curves, ""),
    ("Calibration curves", calibration_curves,
     "Photos are binned into tenths by predicted probability; bars are 95 % intervals. The diagonal is perfect "
     "calibration."),
    ("Decision curves", decision_curves,
     "Net benefit: true positives minus false positives weighted by the odds of the threshold probability. The model "
     "is useful where its curve is above both other lines."),
)  # fmt: skip


def _keys(labels: Mapping[str, Any]) -> list[str]:
    """Return the metrics that have a value for at least one output, in the order of `METRIC_NAMES`."""
    return [key for key in METRIC_NAMES if any(entry.get(key) is not None for entry in labels.values())]


def _text(value: Any) -> tuple[str, str]:
    """Format a metric and its interval."""
    if not isinstance(value, dict):
        return "" if value is None else f"{value:.3f}", ""
    if value["value"] is None:
        return "not estimable", ""
    return f"{value['value']:.3f}", "" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"


def _rows(labels: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield the name, the number of photos and the metrics of each output."""
    keys = _keys(labels)
    for name, entry in labels.items():
        positives = f", {entry['positives']} positive" if "positives" in entry else ""
        count = f"{entry['photos']} photos of {entry['patients']} patients{positives}"
        yield name, count, [_text(entry.get(key)) for key in keys]


def _group_table(column: str, outputs: Mapping[str, Any]) -> tuple[str, list[str], list[tuple[Any, ...]]]:
    keys = [key for key in _OF_GROUPS if any(key in group for groups in outputs.values() for group in groups)]
    rows = [
        (name, group["group"], group["photos"], group["patients"], group["small"],
         [_text(group.get(key)) for key in keys])
        for name, groups in outputs.items()
        for group in groups
    ]  # fmt: skip
    return column, [METRIC_NAMES[key] for key in keys], rows
