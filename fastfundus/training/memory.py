"""Memory that training needs, measured on a forward pass of two photos."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastfundus.config import TrainConfig
from fastfundus.machine import available_memory
from fastfundus.models.classifier import set_training, uses_channels_last
from fastfundus.training.precision import autocast_dtype

__all__ = ["free_gpu_bytes", "input_side", "memory_warnings", "training_bytes"]

_PROBED = 2
"""Number of photos on which activations are counted."""
_BYTES_PER_WEIGHT = 20
"""Weights, gradients, AdamW's two moments and the averaged weights, in float32."""
_SPARE = 1.25
"""Factor for workspaces of convolutions and fragmentation of the allocator."""


def input_side(config: TrainConfig, size: int) -> int:
    """Return the side of the model's inputs in pixels, for a cache of photos of `size`."""
    return config.loop.tile if config.task == "vessels" else size


def training_bytes(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> int:
    """Return the memory that training needs with one batch, from what a forward pass keeps for the backward pass.

    Activations that torch.compile recomputes are counted too, so that this is an upper estimate.

    Args:
        config: configuration of the run, with a resolved precision.
        model: the model.
        size: side of the inputs in pixels.
        device: device of the model.
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
        # Dropout must not advance the random numbers of training.
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        logits = probe(inputs)
    del logits
    parameters = sum(value.numel() for value in probe.parameters())
    activations = sum(kept.values()) * config.loop.batch_size // _PROBED
    return int(parameters * _BYTES_PER_WEIGHT + activations * _SPARE)


def memory_warnings(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> list[str]:
    """Return a warning if a batch will probably not fit into the machine's memory; a GPU reports that by itself."""
    free = available_memory() if device.type == "cpu" else None
    if free is None:
        return []
    needed = training_bytes(config, model, input_side(config, size), device)
    if needed <= free:
        return []
    return [
        f"WARNING: a batch of {config.loop.batch_size} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
        "are free: the system may end this run; lower loop.batch_size and raise loop.accumulate by the same factor"
    ]


def free_gpu_bytes(config: TrainConfig, model: nn.Module, size: int, device: torch.device) -> int:
    """Return the bytes of free GPU memory that training will not need; 0 on a CPU, which reads the cache directly."""
    if device.type != "cuda":
        return 0
    needed = training_bytes(config, model, input_side(config, size), device)
    torch.cuda.empty_cache()
    return max(0, torch.cuda.mem_get_info(device)[0] - needed)
