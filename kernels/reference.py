"""What `sample` means, in plain PyTorch: the specification that every other implementation is compared with.

Conventions
-----------
Pixel (row i, column j) covers [j, j+1] x [i, i+1]; its centre lies at (j + 0.5, i + 0.5).
`geometry[n]` maps a position of the output, in output pixels, to a position of source n, in source pixels:

    source_x = g00 * x + g01 * y + g02        source_y = g10 * x + g11 * y + g12

The output pixel in row i and column j is taken at x = j + 0.5, y = i + 0.5. The identity copies the source.

Bilinear: the four pixels whose centres surround the position, weighted by area; what lies outside the source is black
(0), so values fade to black over the last half pixel. Nearest: the pixel that covers the position, black outside.

Minification: let s = the larger length of the columns (g00, g10) and (g01, g11), the source pixels that one output
step spans. Where k = ceil(s) > 1, an output pixel is the mean of k x k bilinear samples spread evenly over its square.
Nearest does not average.

`colour[n]` then maps RGB in grey levels (0 to 255) to the output: out = colour[:, :3] @ rgb + colour[:, 3]. Nothing is
clamped: black outside the source becomes colour[:, 3]. Arithmetic is float32; the last step rounds to the output type.

Worked example: a 1 x 2 source of grey levels 10 and 30, identity geometry and colour, out_size 1: position (0.5, 0.5)
is the centre of the first pixel, so the output is 10. With g02 = 0.5 the position is (1.0, 0.5), halfway: 20.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample", "taps"]


def taps(geometry: Tensor) -> Tensor:
    """Samples per output pixel and axis, from geometry [N, 2, 3]: int64 [N], at least 1."""
    steps = torch.linalg.vector_norm(geometry[:, :, :2].float(), dim=1).amax(dim=1)
    # A rotation's rounding must not turn one tap into four.
    return torch.ceil(steps - 1e-4).clamp(min=1).to(torch.int64)


def sample(
    images: Tensor, geometry: Tensor, colour: Tensor, out_size: int, dtype: torch.dtype, nearest: bool = False
) -> Tensor:
    """Crop, turn, scale and recolour a batch; arguments and result as for `fastfundus.kernels.ops.sample`."""
    out = torch.empty(len(images), out_size, out_size, 3, dtype=torch.float32, device=images.device)
    for n, count in enumerate(taps(geometry).tolist()):
        count = 1 if nearest else count
        side = out_size * count
        centres = (torch.arange(side, dtype=torch.float32, device=images.device) + 0.5) / count
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        g = geometry[n].float()
        source_x = g[0, 0] * x + g[0, 1] * y + g[0, 2]
        source_y = g[1, 0] * x + g[1, 1] * y + g[1, 2]
        take = _nearest if nearest else _bilinear
        fine = take(images[n], source_x, source_y).view(out_size, count, out_size, count, 3)
        rgb = fine.mean(dim=(1, 3))
        matrix = colour[n].float()
        # Element by element, not as a matrix product: the sum's order and precision are part of the definition.
        out[n] = (
            rgb[..., 0:1] * matrix[:, 0] + rgb[..., 1:2] * matrix[:, 1] + rgb[..., 2:3] * matrix[:, 2] + matrix[:, 3]
        )
    return out.to(dtype).permute(0, 3, 1, 2)


def _fetch(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels at integer positions, float32 [..., 3], black outside."""
    height, width = image.shape[:2]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return image.reshape(-1, 3)[flat.reshape(-1)].float().view(*row.shape, 3) * inside[..., None]


def _bilinear(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    left, top = torch.floor(x - 0.5), torch.floor(y - 0.5)
    right_share, bottom_share = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]
    column, row = left.to(torch.int64), top.to(torch.int64)
    upper = _fetch(image, row, column) * (1 - right_share) + _fetch(image, row, column + 1) * right_share
    lower = _fetch(image, row + 1, column) * (1 - right_share) + _fetch(image, row + 1, column + 1) * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def _nearest(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return _fetch(image, torch.floor(y).to(torch.int64), torch.floor(x).to(torch.int64))
