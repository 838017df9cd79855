"""Reference implementation of the kernels in plain PyTorch; it defines what every other implementation must compute.

`sample`: conventions
---------------------
Pixel (row i, column j) covers [j, j+1] x [i, i+1]; its centre is at (j + 0.5, i + 0.5). Its three values are constant
over that area. Everything outside the photo is black (0).
`geometry[n]` maps a position in the output, in output pixels, to a position in source n, in source pixels:

    source_x = g00 * x + g01 * y + g02        source_y = g10 * x + g11 * y + g12

The output pixel in row i and column j is sampled at x = j + 0.5, y = i + 0.5. The identity copies the source.

Area: an output pixel is the mean of the source over an axis-aligned box centred on the sampled position:

    width = max(1, hypot(g00, g01))           height = max(1, hypot(g10, g11))

These are the extents of the ellipse onto which a disc with the diameter of one output pixel is mapped; an extent below
1 + 2^-12 counts as 1. A box of one pixel amounts to bilinear interpolation that fades to black over the last half
pixel. For geometries without rotation, a larger box gives the exact area average that OpenCV calls INTER_AREA, at any
position. Geometries with rotation keep the axis-aligned box: its area is correct, but it is not rotated.

Nearest, for masks: the pixel that covers the position; nothing is averaged.

`colour[n]` then maps RGB in grey levels (0 to 255) to the output: out = colour[:, :3] @ rgb + colour[:, 3]. Nothing is
clamped: black outside the source becomes colour[:, 3]. This implementation computes in float64; its last step rounds
to the output type, to nearest, ties to even. Other implementations compute in float32.

Worked example: a 1 x 2 source with grey levels 10 and 30, identity geometry and colour, and out_size 1. The position
(0.5, 0.5) is the centre of the first pixel, so the output is 10. With g02 = 0.5 the position is (1.0, 0.5), halfway
between the two pixels, and the output is 20. With g00 = 2 the box is 2 pixels wide and centred on (1.0, 0.5), and the
output is 20 as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfundus.kernels.jobs import MIN_MINIFICATION

__all__ = ["photos", "sample"]


def sample(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    geometry: Tensor,
    colour: Tensor,
    out_size: int,
    dtype: torch.dtype,
    nearest: bool = False,
) -> Tensor:
    """Crop, rotate, scale and recolour photos of any sizes; see `fastfundus.kernels.ops.sample_ragged`."""
    out = torch.empty(len(sizes), out_size, out_size, 3, dtype=dtype, device=pixels.device)
    centres = torch.arange(out_size, dtype=torch.float64, device=pixels.device) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    for n, image in enumerate(photos(pixels, offsets, sizes)):
        g, matrix = geometry[n].double().to(pixels.device), colour[n].double().to(pixels.device)
        source_x = g[0, 0] * x + g[0, 1] * y + g[0, 2]
        source_y = g[1, 0] * x + g[1, 1] * y + g[1, 2]
        if nearest:
            rgb = _fetch(image, torch.floor(source_y).long(), torch.floor(source_x).long())
        else:
            rgb = _mean_over_box(image, source_x, source_y, _extent(g[0]), _extent(g[1]))
        out[n] = (rgb @ matrix[:, :3].T + matrix[:, 3]).to(dtype)
    return out.permute(0, 3, 1, 2)


def photos(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> list[Tensor]:
    """Return views uint8 [H, W, 3] of the photos in a flat buffer."""
    return [
        pixels[offset : offset + 3 * height * width].view(height, width, 3)
        for offset, (height, width) in zip(offsets.tolist(), sizes.tolist(), strict=True)
    ]


def _extent(row: Tensor) -> float:
    """Return the width or height of the box from one row of the geometry."""
    length = float(torch.hypot(row[0], row[1]))
    return length if length >= MIN_MINIFICATION else 1.0


def _fetch(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the pixels at integer positions as float64 [..., 3], black outside the photo."""
    height, width = image.shape[:2]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return image.reshape(-1, 3)[flat.reshape(-1)].double().view(*row.shape, 3) * inside[..., None]


def _mean_over_box(image: Tensor, x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    total = torch.zeros(*x.shape, 3, dtype=torch.float64, device=image.device)
    left, top = x - width / 2, y - height / 2
    first_column, first_row = torch.floor(left).long(), torch.floor(top).long()
    # A box `width` pixels wide touches at most ceil(width) + 1 columns.
    for down in range(-int(-height // 1) + 1):
        row = first_row + down
        row_share = _overlap(top, height, row) / height
        for across in range(-int(-width // 1) + 1):
            column = first_column + across
            share = row_share * _overlap(left, width, column) / width
            total += share[..., None] * _fetch(image, row, column)
    return total


def _overlap(start: Tensor, length: float, at: Tensor) -> Tensor:
    """Return the length of pixel `at` that is inside the box, on one axis."""
    return (torch.minimum(start + length, at + 1.0) - torch.maximum(start, at.double())).clamp(min=0)
