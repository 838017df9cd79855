"""torch.compile: whether and how a model is compiled for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from fastfundus.config import LoopConfig
from fastfundus.errors import ConfigError
from fastfundus.training.distributed import World

__all__ = ["CompileMode", "compile_mode", "compile_model"]

CompileMode = Literal["off", "on", "graphs"]
_MAX_SHAPES = 64


def compile_mode(loop: LoopConfig, device: torch.device, world: World, say: Callable[[str], None]) -> CompileMode:
    """Resolve `loop.compile` for a device.

    Args:
        loop: as configured.
        device: where the model trains.
        world: the processes that train together.
        say: receives one line that explains the choice.

    Raises:
        ConfigError: CUDA graphs are asked for where they cannot be used: on a CPU, with accumulated gradients, or with
            several processes.
    """
    if loop.compile == "graphs" and device.type == "cpu":
        raise ConfigError('loop.compile is "graphs", which needs a GPU; use "on", "off" or "auto"')
    # The gradients lie in the memory of the graph: the next replay would overwrite what is accumulated or exchanged.
    if loop.compile == "graphs" and (loop.accumulate > 1 or world.size > 1):
        why = (
            f"loop.accumulate is {loop.accumulate}" if loop.accumulate > 1 else f"{world.size} processes train together"
        )
        raise ConfigError(f'loop.compile is "graphs", but {why}; use "on", "off" or "auto"')
    if loop.compile == "auto" and device.type == "cpu":
        say("torch.compile is off: on a CPU it costs a minute and gained nothing when measured; loop.compile=on")
        return "off"
    mode: CompileMode = "on" if loop.compile == "auto" else loop.compile
    if loop.compile == "auto" and world.size == 1 and loop.accumulate == 1:
        mode = "graphs"
    say(f"torch.compile is {'off by loop.compile' if mode == 'off' else 'on: the first step takes a minute'}")
    return mode


def compile_model(model: nn.Module, mode: CompileMode) -> Any:
    """Return the model, compiled unless `mode` is "off"."""
    if mode == "off":
        return model
    # One graph per photo size rather than one for all sizes. Sizes grow over the epochs, and the parts of a batch may
    # be uneven: with fullgraph, torch ends the run beyond its limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_SHAPES)
    how = "reduce-overhead" if mode == "graphs" else "default"
    return torch.compile(model, fullgraph=True, dynamic=False, mode=how)
