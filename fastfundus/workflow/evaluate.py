"""Evaluate a run on photos that it has not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastfundus.data.cache import PhotoCache
from fastfundus.evaluation.evaluation import evaluate_run, write_evaluation
from fastfundus.evaluation.locked_run import Measured
from fastfundus.training.run import Run
from fastfundus.workflow.inputs import open_any_caches, open_any_run

__all__ = ["evaluate"]


def evaluate(
    run: str | Path | Run,
    caches: str | Path | PhotoCache | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    rules: Sequence[str] = (),
    by: Sequence[str] = (),
    against: str | Path | Run | None = None,
    prevalence: float | None = None,
) -> tuple[Measured, dict[str, Any]]:
    """Evaluate a run at its locked thresholds on photos that it has not learned from.

    Args:
        run: the run, or its folder.
        caches: one cache, opened or not, or several. In the run's own cache, its test patients are used; in any other,
            all photos except byte-identical copies of photos that the run has learned from.
        output: folder for metrics.json, predictions.csv, model_card.md and evaluation.html; None writes nothing.
        rules: definitions of outputs by labels of another data set, such as "abnormal=dr_grade>=1".
        by: columns of the manifest by which subgroups are reported.
        against: another run to compare with on the same photos.
        prevalence: prevalence in the target population, for predictive values.

    Returns:
        The results, and the content of metrics.json.

    Raises:
        DataError: the labels are missing or do not match the task.
        SpecMismatch: a cache has another preprocessing than the run.
        CheckpointError: the run is incomplete, or was changed after its thresholds were locked.
    """
    opened = open_any_run(run)
    measured, document = evaluate_run(
        opened,
        open_any_caches(caches),
        by=tuple(by),
        against=open_any_run(against) if against else None,
        prevalence=prevalence,
        rules=tuple(rules),
    )
    if output is not None:
        write_evaluation(opened, measured, document, Path(output))
    return measured, document
