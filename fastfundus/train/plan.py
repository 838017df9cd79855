"""What a run will cost, measured on a few photos before it starts: memory, arithmetic, time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import side_counts
from fastfundus.machine import available_memory
from fastfundus.models.classifier import set_training, uses_channels_last
from fastfundus.models.flops import count_flops
from fastfundus.train.distributed import World
from fastfundus.train.observer import Observer
from fastfundus.train.precision import autocast_dtype, resolve_precision
from fastfundus.train.step import TrainStep, build_optimiser

__all__ = ["Plan", "memory_warnings", "plan_training", "room_for_photos"]

_PROBED = 2
"""Photos of the batch on which activations are counted."""
_TIMED = 8
"""Photos of the batch that is timed, at most."""
_BYTES_A_WEIGHT = 20
"""Weights, gradients, AdamW's two moments and the averaged weights, in float32."""
_SPARE = 1.25
"""Workspaces of convolutions and what the allocator cannot use, as a factor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will cost."""

    outputs: tuple[str, ...]
    photos: dict[str, int]
    """By split."""
    input: tuple[int, int, int, int]
    """Shape of a batch, [N, C, H, W]."""
    output: tuple[int, ...]
    """Shape of its logits."""
    parameters: int
    trained_parameters: int
    flops: int
    """Floating-point operations of one photo's forward pass; a product and a sum are two. Training takes about three
    times as many."""
    memory_bytes: int
    """Weights, optimiser and activations of a batch; photos that lie on the GPU come on top."""
    cache_bytes: int
    """Photos of training and validation."""
    steps: int
    """Of an epoch."""
    epochs: int
    runs: int
    """How many folds."""
    step_s: float
    """Seconds a step on this machine, from a timed part of it."""
    device: str

    @property
    def hours(self) -> float:
        """Of all epochs and folds, validation not counted."""
        return self.step_s * self.steps * self.epochs * self.runs / 3600

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.photos.items())
        lines = [
            ("photos", f"{counts}; {self.cache_bytes / 2**30:.2f} GiB"),
            ("outputs", f"{len(self.outputs)}: {', '.join(self.outputs[:8])}{' ...' if len(self.outputs) > 8 else ''}"),
            ("batch", f"{list(self.input)} -> {list(self.output)}"),
            ("parameters", f"{self.parameters / 1e6:.2f} million, {self.trained_parameters / 1e6:.2f} of them trained"),
            ("arithmetic", f"{self.flops / 1e9:.2f} GFLOP a photo, forward"),
            ("memory", f"about {self.memory_bytes / 2**30:.2f} GiB with a batch, on {self.device}"),
            ("steps", f"{self.steps} an epoch, {self.epochs} epochs" + (f", {self.runs} folds" * (self.runs > 1))),
            ("time", f"about {_duration(self.hours)} on this machine ({self.step_s:.2f} s a step)"),
        ]
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{max(1, round(hours * 60))} minutes"


def plan_training(cache: PhotoCache, config: TrainConfig, *, say: Callable[[str], None], runs: int = 1) -> Plan:
    """Build what would be trained, measure a few photos, and forget it again; writes nothing.

    Raises:
        As `train`.
    """
    from fastfundus.train.loop import problem_of

    class Notes(Observer):
        def say(self, text: str) -> None:
            say(text)

    device = World().device()
    loop, precision = resolve_precision(config.loop, device)
    config = replace(config, loop=loop)
    say(precision)
    problem = problem_of(cache, config, Notes())
    model, _ = problem.create(config.model)
    model = model.to(device)
    if uses_channels_last(config.loop.channels_last, model):
        model = model.to(memory_format=torch.channels_last)
    size = _input_side(config, cache.spec.size)
    parameters = sum(value.numel() for value in model.parameters())
    set_training(model, freeze=config.model.freeze)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    shape = (config.loop.batch_size, 3, size, size)
    output, flops = count_flops(model.eval(), torch.zeros(1, *shape[1:], device=device))
    steps = max(1, len(problem.strata) // (config.loop.batch_size * config.loop.accumulate))
    counts = side_counts(problem.splits["split"])
    return Plan(
        outputs=problem.outputs,
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
        step_s=_step_s(config, model, problem.loss(device), output, shape, device),
        device=str(device),
    )


def _input_side(config: TrainConfig, size: int) -> int:
    """Side of the model's inputs in pixels, from a cache of `size`."""
    return config.loop.tile if config.task == "vessels" else size


def training_bytes(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> int:
    """Memory that training takes with one batch, from what the forward pass of two photos keeps for the backward one.

    Activations that torch.compile computes anew are counted too: it will rather be less.
    """
    probe = copy.deepcopy(model)
    set_training(probe, freeze=config.model.freeze)
    weights = {value.untyped_storage().data_ptr() for value in probe.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    inputs = torch.zeros(_PROBED, 3, size, size, device=device)
    if uses_channels_last(config.loop.channels_last, probe):
        inputs = inputs.to(memory_format=torch.channels_last)
    dtype = autocast_dtype(config.loop)
    with (
        # Dropout must not draw from the numbers that training will use.
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        logits = probe(inputs)
    del logits
    parameters = sum(value.numel() for value in probe.parameters())
    activations = sum(kept.values()) * config.loop.batch_size // _PROBED
    return int(parameters * _BYTES_A_WEIGHT + activations * _SPARE)


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
    optimiser = build_optimiser(model, config.optimiser)
    step = TrainStep(model, model, optimiser, config.loop, loss, clip_norm=config.optimiser.clip_norm, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        # Reading the loss waits for the device.
        float(step([(inputs, truth)], count, 0.0))
        times.append(time.perf_counter() - began)
    return min(times) * shape[0] * config.loop.accumulate / count


def memory_warnings(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> list[str]:
    """Return a warning if a batch will probably not fit into the machine's memory; a GPU reports that by itself."""
    free = available_memory() if device.type == "cpu" else None
    if free is None:
        return []
    needed = training_bytes(config, model, _input_side(config, size), device)
    if needed <= free:
        return []
    return [
        f"WARNING: a batch of {config.loop.batch_size} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
        "are free: the system may end this run; lower loop.batch_size and raise loop.accumulate by the same factor"
    ]


def room_for_photos(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> int:
    """Bytes of a GPU's free memory that training will not need; 0 on a CPU, which reads the cache as it is."""
    if device.type != "cuda":
        return 0
    needed = training_bytes(config, model, _input_side(config, size), device)
    torch.cuda.empty_cache()
    return max(0, torch.cuda.mem_get_info(device)[0] - needed)
