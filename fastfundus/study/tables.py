"""Results of a study: tables for reading and for papers, and a page with curves.

The metric (`figure`) is AUROC, or for vessels the mean Dice over photos.

cells.csv   one row per cell and output: the metric on its test fold, or the error
table.csv   one row per task, init, fraction and output: mean and SD over folds and seeds; `value`, the mean over folds
            of the metric of scores averaged over seeds, with its patient-clustered interval; the paired difference from
            the first init, with p-values adjusted over the study
table.md    the same table for reading; table.tex for LaTeX; study.html with label-efficiency and ROC curves

Scores of different folds come from different models, so areas are computed within folds, never across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastfundus.evaluation.bootstrap import Floats, Interval, PatientBootstrap
from fastfundus.evaluation.compare import PairedDifference, compare_areas, compare_means, holm
from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.evaluation.metrics import auroc, mean_with_interval
from fastfundus.study.config import StudyConfig
from fastfundus.study.page import Group, write_study_page
from fastfundus.study.run import CellResult
from fastfundus.training.run import Run, read_table

__all__ = ["write_tables"]

_COLUMNS = {
    "task": pl.String, "init": pl.String, "fraction": pl.Float64, "output": pl.String, "figure": pl.String,
    "cells": pl.Int64,
    "failed": pl.Int64, "mean": pl.Float64, "sd": pl.Float64, "photos": pl.Int64, "patients": pl.Int64,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "difference": pl.Float64, "difference_low": pl.Float64,
    "difference_high": pl.Float64, "p": pl.Float64, "p_holm": pl.Float64,
}  # fmt: skip


def write_tables(study: StudyConfig, results: Sequence[CellResult], output: Path) -> pl.DataFrame:
    """Write all tables and the page; return the content of `table.csv`."""
    cells = _cells(results)
    cells.write_csv(output / "cells.csv")
    pooled = {
        key: _pooled([result for result in results if _key(result) == key and not result.error])
        for key in dict.fromkeys(map(_key, results))
    }
    rows = [_row(key, output_name, cells, pooled, study) for key in pooled for output_name in _outputs(pooled, key)]
    adjusted = holm([float("nan") if row["p"] is None else row["p"] for row in rows])
    for row, value in zip(rows, adjusted, strict=True):
        row["p_holm"] = value if np.isfinite(value) else None
    table = pl.DataFrame(rows, schema=_COLUMNS)
    table.write_csv(output / "table.csv")
    write_study_page(study, table, pooled, cells, output)
    return table


def _key(result: CellResult) -> Group:
    return result.cell.task, result.cell.init, result.cell.fraction


def _cells(results: Sequence[CellResult]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for result in results:
        cell = result.cell
        identity = {name: getattr(cell, name) for name in ("task", "init", "fraction", "seed", "fold")}
        if result.error:
            rows.append(identity | {"error": result.error})
            continue
        for name, point in read_operating_point(Run.open(result.path))["labels"].items():
            figure = "dice" if "dice" in point["test"] else "auroc"
            value = point["test"][figure]["value"]
            rows.append(identity | {"output": name, "figure": figure, "value": value, "error": None})
    schema = {"task": pl.String, "init": pl.String, "fraction": pl.Float64, "seed": pl.Int64, "fold": pl.Int64,
              "output": pl.String, "figure": pl.String, "value": pl.Float64, "error": pl.String}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _pooled(results: Sequence[CellResult]) -> pl.DataFrame:
    """Return every test photo once, with the scores of models that have not seen its patient, averaged over seeds."""
    parts = [
        read_table(result.path, "predictions.parquet")
        .filter(pl.col("split") == "test")
        .with_columns(fold=pl.lit(result.cell.fold))
        for result in results
    ]
    if not parts:
        return pl.DataFrame()
    keys = ["path", "sha256", "patient"]
    table = pl.concat(parts)
    return table.group_by([*keys, "fold"], maintain_order=True).agg(
        pl.col(name).mean() for name in table.columns if name.startswith(("label_", "p_")) or name == "dice"
    )


def _outputs(pooled: dict[Group, pl.DataFrame], key: Group) -> list[str]:
    """Return the outputs of a task from any group that succeeded, or one empty name if all failed."""
    tables = [table for (task, _, _), table in pooled.items() if task == key[0] and len(table)]
    if not tables:
        return [""]
    names = [name.removeprefix("p_") for name in tables[0].columns if name.startswith("p_")]
    return names or ["vessel"]


def _row(
    key: Group, name: str, cells: pl.DataFrame, pooled: dict[Group, pl.DataFrame], study: StudyConfig
) -> dict[str, Any]:
    task, init, fraction = key
    mine = cells.filter((pl.col("task") == task) & (pl.col("init") == init) & (pl.col("fraction") == fraction))
    values = mine.filter(pl.col("output") == name)["value"].drop_nulls()
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    row |= {
        "task": task, "init": init, "fraction": fraction, "output": name, "cells": len(values),
        "failed": mine["error"].count(),
        "mean": values.mean(), "sd": values.std() if len(values) > 1 else None,
    }  # fmt: skip
    table = pooled[key]
    if not len(table):
        return row
    other = pooled[(task, next(iter(study.inits)), fraction)]
    other = other if init != next(iter(study.inits)) else other.clear()
    return row | (_dice(table, other) if "dice" in table.columns else _areas(table, other, name))


def _areas(table: pl.DataFrame, other: pl.DataFrame, name: str) -> dict[str, Any]:
    known = table.filter(pl.col(f"label_{name}").is_not_null())
    scores, labels = known[f"p_{name}"].to_numpy(), known[f"label_{name}"].to_numpy()
    folds = [np.flatnonzero(known["fold"].to_numpy() == fold) for fold in known["fold"].unique().sort()]

    def statistics(weights: Floats) -> dict[str, Floats]:
        areas = np.stack([auroc(scores[part], labels[part], weights[:, part]) for part in folds])
        estimable = np.isfinite(areas).sum(axis=0)
        return {"auroc": np.nansum(areas, axis=0) / np.where(estimable, estimable, np.nan)}

    area = PatientBootstrap(known["patient"].to_list()).intervals(statistics)["auroc"]
    row = {"figure": "auroc", **_described(known, area)}
    if len(other):
        both = known.join(other, on=["path", "sha256"], how="inner", suffix="_first")
        found = compare_areas(
            both[f"p_{name}"].to_numpy(), both[f"p_{name}_first"].to_numpy(), both[f"label_{name}"].to_numpy(),
            both["patient"].to_list(), both["fold"].to_numpy(),
        )  # fmt: skip
        row |= _difference(found)
    return row


def _dice(table: pl.DataFrame, other: pl.DataFrame) -> dict[str, Any]:
    row = {
        "figure": "dice",
        **_described(table, mean_with_interval(table["dice"].to_numpy(), table["patient"].to_list())),
    }
    if len(other):
        both = table.join(other, on=["path", "sha256"], how="inner", suffix="_first")
        row |= _difference(
            compare_means(both["dice"].to_numpy(), both["dice_first"].to_numpy(), both["patient"].to_list())
        )
    return row


def _described(table: pl.DataFrame, found: Interval) -> dict[str, Any]:
    return {"photos": len(table), "patients": table["patient"].n_unique()} | _finite(
        value=found.value, low=found.low, high=found.high
    )


def _difference(found: PairedDifference) -> dict[str, float | None]:
    return _finite(difference=found.difference, difference_low=found.low, difference_high=found.high, p=found.p)


def _finite(**values: float) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
