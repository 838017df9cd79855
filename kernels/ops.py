"""`sample` as a torch operator: schema, shape function, and an implementation in torch operators for any device.

The operator is opaque to torch.compile and works under `fullgraph=True`. Its input is uint8 and its matrices are drawn
on the host, so it has no gradient and needs none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastfundus.kernels import reference

__all__ = ["sample"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample(
    images: Tensor,
    geometry: Tensor,
    colour: Tensor,
    out_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    nearest: bool = False,
) -> Tensor:
    """Crop, turn, scale, recolour and normalise a batch, reading each source pixel once.

    Args:
        images: [N, H, W, 3] uint8 RGB, contiguous; H and W at least 1.
        geometry: [N, 2, 3] float32, output pixels to source pixels; finite.
        colour: [N, 3, 4] float32, RGB in grey levels to output channels; finite.
        out_size: side of the output in pixels, at least 1.
        dtype: float32, float16 or bfloat16.
        nearest: take the nearest pixel, for masks, instead of bilinear with area-correct minification.

    Returns:
        [N, 3, out_size, out_size] of `dtype`, channels-last.

    Raises:
        ValueError: an argument breaks the lines above; the message names it, its value and what is allowed.

    Error: within 2e-2 grey levels of `reference.sample` in float32 before the colour matrix.
    Source: conventions in `fastfundus/kernels/reference.py`.
    """
    _check(images, geometry, colour, out_size, dtype)
    result: Tensor = _sample(images, geometry, colour, out_size, dtype, nearest)
    return result


def _check(images: Tensor, geometry: Tensor, colour: Tensor, out_size: int, dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if min(images.shape[1:3]) < 1:
        raise ValueError(f"images must have at least one pixel, got {list(images.shape)}")
    if not images.is_contiguous():
        raise ValueError(f"images must be contiguous, got strides {images.stride()}; call .contiguous()")
    for name, value, shape in [("geometry", geometry, (2, 3)), ("colour", colour, (3, 4))]:
        if value.dtype != torch.float32 or tuple(value.shape) != (len(images), *shape):
            wanted = [len(images), *shape]
            raise ValueError(f"{name} must be float32 {wanted}, got {value.dtype} {list(value.shape)}")
        if value.device != images.device:
            raise ValueError(f"{name} must be on {images.device} like images, got {value.device}")
        # Under torch.compile values are not known, and reading them on a GPU would wait for it.
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if out_size < 1:
        raise ValueError(f"out_size must be at least 1 pixel, got {out_size}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")


@torch.library.custom_op("fastfundus::sample", mutates_args=())
def _sample(
    images: Tensor, geometry: Tensor, colour: Tensor, out_size: int, dtype: torch.dtype, nearest: bool
) -> Tensor:
    """grid_sample does the reading, one group of equal minification at a time."""
    out = torch.empty(len(images), out_size, out_size, 3, dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    if nearest:
        # grid_sample's nearest rounds halves to even; the reference takes the pixel that covers the position.
        out.copy_(reference.sample(images, geometry, colour, out_size, dtype, nearest=True))
        return out
    counts = reference.taps(geometry)
    for count in sorted(set(counts.tolist())):
        chosen = torch.nonzero(counts == count).flatten()
        out[chosen] = _sample_group(images[chosen], geometry[chosen], colour[chosen], out_size, count, dtype)
    return out


def _sample_group(
    images: Tensor, geometry: Tensor, colour: Tensor, out_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    height, width = images.shape[1:3]
    # Source pixels to grid_sample's coordinates: -1 and 1 are the outer edges (align_corners=False).
    to_grid = torch.tensor([[2.0 / width], [2.0 / height]], device=images.device)
    theta = geometry * to_grid
    theta[:, :, 2] -= 1
    centres = (torch.arange(out_size * count, dtype=torch.float32, device=images.device) + 0.5) / count
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    positions = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)
    grid = torch.matmul(positions, theta.transpose(1, 2)).view(len(images), out_size * count, out_size * count, 2)
    planes = images.permute(0, 3, 1, 2).float()
    rgb = functional.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if count > 1:
        rgb = functional.avg_pool2d(rgb, count)
    flat = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], rgb.flatten(2))
    return flat.view(rgb.shape).to(dtype)


@_sample.register_fake
def _(images: Tensor, geometry: Tensor, colour: Tensor, out_size: int, dtype: torch.dtype, nearest: bool) -> Tensor:
    size = (images.shape[0], out_size, out_size, 3)
    return images.new_empty(size, dtype=dtype).permute(0, 3, 1, 2)
