"""Reports of a study: Markdown, LaTeX, and a page with label-efficiency and ROC curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from fastfundus.evaluation.figures import INK, METRIC_NAMES
from fastfundus.pages import write_page
from fastfundus.pictures import as_svg
from fastfundus.records import interval_text
from fastfundus.study.config import StudyConfig

__all__ = ["Group", "write_study_page"]

_WIDTH_IN, _HEIGHT_IN = 3.6, 2.5
_FALSE = np.linspace(0, 1, 201)

Group = tuple[str, str, float]
"""Task, init, fraction."""


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    spread = "not estimable" if row["mean"] is None else f"{row['mean']:.3f}"
    if row["sd"] is not None:
        spread += f" ± {row['sd']:.3f}"
    span = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    difference = ""
    if row["difference"] is not None:
        ends = {"low": row["difference_low"], "high": row["difference_high"]}
        difference = interval_text({"value": row["difference"], **ends})
    p = "" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    figure = METRIC_NAMES.get(row["figure"], "")
    return (
        row["task"], row["output"], figure, f"{row['fraction']:.0%}", row["init"], f"{row['cells']}{failed}", spread,
        span, difference, p,
    )  # fmt: skip


_HEAD = (
    "task",
    "output",
    "figure",
    "labels",
    "init",
    "runs",
    "mean ± SD over runs",
    "95 % interval",
    "difference from first init",
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
        f"\\begin{{tabular}}{{{'l' * 6}{'r' * 4}}}",
        "\\toprule",
        " & ".join(map(plain, _HEAD)) + " \\\\",
        "\\midrule",
    ]
    lines += [" & ".join(map(plain, _shown(row))) + " \\\\" for row in table.iter_rows(named=True)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def write_study_page(
    study: StudyConfig, table: pl.DataFrame, pooled: dict[Group, pl.DataFrame], cells: pl.DataFrame, output: Path
) -> None:
    """Write `table.md`, `table.tex` and `study.html`.

    Args:
        study: the study.
        table: the table of `write_tables`.
        pooled: predictions for every test photo, by task, init and fraction.
        cells: the content of `cells.csv`.
        output: folder to write into.
    """
    (output / "table.md").write_text(_markdown(table), encoding="utf-8")
    (output / "table.tex").write_text(_latex(table), encoding="utf-8")
    measured = table.filter(pl.col("mean").is_not_null())
    pairs = list(measured.select("task", "output").unique(maintain_order=True).iter_rows())
    write_page(
        output / "study.html",
        "study/study.html",
        name=output.name,
        study=study,
        head=_HEAD,
        rows=[_shown(row) for row in table.iter_rows(named=True)],
        figures=[(task, name, _figures(table, pooled, study, task, name)) for task, name in pairs],
        failed=cells.filter(pl.col("error").is_not_null()).rows(named=True),
    )


def _sensitivities(table: pl.DataFrame, name: str) -> NDArray[np.float64] | None:
    """Return the sensitivities of a fold's ROC curve at the rates `_FALSE`; None if the fold lacks a class."""
    labels = table[f"label_{name}"].to_numpy()
    if len(set(labels.tolist())) < 2:
        return None
    false, true, _ = roc_curve(labels, table[f"p_{name}"].to_numpy())
    # Of several points at the same false-positive rate, take the highest.
    return np.asarray(true[np.searchsorted(false, _FALSE, side="right") - 1])


def _figures(
    table: pl.DataFrame, pooled: dict[Group, pl.DataFrame], study: StudyConfig, task: str, name: str
) -> list[tuple[str, float]]:
    """Draw label efficiency and the mean ROC curve over folds per fraction; return SVGs and their widths in inches."""
    mine = table.filter((pl.col("task") == task) & (pl.col("output") == name) & pl.col("mean").is_not_null())

    def efficiency(plots: Sequence[Any]) -> None:
        (axes,) = plots
        for number, (ink, init) in enumerate(zip(INK * len(study.inits), study.inits, strict=False)):
            of_init = mine.filter(pl.col("init") == init).sort("fraction")
            axes.errorbar(
                # Offset horizontally so that error bars do not overlap.
                of_init["fraction"].to_numpy() * 1.02**number,
                of_init["mean"].to_numpy(),
                of_init["sd"].fill_null(0.0).to_numpy(),
                color=ink,
                marker="o",
                capsize=3,
                label=init,
            )
        axes.set_xscale("log")
        axes.set_xlim(study.fractions[0] * 0.8, study.fractions[-1] * 1.25)
        axes.set_xticks(study.fractions, [f"{fraction:.0%}" for fraction in study.fractions])
        axes.minorticks_off()
        said = METRIC_NAMES[mine["figure"][0]] if len(mine) else ""
        axes.set(xlabel="fraction of training labels", ylabel=f"{said}, mean ± SD")
        axes.legend(frameon=False, fontsize=8)

    def curves(plots: Sequence[Any]) -> None:
        for axes, fraction in zip(plots, study.fractions, strict=True):
            axes.plot([0, 1], [0, 1], color="#9ca3af", linestyle=":", linewidth=1)
            for ink, init in zip(INK * len(study.inits), study.inits, strict=False):
                whole = pooled[(task, init, fraction)]
                known = whole.filter(pl.col(f"label_{name}").is_not_null()) if len(whole) else whole
                of_folds = [_sensitivities(part, name) for part in known.partition_by("fold")] if len(known) else []
                if usable := [values for values in of_folds if values is not None]:
                    axes.plot(np.r_[0, _FALSE], np.r_[0, np.mean(usable, axis=0)], color=ink, linewidth=1.2)
            axes.set(title=f"{fraction:.0%} of the labels", aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.title.set_fontsize(9)
        plots[0].set(xlabel="1 - specificity", ylabel="sensitivity")

    figures = [(as_svg(efficiency, columns=1, width_in=_WIDTH_IN, height_in=_HEIGHT_IN), _WIDTH_IN)]
    if "dice" not in mine["figure"].to_list():
        width = 2.3 * len(study.fractions)
        svg = as_svg(curves, columns=len(study.fractions), width_in=width, height_in=_HEIGHT_IN)
        figures.append((svg, width))
    return figures
