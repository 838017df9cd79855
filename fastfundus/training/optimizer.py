"""The optimizer, and the moving average of the trained weights."""

from __future__ import annotations

import copy

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastfundus.config import OptimizerConfig

__all__ = ["AveragedModel", "build_optimizer"]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW for the weights that are trained; biases and normalisation layers (1-d tensors) do not decay."""
    if config.layer_decay < 1:
        # timm knows the order of the layers of its backbones.
        groups = param_groups_layer_decay(model, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


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
