"""Resolution of automatic settings, by what the machine computes fastest and what the initial weights need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastfundus.config import TrainConfig
from fastfundus.errors import ConfigError
from fastfundus.models.initial import resolve_init, resolve_local_contrast
from fastfundus.models.pretrained import is_hub_name
from fastfundus.training.optimizer import resolve_rates
from fastfundus.training.precision import resolve_precision

__all__ = ["resolve_settings", "settings_of_run"]

_FIXED_BY_RUN = {("loop", "amp"), ("loop", "amp_dtype"), ("model", "init"), ("model", "backbone")}
_FIXED_BY_RUN |= {("model", "local_contrast")}
_FIXED_BY_RUN |= {("optimizer", "learning_rate"), ("optimizer", "layer_decay")}


def resolve_settings(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, list[str]]:
    """Make initial weights, rates and precision definite.

    Args:
        config: as the user wrote it; definite settings are kept.
        device: where the model will train.

    Returns:
        The configuration, and lines for the user.

    Raises:
        CheckpointError: weights on this machine are not as published; see `resolve_init`.
    """
    model, note = resolve_init(config.model)
    model = resolve_local_contrast(model, config.task)
    contrast = "" if model.local_contrast is not True else "photos enter the network as their local contrast"
    optimizer = resolve_rates(config.optimizer, pretrained=model.init != "scratch")
    loop, precision = resolve_precision(config.loop, device)
    notes = [line for line in (note, contrast) if line]
    if config.optimizer != optimizer:
        decay = f", layer decay {optimizer.layer_decay:g}" if optimizer.layer_decay != 1 else ""
        notes.append(f"learning rate {optimizer.learning_rate:g}{decay}")
    return replace(config, model=model, optimizer=optimizer, loop=loop), [*notes, f"training in {precision}"]


def settings_of_run(config: TrainConfig, folder: Path, device: torch.device) -> tuple[TrainConfig, list[str]]:
    """Make automatic settings those of the run that is resumed.

    Args:
        config: as the user wrote it; settings that contradict the run are left to the checks of the checkpoint.
        folder: the run folder.
        device: where the model will train.

    Returns:
        The configuration, and lines for the user, such as that this device only emulates the run's precision.

    Raises:
        ConfigError: the run's config.toml is missing or invalid.
    """
    kept = TrainConfig.from_run(folder)
    if kept.optimizer.learning_rate == "auto" or kept.model.init == "auto":
        raise ConfigError(
            f"{folder / 'config.toml'}: lacks settings that the run stored there; restore the file, or start again in "
            "another folder"
        )
    for section, name in _FIXED_BY_RUN:
        table: Any = getattr(config, section)
        value, stored = getattr(table, name), getattr(getattr(kept, section), name)
        if value == "auto" or (name == "backbone" and is_hub_name(value)):
            config = replace(config, **{section: replace(table, **{name: stored})})
    loop, precision = resolve_precision(config.loop, device)
    return replace(config, loop=loop), [f"training in {precision}"]
