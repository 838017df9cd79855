"""Table of the study on real photographs."""

from __future__ import annotations

from typing import Any

from fastfundus.records import interval_text

__all__ = ["study_table"]


def study_table(result: dict[str, Any]) -> str:
    """Return the effect of upstream training by task, output and share of labels, as Markdown."""
    lines = [
        "| task | output | labels | from scratch | from upstream | difference | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = result["table"]
    for row in (row for row in rows if row["init"] != "scratch"):
        same = ("task", "output", "fraction")
        first = next(r for r in rows if r["init"] == "scratch" and all(r[name] == row[name] for name in same))
        difference = interval_text(
            {"value": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
        )
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
        lines.append(
            f"| {row['task']} | {row['output']} | {row['fraction']:.0%} | {_shown(first)} | {_shown(row)} | "
            f"{difference} | {p} |"
        )
    upstream, machine = result["upstream_test"], result["machine"]
    failed = sum(row["failed"] or 0 for row in rows)
    lines += [
        "",
        f"ResNet-18 at {result['size']} px, five folds: mean ± SD of the AUROC over the folds and, in brackets, the "
        "patient-clustered 95% interval. Every photo is tested once, by the model that has not seen its patient. "
        "Differences are taken within folds (DeLong, clustered by patient, Student's t). The upstream run reached an "
        f"AUROC of {interval_text(upstream['auroc'])} on {upstream['patients']} held-out patients of its own data. "
        f"{failed} runs failed. Measured {result['date']} on {machine['cpu']}, {machine['cores']} cores, in "
        f"{result['minutes']:.0f} minutes, commit {result['commit']}. Reproduce with `make study`.",
    ]
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "not estimable"
    spread = "" if row["sd"] is None else f" ± {row['sd']:.3f}"
    span = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
    return f"{row['mean']:.3f}{spread}{span}"
