"""Model card (Mitchell et al., FAccT 2019) of a run and its evaluation: what is known and what is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastfundus import __version__
from fastfundus.data.split import side_counts
from fastfundus.evaluation.figures import METRIC_NAMES, differences, prevalence_of
from fastfundus.evaluation.locked_run import read_operating_point, weights_hash
from fastfundus.records import interval_text
from fastfundus.training.run import Run, read_table

__all__ = ["model_card"]

_TASKS = {
    "abnormality": "one probability per photo that the eye is abnormal",
    "multiclass": "one probability per class; they sum to one",
    "multilabel": "one independent probability per finding",
    "ordinal": "the probability of reaching each grade",
}
_FIGURES = ("auroc", "auprc", "sensitivity", "specificity", "ppv", "npv", "ece")
_TITLES = tuple(METRIC_NAMES[name] for name in _FIGURES)


def model_card(run: Run, document: Mapping[str, Any]) -> str:
    """Return the model card as Markdown.

    Args:
        run: a run of a task that outputs probabilities.
        document: its evaluation, with `labels`, `overall`, `photos` and, if requested, `subgroups` and `against`.
    """
    points = read_operating_point(run)["labels"]
    return "\n".join(
        [
            f"# Model card: {run.path.name}",
            "",
            "**For research use only. Not a medical device.** Written by FastFundus from the run and its evaluation.",
            "Add by hand what else a screening programme must know: who was photographed, why, and with what consent.",
            "",
            "## Model",
            "",
            *_table(("", ""), _facts(run)),
            "",
            "## Intended use",
            "",
            f"- Colour fundus photographs of one eye, preprocessed as above to {run.spec.size} pixels.",
            f"- Output: {_TASKS[run.config.task]}.",
            "- Use it with the thresholds below, which were chosen on validation patients and are locked.",
            "- Not for other imaging modalities (wide-field, angiography, OCT), nor for photos that the quality check",
            "  rejects.",
            "- Not evaluated on cameras or populations other than those named below.",
            "",
            "## Data",
            "",
            *_data(run),
            "",
            f"## Performance: {document['photos']}",
            "",
            "95 % confidence intervals from resampling patients."
            + _prevalence_note(document["labels"]),
            "",
            *_mapped(document.get("map", {})),
            *_performance(document["labels"], points),
            *_subgroups(document.get("subgroups", {})),
            *_against(document.get("against")),
            "",
            "## Limits",
            "",
            *_limits(document, points),
            "",
        ]
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    model = run.config.model
    yield "network", model.backbone
    facts = [run.provenance[key] for key in ("origin", "license") if key in run.provenance]
    yield "initial weights", f"{model.init} ({', '.join(facts)})" if facts else model.init
    yield "task", f"{run.config.task}: {', '.join(run.labels)}"
    yield "best epoch", f"{run.epoch}, with {run.score[0]} {run.score[1]:.4f} on validation"
    guard = read_operating_point(run).get("guard") or {"limit": None}
    if guard["limit"]:
        yield "guard", f"features farther than {guard['limit']:.1f} from those of training photos are unfamiliar"
    yield "SHA-256 of the weights", f"`{weights_hash(run)}`"
    yield "preprocessing fingerprint", f"`{run.spec.fingerprint}`"
    yield "software", f"FastFundus {__version__}"


def _data(run: Run) -> Iterator[str]:
    splits = read_table(run.path, "splits.parquet")
    sides = ", ".join(f"{count} {side}" for side, count in side_counts(splits["split"]).items())
    yield f"- From {', '.join(f'`{path.name}`' for path in run.caches)}; photos: {sides}. No patient is in two splits."
    table = read_table(run.path, "predictions.parquet")
    for name in run.labels:
        known = table[f"label_{name}"].drop_nulls()
        yield f"- `{name}`: {int(known.sum())} of {len(known)} validation and test photos are positive."


def _prevalence_note(labels: Mapping[str, Any]) -> str:
    stated = prevalence_of(labels)
    return f" PPV and NPV at a prevalence of {stated:g}." if stated else " PPV and NPV at the prevalence in this set."


def _mapped(rules: Mapping[str, str]) -> Iterator[str]:
    if rules:
        yield from (f"Label mapping of this set: {', '.join(f'`{name}={rule}`' for name, rule in rules.items())}.", "")


def _performance(labels: Mapping[str, Any], points: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (name, entry["photos"], entry["patients"], entry["positives"], _threshold_text(points[name]),
         *(interval_text(entry[key]) for key in _FIGURES))
        for name, entry in labels.items()
    ]  # fmt: skip
    yield from _table(("output", "photos", "patients", "positive", "threshold", *_TITLES), rows)


def _threshold_text(point: Mapping[str, Any]) -> str:
    ends = {"low": point["threshold_low"], "high": point["threshold_high"]}
    return interval_text({"value": point["threshold"], **ends})


def _subgroups(subgroups: Mapping[str, Any]) -> Iterator[str]:
    for column, outputs in subgroups.items():
        yield from ("", f"### By {column}", "")
        rows = []
        for name, groups in outputs.items():
            for group in groups:
                figures = [interval_text(group[key]) for key in _FIGURES[:4]] if group["photos"] else [""] * 4
                flag = "small group: interpret with care" if group["small"] else ""
                rows.append((name, group["group"], group["photos"], group["patients"], *figures, flag))
        yield from _table(("output", column, "photos", "patients", *_TITLES[:4], ""), rows)


def _against(against: Mapping[str, Any] | None) -> Iterator[str]:
    if against is None:
        return
    yield from (
        "",
        f"### Comparison with `{against['run']}`",
        "",
        f"Difference of this run minus the other, on {against['photos']} photos evaluated by both.",
        "",
    )
    yield from _table(("output", "", "difference", "p"), differences(against))


def _limits(document: Mapping[str, Any], points: Mapping[str, Any]) -> Iterator[str]:
    if document["photos"].startswith("test patients"):
        yield "- Measured on held-out patients of the training set: it may do worse on other cameras and populations."
    for name, entry in document["labels"].items():
        if entry["positives"] < 50 or entry["photos"] - entry["positives"] < 50:
            yield f"- `{name}`: {entry['positives']} positive of {entry['photos']} photos, so the intervals are wide."
        if points[name].get("note"):
            yield f"- `{name}`: {points[name]['note']}."
    small = [
        f"{column} {group['group']}"
        for column, outputs in document.get("subgroups", {}).items()
        for groups in outputs.values()
        for group in groups
        if group["small"]
    ]
    if small:
        yield f"- Groups too small to judge: {', '.join(dict.fromkeys(small))}."
    if not document.get("subgroups"):
        yield "- Not evaluated by subgroup; see `fastfundus evaluate --by`."
    yield "- Heatmaps show where the network looks, not whether it is right."
