"""Triton implementation of `sample`: crop, rotate, minify, recolour and convert photos of any sizes in one pass.

`reference.py` defines the result and the conventions. The offset, size and matrices of a photo are packed as a job of
88 bytes (`jobs.py`), which the kernel reads as eleven int64, or twenty-two int32 or float32 values. Its parameters:

    pixels_pointer   uint8, all photos, each [height, width, 3], starting at the offset in its job
    longs_pointer    int64 [N, 11], the jobs; value 0 is the offset
    words_pointer    int32 [N, 22], the same bytes; values 2 and 3 are height and width
    floats_pointer   float32 [N, 22], the same bytes; 4 to 9 are the geometry, 10 to 21 the colour matrix, by rows
    output_pointer   [N, out_size, out_size, 3], float32, float16 or bfloat16, contiguous
    out_size         side of the output in pixels
    MODE             0 interpolates, 1 integrates over a box, 2 samples the nearest pixel
    COLUMNS          the smallest power of two that is at least `out_size`
    BLOCK            output pixels per program
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.kernels.jobs import INTEGRATE, MIN_MINIFICATION, NEAREST
from fastfundus.kernels.triton_env import tilings

__all__ = ["TILINGS", "launch", "sample_kernel"]

TILINGS = ((256, 4), (512, 4), (1024, 4))
"""Output pixels per program, and warps. Each thread handles two, four or eight pixels, which share its fixed costs."""
_NEAREST = tl.constexpr(NEAREST)
_INTEGRATE = tl.constexpr(INTEGRATE)
_MIN_MINIFICATION = tl.constexpr(MIN_MINIFICATION)


@triton.jit
def _extent(along_x, along_y):
    """Return the width or height of the box from one row of the geometry."""
    length = tl.sqrt(along_x * along_x + along_y * along_y)
    return tl.where(length < _MIN_MINIFICATION, 1.0, length)


@triton.jit
def _overlap(start, length, at):
    """Return the length of pixel `at` that is inside the box, on one axis."""
    place = at.to(tl.float32)
    return tl.maximum(tl.minimum(start + length, place + 1.0) - tl.maximum(start, place), 0.0)


@triton.jit
def _held(at, size, share):
    """Clamp `at` to an axis of `size` pixels and return it with `share`, or with zero beyond the edge (black).

    A weight of zero takes one comparison per axis; masks would take four comparisons per pixel.
    """
    place = tl.minimum(tl.maximum(at, 0), size - 1)
    return place, tl.where(place == at, share, 0.0)


@triton.jit
def _fetch(photo_pointer, offset):
    """Load the three channels of the pixel at a byte offset in the photo, as float32."""
    place = photo_pointer + offset
    red = tl.load(place).to(tl.float32)
    green = tl.load(place + 1).to(tl.float32)
    blue = tl.load(place + 2).to(tl.float32)
    return red, green, blue


@triton.jit
def _interpolate(photo_pointer, x, y, height, width, line):
    """Return the three channels at a position, interpolated bilinearly between four pixels."""
    left, top = tl.floor(x - 0.5), tl.floor(y - 0.5)
    right_share, lower_share = x - 0.5 - left, y - 0.5 - top
    first_column, first_row = left.to(tl.int32), top.to(tl.int32)
    column, left_share = _held(first_column, width, 1 - right_share)
    next_column, right_share = _held(first_column + 1, width, right_share)
    row, upper_share = _held(first_row, height, 1 - lower_share)
    next_row, lower_share = _held(first_row + 1, height, lower_share)
    row, next_row, column, next_column = row * line, next_row * line, 3 * column, 3 * next_column
    r0, g0, b0 = _fetch(photo_pointer, row + column)
    r1, g1, b1 = _fetch(photo_pointer, row + next_column)
    r2, g2, b2 = _fetch(photo_pointer, next_row + column)
    r3, g3, b3 = _fetch(photo_pointer, next_row + next_column)
    upper_left, upper_right = left_share * upper_share, right_share * upper_share
    lower_left, lower_right = left_share * lower_share, right_share * lower_share
    red = upper_left * r0 + upper_right * r1 + lower_left * r2 + lower_right * r3
    green = upper_left * g0 + upper_right * g1 + lower_left * g2 + lower_right * g3
    blue = upper_left * b0 + upper_right * b1 + lower_left * b2 + lower_right * b3
    return red, green, blue


@triton.jit
def _sample_kernel(
    pixels_pointer, longs_pointer, words_pointer, floats_pointer, output_pointer, out_size,
    MODE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sample every photo of a batch; the module's docstring describes the parameters.

    One program covers BLOCK pixels of one output: part of a row, or several rows. This needs no division by `out_size`.
    """
    WIDE: tl.constexpr = BLOCK if BLOCK < COLUMNS else COLUMNS
    HIGH: tl.constexpr = BLOCK // WIDE
    # Photos are on the first axis of the grid, the only one that may exceed 65,535.
    photo = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    out_column = tl.program_id(1) * WIDE + place % WIDE
    out_row = tl.program_id(2) * HIGH + place // WIDE

    # int64, because batches exceed 2^31 bytes. Within a photo int32 is sufficient; jobs.py enforces this.
    photo_pointer = pixels_pointer + tl.load(longs_pointer + photo * 11)
    height = tl.load(words_pointer + photo * 22 + 2)
    width = tl.load(words_pointer + photo * 22 + 3)
    line = 3 * width
    geometry = floats_pointer + photo * 22 + 4
    g00, g01, g02 = tl.load(geometry), tl.load(geometry + 1), tl.load(geometry + 2)
    g10, g11, g12 = tl.load(geometry + 3), tl.load(geometry + 4), tl.load(geometry + 5)

    # Positions beyond the output's edge recompute its last pixels; their results are not written.
    along_x = tl.minimum(out_column, out_size - 1).to(tl.float32) + 0.5
    along_y = tl.minimum(out_row, out_size - 1).to(tl.float32) + 0.5
    x = g00 * along_x + g01 * along_y + g02
    y = g10 * along_x + g11 * along_y + g12

    if MODE == _NEAREST:
        row, share = _held(tl.floor(y).to(tl.int32), height, 1.0)
        column, share = _held(tl.floor(x).to(tl.int32), width, share)
        red, green, blue = _fetch(photo_pointer, row * line + 3 * column)
        red, green, blue = share * red, share * green, share * blue
    elif MODE == _INTEGRATE:
        box_width, box_height = _extent(g00, g01), _extent(g10, g11)
        left, top = x - 0.5 * box_width, y - 0.5 * box_height
        first_column, first_row = tl.floor(left).to(tl.int32), tl.floor(top).to(tl.int32)
        red = tl.zeros([BLOCK], tl.float32)
        green = tl.zeros([BLOCK], tl.float32)
        blue = tl.zeros([BLOCK], tl.float32)
        for step_down in range(tl.ceil(box_height).to(tl.int32) + 1):
            at = first_row + step_down
            row, row_share = _held(at, height, _overlap(top, box_height, at))
            for step in range(tl.ceil(box_width).to(tl.int32) + 1):
                at = first_column + step
                column, share = _held(at, width, row_share * _overlap(left, box_width, at))
                r, g, b = _fetch(photo_pointer, row * line + 3 * column)
                red += share * r
                green += share * g
                blue += share * b
        area = 1.0 / (box_width * box_height)
        red, green, blue = red * area, green * area, blue * area
    else:
        red, green, blue = _interpolate(photo_pointer, x, y, height, width, line)

    colour = floats_pointer + photo * 22 + 10
    out0 = tl.load(colour) * red + tl.load(colour + 1) * green + tl.load(colour + 2) * blue + tl.load(colour + 3)
    out1 = tl.load(colour + 4) * red + tl.load(colour + 5) * green + tl.load(colour + 6) * blue + tl.load(colour + 7)
    out2 = tl.load(colour + 8) * red + tl.load(colour + 9) * green + tl.load(colour + 10) * blue + tl.load(colour + 11)

    # [BLOCK, 4] with the fourth value masked, so that adjacent threads write adjacent channels, not every third value.
    interleaved = tl.join(tl.join(out0, out2), tl.join(out1, out2)).reshape(BLOCK, 4)
    channel = tl.arange(0, 4)[None, :]
    photo_output = output_pointer + photo * out_size * out_size * 3
    place = 3 * (out_row * out_size + out_column)
    written = ((out_column < out_size) & (out_row < out_size))[:, None] & (channel < 3)
    tl.store(photo_output + (place[:, None] + channel), interleaved.to(output_pointer.dtype.element_ty), mask=written)


sample_kernel = triton.autotune(configs=tilings("BLOCK", TILINGS), key=["out_size", "MODE"])(_sample_kernel)


def launch(pixels: Tensor, jobs: NDArray[np.void], out_size: int, dtype: torch.dtype, mode: int) -> Tensor:
    """Run the kernel on the device of `pixels`; return [N, out_size, out_size, 3] of `dtype`, contiguous."""
    out = torch.empty(len(jobs), out_size, out_size, 3, dtype=dtype, device=pixels.device)
    if len(jobs):
        longs = torch.from_numpy(jobs.view(np.int64).reshape(-1, 11)).to(pixels.device, non_blocking=True)

        columns = triton.next_power_of_2(out_size)

        def grid(constants: dict[str, int]) -> tuple[int, int, int]:
            wide = min(constants["BLOCK"], columns)
            return len(jobs), triton.cdiv(out_size, wide), triton.cdiv(out_size, constants["BLOCK"] // wide)

        seen = longs, longs.view(torch.int32), longs.view(torch.float32)
        sample_kernel[grid](pixels, *seen, out, out_size, MODE=mode, COLUMNS=columns)
    return out
