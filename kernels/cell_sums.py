"""Sums of brightness over cells, in Triton: what profiles of rows and columns are made from. Meaning: `reference.py`.

Integers: the result does not depend on the order of summation, on any device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfundus.kernels.triton_env import tilings

__all__ = ["TILINGS", "cell_sums_kernel", "launch"]

TILINGS = ((64, 2), (64, 1), (128, 4))
"""Pixels of a row that a program reads at once, and warps."""


@triton.jit
def _cell_sums_kernel(pixels_pointer, offsets_pointer, sizes_pointer, output_pointer, bins, BLOCK: tl.constexpr):
    """Sum the brightest channel of every cell.

    Args:
        pixels_pointer: uint8, all photos, each [height, width, 3] from its offset on.
        offsets_pointer: int64 [N], first byte of each photo.
        sizes_pointer: int32 [N, 2], height and width.
        output_pointer: int64 [N, bins, bins].
        bins: cells an axis.
        BLOCK: pixels of a row that are read at once.

    One program covers one cell.
    """
    program = tl.program_id(0)
    cell = program % (bins * bins)
    photo = (program // (bins * bins)).to(tl.int64)
    height = tl.load(sizes_pointer + photo * 2).to(tl.int64)
    width = tl.load(sizes_pointer + photo * 2 + 1).to(tl.int64)
    cell_row, cell_column = cell // bins, cell % bins
    top, bottom = cell_row * height // bins, (cell_row + 1) * height // bins
    left, right = cell_column * width // bins, (cell_column + 1) * width // bins
    photo_pointer = pixels_pointer + tl.load(offsets_pointer + photo)
    # int32 holds 2^20 rows of 255; only the last sum needs more.
    sums = tl.zeros([BLOCK], tl.int32)
    for row in range(top, bottom):
        for start in range(left, right, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < right
            pixel = photo_pointer + 3 * (row * width + column)
            red = tl.load(pixel, mask=mask, other=0).to(tl.int32)
            green = tl.load(pixel + 1, mask=mask, other=0).to(tl.int32)
            blue = tl.load(pixel + 2, mask=mask, other=0).to(tl.int32)
            sums += tl.maximum(tl.maximum(red, green), blue)
    tl.store(output_pointer + photo * bins * bins + cell, tl.sum(sums.to(tl.int64), axis=0))


cell_sums_kernel = triton.autotune(configs=tilings("BLOCK", TILINGS), key=["bins"])(_cell_sums_kernel)


def launch(pixels: Tensor, offsets: Tensor, sizes: Tensor, bins: int) -> Tensor:
    """Run the kernel on the device that holds `pixels`: int64 [N, bins, bins]."""
    out = torch.empty(len(sizes), bins, bins, dtype=torch.int64, device=pixels.device)
    if len(sizes):
        places = (values.to(pixels.device, non_blocking=True) for values in (offsets, sizes))
        cell_sums_kernel[(len(sizes) * bins * bins,)](pixels, *places, out, bins)
    return out
