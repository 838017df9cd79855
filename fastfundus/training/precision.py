"""Training precision, chosen by what the device computes natively.

A processor or GPU without bfloat16 units emulates it: results are the same, but training takes several times as long
as in float32. The choice is made by capability rather than by trial, so that equal devices always choose alike.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfundus.config import LoopConfig
from fastfundus.machine import cpu_computes_bfloat16

__all__ = [
    "autocast_dtype",
    "depthwise_in_float32",
    "describe_precision",
    "native_dtypes",
    "resolve_precision",
]

HalfType = Literal["bfloat16", "float16"]


def native_dtypes(device: torch.device) -> tuple[HalfType, ...]:
    """Return the 16-bit types that a device computes faster than float32, the preferred one first.

    bfloat16: GPUs of compute capability 8.0 or higher; processors with AVX-512 BF16 or AMX, or Arm's BF16.
    float16: GPUs of compute capability 7.0 or higher.
    """
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return ("bfloat16", "float16") if major >= 8 else ("float16",) if major >= 7 else ()
    if device.type != "cpu":
        return ()
    return ("bfloat16",) if cpu_computes_bfloat16() else ()


def resolve_precision(loop: LoopConfig, device: torch.device) -> tuple[LoopConfig, str]:
    """Replace the automatic parts of `loop.amp` and `loop.amp_dtype` by what this device computes fastest.

    Args:
        loop: as configured; a setting that is already definite is kept.
        device: where the model will train.

    Returns:
        The settings with `amp` True or False and, with AMP, a definite `amp_dtype`; and one line that explains them.
    """
    native = native_dtypes(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    if loop.amp == "auto":
        chosen = loop.amp_dtype if loop.amp_dtype != "auto" else native[0] if native else None
        if chosen in native:
            assert chosen is not None
            return replace(loop, amp=True, amp_dtype=chosen), f"{chosen} AMP, which {where} computes natively"
        lacking = chosen or "16-bit types"
        return replace(loop, amp=False), f"float32: {where} has no fast {lacking} (loop.amp=true forces AMP)"
    if not loop.amp:
        return loop, "float32"
    if loop.amp_dtype == "auto":
        loop = replace(loop, amp_dtype=native[0] if native else "bfloat16")
    emulated = loop.amp_dtype not in native
    slow = f", which {where} only emulates, several times slower than float32" if emulated else ""
    return loop, describe_precision(loop) + slow


def autocast_dtype(loop: LoopConfig) -> torch.dtype | None:
    """Return the type to autocast to, None for float32, from settings that `resolve_precision` returned."""
    if loop.amp == "auto" or (loop.amp and loop.amp_dtype == "auto"):
        raise ValueError("loop.amp is not resolved: call resolve_precision first")
    return getattr(torch, loop.amp_dtype) if loop.amp else None


def describe_precision(loop: LoopConfig) -> str:
    """Return resolved settings in words, such as "bfloat16 AMP"."""
    return f"{loop.amp_dtype} AMP" if loop.amp else "float32"


def depthwise_in_float32(model: nn.Module) -> None:
    """Make depthwise convolutions compute in float32 under CPU autocast.

    oneDNN's gradient of a depthwise convolution in bfloat16 takes more than twice as long as in float32: networks built
    of them (EfficientNet, MobileNet, ConvNeXt) trained more slowly with AMP than without it. Parameters, names and
    results without autocast stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.forward = MethodType(_float32_forward, module)  # type: ignore[method-assign]


def _float32_forward(module: Any, inputs: Tensor) -> Tensor:
    forward = type(module).forward
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward(module, inputs)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return forward(module, inputs.float()).to(dtype)
