"""Batched prediction on photos of a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import fixed_transforms
from fastfundus.training.distributed import World
from fastfundus.training.loader import PhotoLoader, prefetch

if TYPE_CHECKING:
    from fastfundus.data.store import PhotoArray

__all__ = ["forward_batches", "predict_logits"]


@torch.inference_mode()
def forward_batches(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    size: int,
    batch_size: int,
    dtype: torch.dtype | None,
) -> Iterator[Tensor]:
    """Yield the model's output for each batch of photos, float32 on the device of the model.

    Args:
        model: takes [N, 3, size, size]; it is set to evaluation mode.
        photos: uint8 [*, S, S, 3], the cache.
        rows: rows of the photos.
        spec: preprocessing of the cache.
        size: side of the inputs in pixels; if it exceeds S, black is added at the right and bottom.
        batch_size: number of photos per forward pass.
        dtype: type to autocast to; None computes in float32, without TF32.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loader = PhotoLoader(photos, rows, device)

    def begin(batch: NDArray[np.int64]) -> Callable[[], Tensor]:
        return loader.begin(batch, fixed_transforms(spec, len(batch)), size)

    # A thread reads and copies the next batch while the model computes this one, as in training.
    for finish in prefetch(begin, [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]):
        inputs = finish()
        with torch.autocast(inputs.device.type, dtype, enabled=dtype is not None), _without_tf32(dtype is None):
            output = model(inputs)
        yield output.float()


def inference_device() -> torch.device:
    """Return the device for evaluation: a GPU if there is one, which saves minutes for thousands of photos."""
    return World().device()


@contextmanager
def _without_tf32(exact: bool) -> Iterator[None]:
    """Compute convolutions in float32 where float32 was asked for: cuDNN rounds their inputs to 10 bits by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if exact:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def predict_logits(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Return the logits of photos of a cache.

    Args:
        model: maps [N, 3, S, S] to [N, L]; it is set to evaluation mode.
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] rows of the photos.
        spec: preprocessing of the cache.
        dtype: type to autocast to; None computes in float32.
        batch_size: number of photos per forward pass.

    Returns:
        float32 [N, L].
    """
    outputs = forward_batches(
        model, photos, rows, spec, size=spec.size, batch_size=batch_size, dtype=dtype
    )  # fmt: skip
    parts = [logits.cpu().numpy() for logits in outputs]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
