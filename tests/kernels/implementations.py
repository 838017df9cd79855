"""Implementations available on this machine, by name; every kernel test is written once and run on each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastfundus.kernels import host, ops
from fastfundus.kernels import sample as triton_sample
from tests.kernels.cases import Batch
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT16_RELATIVE, INTERPRETED_BFLOAT16_RELATIVE

Sampler = Callable[[Batch, torch.dtype, bool], Tensor]
HAS_GPU = torch.cuda.is_available()


def sample_on_host(batch: Batch, dtype: torch.dtype, nearest: bool) -> Tensor:
    assert host.load().library is not None, host.load().reason
    return ops.sample_ragged(*batch.arguments, dtype, nearest=nearest)


def sample_triton(batch: Batch, dtype: torch.dtype, nearest: bool) -> Tensor:
    """Call the operator on a GPU, or the interpreted kernel through its launch code on host memory."""
    if HAS_GPU:
        return ops.sample_ragged(batch.pixels.cuda(), *batch.arguments[1:], dtype, nearest=nearest).cpu()
    jobs, mode = ops.packed(*batch.arguments, nearest)
    return triton_sample.launch(batch.pixels, jobs, batch.out_size, dtype, mode).permute(0, 3, 1, 2)


def rounding(sampler: Sampler, dtype: torch.dtype) -> float:
    """Return the maximum relative error of the final conversion to the output type."""
    if dtype == torch.bfloat16:
        interpreted = sampler is sample_triton and not HAS_GPU
        return INTERPRETED_BFLOAT16_RELATIVE if interpreted else BFLOAT16_RELATIVE
    return FLOAT16_RELATIVE if dtype == torch.float16 else 0.0


SAMPLERS: dict[str, Sampler] = {"host": sample_on_host, "triton": sample_triton}
