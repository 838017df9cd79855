"""The operating point of a run of any task: fitted on validation and locked, then applied to photos it has not seen."""

from __future__ import annotations

from typing import Any

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.evaluate.grading import fit_grading, measure_grading
from fastfundus.evaluate.label_map import LabelMap
from fastfundus.evaluate.measured import Measured
from fastfundus.evaluate.vessels import fit_vessels, measure_vessels
from fastfundus.train.run import Run

__all__ = ["fit_operating_point", "measure"]


def fit_operating_point(
    run: Run, cache: PhotoCache, *, target_sensitivity: float = 0.90, target_specificity: float | None = None
) -> dict[str, Any]:
    """Fit on the validation patients, measure on the test patients, write both files into the run.

    Args:
        run: finished.
        cache: its own.
        target_sensitivity: that each threshold reaches on validation, 0 to 1; vessels take the best mean Dice.
        target_specificity: the same of specificity, and then in place of sensitivity.

    Returns:
        The content of operating_point.json.

    Raises:
        SpecMismatch, CheckpointError: the cache is not the run's.
    """
    if run.config.task == "vessels":
        return fit_vessels(run, cache)
    return fit_grading(run, cache, target_sensitivity=target_sensitivity, target_specificity=target_specificity)


def measure(
    run: Run, cache: PhotoCache, *, prevalence: float | None = None, label_map: LabelMap | None = None
) -> Measured:
    """Apply a run, as locked, to photos it has not learned from.

    Args:
        run: finished.
        cache: its own, of which its test patients are taken, or another.
        prevalence: as for `binary_metrics`.
        label_map: what the cache's labels mean in the run's terms; None takes columns as training did.

    Raises:
        DataError: the photos show one class only.
        ConfigError: vessels were given what means nothing to them.
    """
    if run.config.task != "vessels":
        return measure_grading(run, cache, prevalence=prevalence, label_map=label_map)
    if prevalence or label_map:
        raise ConfigError("--prevalence and --map are for runs that give probabilities, not for vessels")
    return measure_vessels(run, cache)
