"""FastFundus: retinal photographs, from camera files to a trained model to an engine that screens them.

    cache = fastfundus.prepare("photos/", "cache/", labels="labels.csv")
    run = fastfundus.train("cache/", "run/")
    bundle, report = fastfundus.build_engine("run/", "bundle/")
    for record in fastfundus.screen("new_photos/", "bundle/"):
        print(record["path"], record["decision"])

Importing the package loads neither torch nor NumPy; each function loads what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfundus.config import TrainConfig
from fastfundus.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    FastFundusError,
    GateRefused,
    MissingDependency,
    PhotoError,
    SpecMismatch,
)
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

if TYPE_CHECKING:
    from fastfundus.data.cache import PhotoCache
    from fastfundus.engines.bundle import Bundle
    from fastfundus.screening.policy import ScreenPolicy
    from fastfundus.training.interrupt import Interrupted
    from fastfundus.training.observer import Observer
    from fastfundus.training.run import Run
    from fastfundus.workflow.build_engine import build_engine
    from fastfundus.workflow.evaluate import evaluate
    from fastfundus.workflow.explain import explain
    from fastfundus.workflow.prepare import prepare
    from fastfundus.workflow.screen import screen, screen_sources
    from fastfundus.workflow.train import ThresholdTargets, read_recipe, train

__all__ = [
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FastFundusError",
    "GateRefused",
    "Interrupted",
    "MissingDependency",
    "Observer",
    "PhotoCache",
    "PhotoError",
    "PreprocessSpec",
    "Run",
    "ScreenPolicy",
    "SpecMismatch",
    "Status",
    "ThresholdTargets",
    "TrainConfig",
    "__version__",
    "build_engine",
    "evaluate",
    "explain",
    "prepare",
    "read_recipe",
    "screen",
    "screen_sources",
    "train",
]

__version__ = "0.1.0"

_LAZY = {
    "Bundle": "engines.bundle",
    "Interrupted": "training.interrupt",
    "Observer": "training.observer",
    "PhotoCache": "data.cache",
    "Run": "training.run",
    "ScreenPolicy": "screening.policy",
    "ThresholdTargets": "workflow.train",
    "build_engine": "workflow.build_engine",
    "evaluate": "workflow.evaluate",
    "explain": "workflow.explain",
    "prepare": "workflow.prepare",
    "read_recipe": "workflow.train",
    "screen": "workflow.screen",
    "screen_sources": "workflow.screen",
    "train": "workflow.train",
}
"""Modules of the names that are loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastfundus' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"fastfundus.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
