"""The interface between a task and the trainer.

A task selects the photos that take part, makes the batches of an epoch, provides the loss, and validates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.config import ModelConfig, TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.leakage import pair_positions
from fastfundus.data.split import assign_splits
from fastfundus.models.initial import InitReport
from fastfundus.spec import PreprocessSpec
from fastfundus.training.distributed import World

__all__ = ["Batch", "Task", "assign_split"]

Batch = tuple[Tensor, Tensor]
"""Inputs [B, 3, S, S] float32 and ground truth [B, L] (or [B, 1, S, S]) float32, on the device."""


class Task(Protocol):
    """A task, as the trainer uses it."""

    spec: PreprocessSpec
    """Preprocessing of the photos; the trainer sets the normalisation that the model expects."""
    outputs: tuple[str, ...]
    """Names of the model's outputs."""
    splits: pl.DataFrame
    """path, sha256, patient, the known labels, and split of every photo that takes part."""
    strata: NDArray[np.int64]
    """[N] class of each training example, for samplers that balance classes."""
    summary: str
    """Description of what is learned."""
    selection_metric: str
    """Name of the validation score that selects the best epoch; higher is better."""

    def create(self, config: ModelConfig) -> tuple[nn.Module, InitReport]:
        """Build the network."""
        ...

    def loss(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss: a function of logits and ground truth that returns a scalar."""
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of a network from `create`, without parts that only serve training."""
        ...

    def load(self, device: torch.device, free_bytes: int) -> bool:
        """Prepare to make batches, and return whether the photos are now in device memory."""
        ...

    def batches(self, parts: list[NDArray[np.int64]], epoch: int, device: torch.device) -> Generator[Batch]:
        """Yield batches of training examples, given by position."""
        ...

    def validate(self, model: nn.Module, world: World) -> tuple[float, dict[str, float]]:
        """Return loss and scores on the validation photos."""
        ...


def assign_split(
    cache: PhotoCache,
    rows: NDArray[np.int64],
    strata: NDArray[np.int64] | None,
    config: TrainConfig,
    columns: dict[str, NDArray[np.float64]],
    say: Callable[[str], None],
) -> pl.DataFrame:
    """Assign each row of a cache that takes part to a split; return the table `Task.splits`.

    Args:
        cache: the photos.
        rows: [N] rows that take part.
        strata: [N] class of each of them, which every split contains in equal shares; None does not stratify.
        config: configuration of the run.
        columns: known labels by output, [N] each, NaN where unknown.
        say: receives notes for the user.
    """
    part = cache.manifest[rows]
    split = assign_splits(part, strata, config.data, pair_positions(cache, rows))
    for note in split.notes:
        say(f"note: {note}")
    known = [pl.Series(f"label_{name}", values, nan_to_null=True) for name, values in columns.items()]
    return part.select("path", "sha256", "patient").with_columns(*known, pl.Series("split", split.names))
