"""The kernel as a torch operator with a schema, a shape function and one implementation per device.

    fastfundus::sample    Triton on CUDA; csrc/sample_host.cpp on the CPU, or the reference without a C++ compiler

Pixels may be on any device. Offsets, sizes and matrices are always on the host, where they are created: their values
are checked before a launch, without waiting for the device, and a single copy transfers them. The operator is opaque
to torch.compile and works under `fullgraph=True`. Its input is uint8, so it has no gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.kernels import host, reference
from fastfundus.kernels.jobs import pack_jobs

__all__ = ["DTYPES", "packed", "sample", "sample_ragged"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample(
    images: Tensor,
    geometry: Tensor,
    colour: Tensor,
    out_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    nearest: bool = False,
) -> Tensor:
    """Crop, rotate, scale, recolour and normalise a batch of photos of equal size.

    Args:
        images: [N, H, W, 3] uint8 RGB, contiguous, on any device; H and W are at least 1.
        geometry: [N, 2, 3] float32 on the host, maps output pixels to source pixels; finite and invertible.
        colour: [N, 3, 4] float32 on the host, maps RGB in grey levels (0 to 255) to output channels; finite.
        out_size: side of the output in pixels, 1 to 16384.
        dtype: float32, float16 or bfloat16.
        nearest: sample the nearest pixel, as masks require, instead of averaging over the area of an output pixel.

    Returns:
        [N, 3, out_size, out_size] of `dtype`, channels-last, on the device of `images`.

    Raises:
        ValueError: an argument violates the requirements above; the message gives its name, its value and what is
            allowed.

    The error relative to `reference.sample`, before the colour matrix, is 4e-7 of the farthest position times 255 grey
    levels per pixel. `fastfundus/kernels/reference.py` defines the conventions.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if not images.is_contiguous():
        raise ValueError(f"images must be contiguous, got strides {images.stride()}; call .contiguous()")
    count, height, width = images.shape[:3]
    if min(height, width) < 1:
        raise ValueError(f"images must have at least one pixel, got {list(images.shape)}")
    offsets = torch.arange(count, dtype=torch.int64) * (3 * height * width)
    sizes = torch.tensor([[height, width]], dtype=torch.int32).repeat(count, 1)
    return sample_ragged(images.view(-1), offsets, sizes, geometry, colour, out_size, dtype, nearest=nearest)


def sample_ragged(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    geometry: Tensor,
    colour: Tensor,
    out_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    nearest: bool = False,
) -> Tensor:
    """Sample photos of different sizes in one batch; apart from the buffer, the arguments are those of `sample`.

    Args:
        pixels: [B] uint8, contiguous, on any device: a buffer with photos [H, W, 3] RGB at any positions.
        offsets: [N] int64 on the host, the first byte of each photo.
        sizes: [N, 2] int32 on the host, height and width of each photo; a photo has less than 2^31 bytes.
        geometry: [N, 2, 3] float32 on the host.
        colour: [N, 3, 4] float32 on the host.
        out_size: side of the output in pixels.
        dtype: float32, float16 or bfloat16.
        nearest: sample the nearest pixel.

    Returns:
        [N, 3, out_size, out_size] of `dtype`, channels-last, on the device of `pixels`.

    Raises:
        ValueError: an argument violates the requirements above; the message gives its name, its value and what is
            allowed.
    """
    _check_buffer(pixels, offsets, sizes)
    count = sizes.shape[0]
    _check_host("geometry", geometry, torch.float32, [count, 2, 3])
    _check_host("colour", colour, torch.float32, [count, 3, 4])
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    result: Tensor = _sample(pixels, offsets, sizes, geometry, colour, out_size, dtype, nearest)
    return result


def _check_buffer(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 1:
        raise ValueError(f"pixels must be uint8 [B], got {pixels.dtype} {list(pixels.shape)}")
    if not pixels.is_contiguous():
        raise ValueError(f"pixels must be contiguous, got stride {pixels.stride(0)}; call .contiguous()")
    _check_host("sizes", sizes, torch.int32, [sizes.shape[0] if sizes.ndim else 0, 2])
    _check_host("offsets", offsets, torch.int64, [sizes.shape[0]])


def _check_host(name: str, value: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if value.dtype != dtype or list(value.shape) != shape:
        raise ValueError(f"{name} must be {dtype} {shape}, got {value.dtype} {list(value.shape)}")
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be on the host, where it is checked, got {value.device}; call .cpu()")


def packed(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    geometry: Tensor,
    colour: Tensor,
    out_size: int,
    nearest: bool = False,
) -> tuple[NDArray[np.void], int]:
    """Check and pack a batch for a launch: call `jobs.pack_jobs` with the arguments of `sample_ragged`."""
    arrays = (value.contiguous().numpy() for value in (offsets, sizes, geometry, colour))
    return pack_jobs(*arrays, out_size=out_size, available=len(pixels), nearest=nearest)


# Values are checked inside the operator, because under torch.compile the functions above see only shapes.


@torch.library.custom_op("fastfundus::sample", mutates_args=(), device_types="cpu")
def _sample(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, geometry: Tensor, colour: Tensor, out_size: int,
    dtype: torch.dtype, nearest: bool,
) -> Tensor:  # fmt: skip
    jobs, mode = packed(pixels, offsets, sizes, geometry, colour, out_size, nearest)
    library = host.load().library
    if library is None:
        return reference.sample(pixels, offsets, sizes, geometry, colour, out_size, dtype, nearest)
    out = torch.empty(len(jobs), out_size, out_size, 3, dtype=dtype)
    job = library.sample(
        pixels.data_ptr(), jobs, out.data_ptr(), out_size, out.element_size(), DTYPES.index(dtype), mode
    )
    host.in_parallel(job, len(jobs), torch.get_num_threads())
    return out.permute(0, 3, 1, 2)


@_sample.register_kernel("cuda")
def _(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, geometry: Tensor, colour: Tensor, out_size: int,
    dtype: torch.dtype, nearest: bool,
) -> Tensor:  # fmt: skip
    from fastfundus.kernels import sample as triton_sample

    jobs, mode = packed(pixels, offsets, sizes, geometry, colour, out_size, nearest)
    # Triton launches on the current device, not on the device of its arguments.
    with torch.cuda.device(pixels.device):
        return triton_sample.launch(pixels, jobs, out_size, dtype, mode).permute(0, 3, 1, 2)


@_sample.register_fake
def _(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, geometry: Tensor, colour: Tensor, out_size: int,
    dtype: torch.dtype, nearest: bool,
) -> Tensor:  # fmt: skip
    return pixels.new_empty((sizes.shape[0], out_size, out_size, 3), dtype=dtype).permute(0, 3, 1, 2)
