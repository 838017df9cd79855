"""The optimizer, and the moving average of the trained weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastfundus.config import OptimizerConfig

__all__ = ["AveragedModel", "build_optimizer", "peak_rate", "resolve_rates"]

_SCRATCH_RATE = 1e-3
_PRETRAINED_RATE = 3e-4
_PRETRAINED_DECAY = 0.75


def resolve_rates(config: OptimizerConfig, *, pretrained: bool) -> OptimizerConfig:
    """Replace automatic settings: the rates that suit random weights would destroy pretrained features."""
    rate, decay = config.learning_rate, config.layer_decay
    if rate == "auto":
        rate = _PRETRAINED_RATE if pretrained else _SCRATCH_RATE
    if decay == "auto":
        decay = _PRETRAINED_DECAY if pretrained else 1.0
    return replace(config, learning_rate=rate, layer_decay=decay)


def peak_rate(config: OptimizerConfig) -> float:
    """Return the peak learning rate of settings that `resolve_rates` returned."""
    if config.learning_rate == "auto":
        raise ValueError("the learning rate is not resolved: call resolve_rates first")
    return config.learning_rate


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW for the weights that are trained; biases and normalisation layers (1-d tensors) do not decay."""
    rate, decay = peak_rate(config), config.layer_decay
    if decay == "auto":
        raise ValueError("the layer decay is not resolved: call resolve_rates first")
    if decay < 1:
        # timm knows the order of the layers of its backbones.
        groups = param_groups_layer_decay(model, weight_decay=config.weight_decay, layer_decay=decay)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=rate, fused=True)


class AveragedModel:
    """Exponential moving average of a model's weights, which is validated and saved instead of the model.

    The decay starts low and rises to its setting, so that the random initial weights lose their influence even in a
    short run.

    Args:
        model: the model to average.
        decay: decay per step, 0 to 1; 0 turns averaging off.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine, theirs = self.module.state_dict(), model.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name, value in mine.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])
