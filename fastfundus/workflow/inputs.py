"""Runs and caches as users pass them: by path, or opened already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastfundus.data.cache import PhotoCache
from fastfundus.data.joined_cache import open_caches
from fastfundus.training.run import Run

__all__ = ["open_any_caches", "open_any_run"]


def open_any_caches(caches: str | Path | PhotoCache | Sequence[str | Path]) -> PhotoCache:
    """Return a cache that is open already, or open one or several by path."""
    if isinstance(caches, PhotoCache):
        return caches
    return open_caches(*map(Path, [caches] if isinstance(caches, str | Path) else caches))


def open_any_run(run: str | Path | Run) -> Run:
    """Return a run that is open already, or open it by path."""
    return run if isinstance(run, Run) else Run.open(run)
