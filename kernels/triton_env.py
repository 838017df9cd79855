"""Triton's execution mode, compiled or interpreted, and the tilings to choose from.

`TRITON_INTERPRET=1` must be set before Triton is imported; kernels then run on the CPU in NumPy, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import triton

__all__ = ["INTERPRETED", "tilings"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tilings(name: str, choices: Sequence[tuple[int, int]]) -> list[triton.Config]:
    """Return configs for `triton.autotune` from pairs (value of the constant `name`, warps).

    In interpreted mode there is nothing to tune, and comparing configs would need a driver, so only the last config is
    returned: it is the largest and takes the fewest steps.
    """
    configs = [triton.Config({name: value}, num_warps=warps, num_stages=1) for value, warps in choices]
    return configs[-1:] if INTERPRETED else configs
