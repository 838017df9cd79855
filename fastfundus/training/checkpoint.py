"""`last.ckpt`: the complete training state, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.spec import IMAGENET_MEAN, IMAGENET_STD
from fastfundus.training.distributed import World
from fastfundus.training.optimizer import AveragedModel
from fastfundus.training.run import SCHEMA, read_table, run_file

__all__ = [
    "TrainState",
    "device_rng",
    "make_checkpoint",
    "restore_checkpoint",
    "save_checkpoint",
    "set_device_rng",
]


@dataclass(slots=True)
class TrainState:
    """Progress of a run: the content of `last.ckpt` besides weights and optimizer."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps of the current epoch."""
    loss_sum: float = 0.0
    best_score: float = -1.0
    best_epoch: int = 0
    rng: list[torch.Tensor] = field(default_factory=list)
    """State of torch's random number generator on the host, per process."""
    device_rng: list[torch.Tensor | None] = field(default_factory=list)
    """The same on the GPU, where dropout draws its numbers; None for a process on the host."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the float16 gradient scaler; empty if none is used."""
    history: list[dict[str, float]] = field(default_factory=list)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Normalisation that the initial weights expect; runs of version 0.1 always used ImageNet's."""
    std: tuple[float, float, float] = IMAGENET_STD
    provenance: dict[str, str] = field(default_factory=dict)
    """The origin of the initial weights; see `InitReport.provenance`."""


def make_checkpoint(
    cache: PhotoCache,
    config: TrainConfig,
    state: TrainState,
    model: torch.nn.Module,
    averaged: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Return the content of `last.ckpt`: plain data and tensors only, so that it loads with ``weights_only=True``."""
    return {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "spec": cache.spec.fingerprint,
        "state": {name: getattr(state, name) for name in TrainState.__dataclass_fields__},
        "model": model.state_dict(),
        "averaged": averaged.module.state_dict(),
        "averaged_steps": averaged.steps,
        "optimizer": optimizer.state_dict(),
    }


def restore_checkpoint(
    output: Path,
    cache: PhotoCache,
    config: TrainConfig,
    splits: pl.DataFrame,
    model: torch.nn.Module,
    averaged: AveragedModel,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> TrainState:
    """Restore model, averaged weights, optimizer and random number generator from `last.ckpt`.

    Raises:
        CheckpointError: the file cannot be read, or the run was started on different photos.
        ConfigError: the run was started with different settings.
    """
    try:
        saved = torch.load(output / "last.ckpt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{output / 'last.ckpt'}: cannot be read ({type(error).__name__}); start again") from None
    if saved.get("schema") != SCHEMA or TrainConfig.from_stored(saved["config"]) != config:
        raise ConfigError(
            f"{output} was started with different settings; resuming requires those of its config.toml, unchanged"
        )
    if saved["spec"] != cache.spec.fingerprint or not read_table(output, "splits.parquet").equals(splits):
        raise CheckpointError(f"{output} was started on different photos, labels or preprocessing than {cache.path}")
    model.load_state_dict(saved["model"])
    averaged.module.load_state_dict(saved["averaged"])
    averaged.steps = saved["averaged_steps"]
    # Runs of version 0.1 spelled it differently.
    optimizer.load_state_dict(saved["optimizer"] if "optimizer" in saved else saved["optimiser"])
    state = TrainState(**saved["state"])
    # With a different number of processes, dropout is reseeded: each process is already seeded by its rank.
    if len(state.rng) == world.size:
        torch.set_rng_state(state.rng[world.rank])
        # Absent from runs of earlier versions.
        set_device_rng(world.device(), state.device_rng[world.rank] if state.device_rng else None)
    return state


def device_rng(device: torch.device) -> torch.Tensor | None:
    """Return the state of the random number generator of a GPU; None for the host, which has its own."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_rng(device: torch.device, state: torch.Tensor | None) -> None:
    """Set the state of the random number generator of a GPU, if there is one to set."""
    if device.type == "cuda" and state is not None:
        torch.cuda.set_rng_state(state, device)


def save_checkpoint(value: dict[str, Any], file: Path) -> None:
    """Save with `torch.save` as an atomic write: a crash leaves the old or the new checkpoint, never a partial one.

    Raises:
        CheckpointError: the file cannot be written, such as on a full disk; the old checkpoint is kept.
    """
    with run_file(file) as partial:
        torch.save(value, partial)
