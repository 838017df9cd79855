"""Ceilings that are measured in the same run: matrix products and copies."""

from __future__ import annotations

import torch

from bench.harness import Clock, Limit

__all__ = ["copy_limit", "matmul_limit"]

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def matmul_limit(precision: str, flops: float, *, device: str = "cpu", side: int = 2048) -> Limit:
    """What so many operations take as a product of square matrices, the best of some.

    Args:
        precision: fp32, bf16 or int8.
        flops: of the job; a product and a sum are two.
        device: where.
        side: of the matrices.
    """
    left, right = (torch.randint(-99, 99, (side, side), device=device).to(KINDS[precision]) for _ in range(2))
    multiply = torch._int_mm if precision == "int8" else torch.matmul
    clock = Clock(device)
    best = min(clock.time(lambda: multiply(left, right))[0] for _ in range(12))
    return Limit(f"matrix products in {precision}", best * flops / (2 * side**3))


def copy_limit(count: int, *, device: str = "cpu", size: int = 32 << 20) -> Limit:
    """What it takes to read and write so many bytes, half of them each, the best of some copies.

    Args:
        count: bytes of the job.
        device: where.
        size: of a copy in bytes.
    """
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    clock = Clock(device)
    best = min(clock.time(lambda: target.copy_(source))[0] for _ in range(12))
    return Limit("copying as many bytes", best * count / (2 * size))
