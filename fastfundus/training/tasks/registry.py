"""Which class implements a task; a new task is added here."""

from __future__ import annotations

from collections.abc import Callable

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.training.tasks.base import Task
from fastfundus.training.tasks.classification import ClassificationTask
from fastfundus.training.tasks.segmentation import SegmentationTask

__all__ = ["create_task"]


def create_task(cache: PhotoCache, config: TrainConfig, say: Callable[[str], None]) -> Task:
    """Create the task that a configuration names, on the photos of a cache.

    Args:
        cache: the photos.
        config: configuration of the run.
        say: receives notes for the user.

    Raises:
        DataError: the labels or patients do not allow training.
        ConfigError: settings do not match the labels, or each other.
    """
    kind = SegmentationTask if config.task == "vessels" else ClassificationTask
    return kind(cache, config, say)
