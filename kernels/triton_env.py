"""How Triton runs here: compiled or interpreted, and with how many tilings to choose from.

`TRITON_INTERPRET=1` must be set before Triton is imported; kernels then run on the CPU, slowly, as NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import triton

__all__ = ["INTERPRETED", "tilings"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tilings(name: str, choices: Sequence[tuple[int, int]]) -> list[triton.Config]:
    """Configs for `triton.autotune` of pairs (value of the constant `name`, warps).

    Interpreted, there is nothing to tune, and trying more than one would need a driver: the last alone remains, the
    largest, which takes the fewest steps.
    """
    configs = [triton.Config({name: value}, num_warps=warps, num_stages=1) for value, warps in choices]
    return configs[-1:] if INTERPRETED else configs
