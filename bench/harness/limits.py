"""Speed limits that are measured in the same run: matrix products and copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.comparison import Clock, Limit

__all__ = ["copy_limit", "matmul_limit"]

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


SECONDS = 0.5
"""Minimum duration of the measurement: the first dozens of products are slower."""


def matmul_limit(precision: str, flops: float, *, device: str = "cpu", side: int = 2048, quick: bool = False) -> Limit:
    """Return the time of `flops` operations at the rate of the fastest of many products of square matrices.

    Args:
        precision: fp32, bf16 or int8.
        flops: FLOPs of the job; a multiplication with an addition counts as two.
        device: device to measure.
        side: side of the matrices.
        quick: stop after a dozen products, for runs whose figures do not matter.
    """
    left, right = (torch.randint(-99, 99, (side, side), device=device).to(KINDS[precision]) for _ in range(2))
    multiply = torch._int_mm if precision == "int8" else torch.matmul
    best = _best_ms(lambda: multiply(left, right), device, 0.0 if quick else SECONDS)
    return Limit(f"matrix products in {precision}", best * flops / (2 * side**3))


def copy_limit(count: int, *, device: str = "cpu", size: int = 32 << 20) -> Limit:
    """Return the time to move `count` bytes, half read and half written, at the rate of the fastest of many copies.

    Args:
        count: bytes of the job.
        device: device to measure.
        size: bytes of the buffer that is copied.
    """
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = _best_ms(lambda: target.copy_(source), device, SECONDS)
    return Limit("copying as many bytes", best * count / (2 * size))


def _best_ms(job: Callable[[], Tensor], device: str, seconds: float) -> float:
    clock, began = Clock(device), time.monotonic()
    times: list[float] = []
    while len(times) < 12 or time.monotonic() - began < seconds:
        times.append(clock.time(job)[0])
    return min(times)
