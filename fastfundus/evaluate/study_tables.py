"""What a study found: tables for people and for papers, and a page with curves.

cells.csv   a row a cell and output: AUROC on its test fold, or why there is none
table.csv   a row a task, init, fraction and output: mean and SD over folds and seeds; AUROC of every photo once, with
            its patient-clustered interval; the paired difference to the first init, p-values adjusted over the study
table.md    the same to read; table.tex for LaTeX; study.html with label-efficiency and ROC curves
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.metrics import roc_curve

from fastfundus.evaluate.bootstrap import PatientBootstrap
from fastfundus.evaluate.compare import compare_areas, holm
from fastfundus.evaluate.measured import read_operating_point
from fastfundus.evaluate.metrics import auroc
from fastfundus.evaluate.study import CellResult
from fastfundus.evaluate.study_config import StudyConfig
from fastfundus.pages import write_page
from fastfundus.pictures import as_svg
from fastfundus.records import interval_text
from fastfundus.train.run import Run

__all__ = ["write_tables"]

_INK = ("#475569", "#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#b45309")
_COLUMNS = {
    "task": pl.String, "init": pl.String, "fraction": pl.Float64, "output": pl.String, "cells": pl.Int64,
    "failed": pl.Int64, "mean": pl.Float64, "sd": pl.Float64, "photos": pl.Int64, "patients": pl.Int64,
    "pooled": pl.Float64, "low": pl.Float64, "high": pl.Float64, "difference": pl.Float64, "difference_low": pl.Float64,
    "difference_high": pl.Float64, "p": pl.Float64, "p_holm": pl.Float64,
}  # fmt: skip


def write_tables(study: StudyConfig, results: Sequence[CellResult], output: Path) -> pl.DataFrame:
    """Write every table and the page; returns `table.csv`."""
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
    (output / "table.md").write_text(_markdown(table), encoding="utf-8")
    (output / "table.tex").write_text(_latex(table), encoding="utf-8")
    _write_page(study, table, pooled, cells, output)
    return table


_Key = tuple[str, str, float]


def _key(result: CellResult) -> _Key:
    return result.cell.task, result.cell.init, result.cell.fraction


def _cells(results: Sequence[CellResult]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for result in results:
        cell = result.cell
        about = {name: getattr(cell, name) for name in ("task", "init", "fraction", "seed", "fold")}
        if result.error:
            rows.append(about | {"output": None, "auroc": None, "error": result.error})
            continue
        for name, point in read_operating_point(Run.open(result.path))["labels"].items():
            rows.append(about | {"output": name, "auroc": point["test"]["auroc"]["value"], "error": None})
    schema = {"task": pl.String, "init": pl.String, "fraction": pl.Float64, "seed": pl.Int64, "fold": pl.Int64,
              "output": pl.String, "auroc": pl.Float64, "error": pl.String}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _pooled(results: Sequence[CellResult]) -> pl.DataFrame:
    """Every tested photo once a seed, by the model that has not seen its patient; scores averaged over seeds."""
    parts = [
        pl.read_parquet(result.path / "predictions.parquet").filter(pl.col("split") == "test") for result in results
    ]
    if not parts:
        return pl.DataFrame()
    keys = ["path", "sha256", "patient"]
    table = pl.concat(parts)
    return table.group_by(keys, maintain_order=True).agg(
        pl.col(name).mean() for name in table.columns if name.startswith(("label_", "p_"))
    )


def _outputs(pooled: dict[_Key, pl.DataFrame], key: _Key) -> list[str]:
    """Names of the outputs of a task: of any of its groups, since this one may have failed."""
    tables = [table for (task, _, _), table in pooled.items() if task == key[0] and len(table)]
    return [name.removeprefix("p_") for name in tables[0].columns if name.startswith("p_")] if tables else []


def _row(
    key: _Key, name: str, cells: pl.DataFrame, pooled: dict[_Key, pl.DataFrame], study: StudyConfig
) -> dict[str, Any]:
    task, init, fraction = key
    mine = cells.filter((pl.col("task") == task) & (pl.col("init") == init) & (pl.col("fraction") == fraction))
    values = mine.filter(pl.col("output") == name)["auroc"].drop_nulls()
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    row |= {
        "task": task, "init": init, "fraction": fraction, "output": name, "cells": len(values),
        "failed": mine["error"].count(),
        "mean": values.mean(), "sd": values.std() if len(values) > 1 else None,
    }  # fmt: skip
    table = pooled[key]
    if not len(table):
        return row
    known = table.filter(pl.col(f"label_{name}").is_not_null())
    scores, labels = known[f"p_{name}"].to_numpy(), known[f"label_{name}"].to_numpy()
    patients = known["patient"].to_list()
    order = np.argsort(scores, kind="stable")
    area = PatientBootstrap(patients).intervals(
        lambda weights: {"auroc": auroc(scores[order], labels[order], weights)}, order
    )["auroc"]
    row |= {"photos": len(known), "patients": len(set(patients))} | _finite(
        pooled=area.value, low=area.low, high=area.high
    )
    first = pooled[(task, next(iter(study.inits)), fraction)]
    if init != next(iter(study.inits)) and len(first):
        both = known.join(first, on=["path", "sha256"], how="inner", suffix="_first")
        found = compare_areas(
            both[f"p_{name}"].to_numpy(), both[f"p_{name}_first"].to_numpy(), both[f"label_{name}"].to_numpy(),
            both["patient"].to_list(),
        )  # fmt: skip
        row |= _finite(difference=found.difference, difference_low=found.low, difference_high=found.high, p=found.p)
    return row


def _finite(**values: float) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    spread = "not estimable" if row["mean"] is None else f"{row['mean']:.3f}"
    if row["sd"] is not None:
        spread += f" ± {row['sd']:.3f}"
    pooled = interval_text({"value": row["pooled"], "low": row["low"], "high": row["high"]})
    difference = ""
    if row["difference"] is not None:
        ends = {"low": row["difference_low"], "high": row["difference_high"]}
        difference = interval_text({"value": row["difference"], **ends})
    p = "" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    return (
        row["task"], row["output"], f"{row['fraction']:.0%}", row["init"], f"{row['cells']}{failed}", spread, pooled,
        difference, p,
    )  # fmt: skip


_HEAD = (
    "task",
    "output",
    "labels",
    "init",
    "runs",
    "AUROC, mean ± SD",
    "every photo once (95 %)",
    "to the first init",
    "p (Holm)",
)


def _markdown(table: pl.DataFrame) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    lines += ["| " + " | ".join(_shown(row)) + " |" for row in table.iter_rows(named=True)]
    return "\n".join(lines) + "\n"


def _latex(table: pl.DataFrame) -> str:
    def plain(text: str) -> str:
        for sign in ("\\", "&", "%", "_", "#", "$"):
            text = text.replace(sign, f"\\{sign}" if sign != "\\" else "\\textbackslash{}")
        return text.replace("±", "$\\pm$")

    lines = [
        f"\\begin{{tabular}}{{{'l' * 5}{'r' * 4}}}",
        "\\toprule",
        " & ".join(map(plain, _HEAD)) + " \\\\",
        "\\midrule",
    ]
    lines += [" & ".join(map(plain, _shown(row))) + " \\\\" for row in table.iter_rows(named=True)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _write_page(
    study: StudyConfig, table: pl.DataFrame, pooled: dict[_Key, pl.DataFrame], cells: pl.DataFrame, output: Path
) -> None:
    pairs = list(table.select("task", "output").unique(maintain_order=True).iter_rows())
    write_page(
        output / "study.html",
        "evaluate/study.html",
        name=output.name,
        study=study,
        head=_HEAD,
        rows=[_shown(row) for row in table.iter_rows(named=True)],
        figures=[(task, name, _figure(table, pooled, study, task, name)) for task, name in pairs],
        failed=cells.filter(pl.col("error").is_not_null()).rows(named=True),
    )


def _figure(table: pl.DataFrame, pooled: dict[_Key, pl.DataFrame], study: StudyConfig, task: str, name: str) -> str:
    """Label efficiency, and ROC curves with all labels."""

    def draw(plots: Sequence[Any]) -> None:
        efficiency, roc = plots
        for number, (ink, init) in enumerate(zip(_INK * len(study.inits), study.inits, strict=False)):
            mine = table.filter((pl.col("task") == task) & (pl.col("output") == name) & (pl.col("init") == init))
            mine = mine.filter(pl.col("mean").is_not_null()).sort("fraction")
            spread = mine["sd"].fill_null(0.0).to_numpy()
            efficiency.errorbar(
                # Side by side, so that bars do not hide each other.
                mine["fraction"].to_numpy() * 1.02**number,
                mine["mean"].to_numpy(),
                spread,
                color=ink,
                marker="o",
                capsize=3,
                label=init,
            )
            whole = pooled[(task, init, study.fractions[-1])]
            if len(whole):
                known = whole.filter(pl.col(f"label_{name}").is_not_null())
                if known[f"label_{name}"].n_unique() > 1:
                    false, true, _ = roc_curve(known[f"label_{name}"].to_numpy(), known[f"p_{name}"].to_numpy())
                    roc.plot(false, true, color=ink, label=init)
        if len(study.fractions) > 1:
            efficiency.set_xscale("log")
        efficiency.set_xticks(study.fractions, [f"{fraction:.0%}" for fraction in study.fractions])
        efficiency.minorticks_off()
        efficiency.set(xlabel="labels of the training patients", ylabel="AUROC, mean ± SD")
        roc.plot([0, 1], [0, 1], color="#9ca3af", linestyle=":", linewidth=1)
        roc.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"{study.fractions[-1]:.0%} of the labels")
        roc.title.set_fontsize(9)
        roc.legend(frameon=False, fontsize=8, loc="lower right")

    return as_svg(draw, columns=2, width_in=10, height_in=3.4)
