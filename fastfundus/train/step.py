"""One training step, the averaged weights, and batched prediction."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.config import OptimiserConfig
from fastfundus.data.store import PhotoArray
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import fixed_matrices

__all__ = ["AveragedModel", "TrainStep", "build_optimiser", "predict_logits"]


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW; biases and normalisation layers (tensors of one dimension) are not decayed."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    spared = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


class AveragedModel:
    """An exponential average of a model's weights, validated and saved in its place.

    The decay starts low and rises to its setting, so that the first random weights are forgotten in a short run too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights by one step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine, theirs = self.module.state_dict(), model.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name, value in mine.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])


class TrainStep:
    """Forward, loss, backward, clip, update: one batch."""

    def __init__(
        self, model: nn.Module, forward: Any, optimiser: torch.optim.Optimizer, *, amp: bool, clip_norm: float
    ) -> None:
        self.model, self.forward, self.optimiser = model, forward, optimiser
        self.amp, self.clip_norm = amp, clip_norm

    def __call__(self, inputs: Tensor, targets: Tensor, rate: float) -> Tensor:
        """Learn from one batch.

        Args:
            inputs: [N, 3, S, S] float or bfloat16, channels-last where that pays.
            targets: [N, 1] float, 0 or 1.
            rate: learning rate.

        Returns:
            The mean loss, a scalar that has not been waited for.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.forward(inputs)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimiser.step()
        return loss.detach()


def _batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    amp: bool = False,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Logits of photos of a cache.

    Args:
        model: from [N, 3, S, S] to [N, L]; put into evaluation mode.
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] which photos.
        spec: of the cache.
        amp: bfloat16 autocast.
        batch_size: photos a forward pass.
        device: where the model is.

    Returns:
        float32 [N, L].
    """
    model.eval()
    parts = []
    for batch in _batches(rows, batch_size):
        geometry, colour = map(torch.from_numpy, fixed_matrices(spec, len(batch)))
        images = torch.from_numpy(np.ascontiguousarray(photos[batch])).to(device)
        inputs = sample(images, geometry, colour, spec.size, torch.float32)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            parts.append(model(inputs).float().cpu().numpy())
    return np.concatenate(parts)
