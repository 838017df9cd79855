"""Operating points for runs of any task: fitted on validation, locked, then applied to unseen photos."""

from __future__ import annotations

from typing import Any

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.evaluation.classification import fit_classification, measure_classification
from fastfundus.evaluation.label_map import LabelMap
from fastfundus.evaluation.locked_run import Measured
from fastfundus.evaluation.segmentation import fit_vessels, measure_vessels
from fastfundus.training.run import Run

__all__ = ["fit_operating_point", "measure"]


def fit_operating_point(
    run: Run, cache: PhotoCache, *, target_sensitivity: float = 0.90, target_specificity: float | None = None
) -> dict[str, Any]:
    """Fit on the validation patients, measure on the test patients, and write both files into the run.

    Args:
        run: a finished run.
        cache: the run's own cache.
        target_sensitivity: sensitivity that each threshold must reach on validation, 0 to 1. Vessels ignore it and take
            the threshold of the best mean Dice.
        target_specificity: specificity to reach instead of the sensitivity.

    Returns:
        The content of operating_point.json.

    Raises:
        SpecMismatch, CheckpointError: the cache is not the run's own.
    """
    if run.config.task == "vessels":
        return fit_vessels(run, cache)
    return fit_classification(run, cache, target_sensitivity=target_sensitivity, target_specificity=target_specificity)


def measure(
    run: Run, cache: PhotoCache, *, prevalence: float | None = None, label_map: LabelMap | None = None
) -> Measured:
    """Measure a locked run on photos it has not learned from.

    Args:
        run: a finished run.
        cache: its own cache, of which the test patients are used, or another cache.
        prevalence: see `binary_metrics`.
        label_map: how the cache's labels map to the run's outputs; None uses the same columns as training.

    Raises:
        DataError: no output has photos of both classes.
        ConfigError: `prevalence` or `label_map` was given for a vessel run.
    """
    if run.config.task != "vessels":
        return measure_classification(run, cache, prevalence=prevalence, label_map=label_map)
    if prevalence or label_map:
        raise ConfigError("--prevalence and --map apply only to runs that output probabilities, not to vessel runs")
    return measure_vessels(run, cache)
