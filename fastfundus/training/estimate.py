"""Estimate of memory, FLOPs and time of a run, measured on a few photos before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import side_counts
from fastfundus.models.classifier import set_training, uses_channels_last
from fastfundus.models.flops import count_flops
from fastfundus.photo.memory import keep_memory
from fastfundus.training.distributed import World
from fastfundus.training.memory import input_side, training_bytes
from fastfundus.training.optimizer import build_optimizer
from fastfundus.training.precision import depthwise_in_float32
from fastfundus.training.settings import resolve_settings
from fastfundus.training.step import TrainStep
from fastfundus.training.tasks.registry import create_task

__all__ = ["Estimate", "estimate_training"]

_TIMED = 8
"""Largest number of photos of the timed batch."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of a run."""

    outputs: tuple[str, ...]
    photos: dict[str, int]
    """Number of photos by split."""
    input: tuple[int, int, int, int]
    """Shape of a batch, [N, C, H, W]."""
    output: tuple[int, ...]
    """Shape of its logits."""
    parameters: int
    trained_parameters: int
    flops: int
    """Floating-point operations of the forward pass of one photo, a multiplication with addition counted as two.
    Training takes about three times as many."""
    memory_bytes: int
    """Weights, optimizer and activations of a batch, without photos that are kept on the GPU."""
    cache_bytes: int
    """Size of the training and validation photos."""
    steps: int
    """Steps per epoch."""
    epochs: int
    runs: int
    """Number of folds."""
    step_s: float
    """Seconds per step on this machine, extrapolated from a part of a batch."""
    device: str

    @property
    def hours(self) -> float:
        """Duration of all epochs and folds, without validation."""
        return self.step_s * self.steps * self.epochs * self.runs / 3600

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.photos.items())
        lines = [
            ("photos", f"{counts}; {self.cache_bytes / 2**30:.2f} GiB"),
            ("outputs", f"{len(self.outputs)}: {', '.join(self.outputs[:8])}{' ...' if len(self.outputs) > 8 else ''}"),
            ("batch", f"{list(self.input)} -> {list(self.output)}"),
            ("parameters", f"{self.parameters / 1e6:.2f} million, {self.trained_parameters / 1e6:.2f} of them trained"),
            ("arithmetic", f"{self.flops / 1e9:.2f} GFLOP per photo, forward"),
            ("memory", f"about {self.memory_bytes / 2**30:.2f} GiB with a batch, on {self.device}"),
            ("steps", f"{self.steps} per epoch, {self.epochs} epochs" + (f", {self.runs} folds" * (self.runs > 1))),
            ("time", f"about {_duration(self.hours)} on this machine ({self.step_s:.2f} s per step)"),
        ]
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{max(1, round(hours * 60))} minutes"


def estimate_training(cache: PhotoCache, config: TrainConfig, *, say: Callable[[str], None], runs: int = 1) -> Estimate:
    """Build the model, measure a few photos, and return the estimate; writes nothing.

    Args:
        cache: the photos.
        config: configuration of the run.
        say: receives notes for the user.
        runs: number of folds.

    Raises:
        DataError: the labels or patients do not allow training.
        ConfigError: settings do not match the labels, or each other.
    """
    # As in training: batches need megabytes of fresh memory each.
    keep_memory()
    device = World().device()
    config, notes = resolve_settings(config, device)
    for note in notes:
        say(note)
    task = create_task(cache, config, say)
    model, _ = task.create(config.model)
    if device.type == "cpu":
        depthwise_in_float32(model)
    model = model.to(device)
    if uses_channels_last(config.loop.channels_last, model):
        model = model.to(memory_format=torch.channels_last)
    size = input_side(config, cache.spec.size)
    parameters = sum(value.numel() for value in model.parameters())
    set_training(model, freeze=config.model.freeze)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    shape = (config.loop.batch_size, 3, size, size)
    output, flops = count_flops(model.eval(), torch.zeros(1, *shape[1:], device=device))
    steps = max(1, len(task.strata) // (config.loop.batch_size * config.loop.accumulate))
    counts = side_counts(task.splits["split"])
    return Estimate(
        outputs=task.outputs,
        photos=counts,
        input=shape,
        output=(shape[0], *output.shape[1:]),
        parameters=parameters,
        trained_parameters=trained,
        flops=flops,
        memory_bytes=training_bytes(config, model, size, device),
        cache_bytes=(counts["train"] + counts["val"]) * 3 * cache.spec.size**2,
        steps=steps,
        epochs=config.loop.epochs,
        runs=runs,
        step_s=_step_s(config, model, task.loss(device), output, shape, device),
        device=str(device),
    )


def _step_s(
    config: TrainConfig,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    output: Tensor,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> float:
    count = min(_TIMED, shape[0])
    set_training(model, freeze=config.model.freeze)
    inputs = torch.randn(count, *shape[1:], device=device).to(memory_format=torch.channels_last)
    truth = torch.zeros(count, *output.shape[1:], device=device)
    optimizer = build_optimizer(model, config.optimizer)
    step = TrainStep(model, model, optimizer, config.loop, loss, clip_norm=config.optimizer.clip_norm, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        # Reading the loss synchronises the device.
        float(step([(inputs, truth)], count, 0.0))
        times.append(time.perf_counter() - began)
    return min(times) * shape[0] * config.loop.accumulate / count
