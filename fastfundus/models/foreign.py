"""Reader for third-party weights: safetensors, state dicts and whole pickled networks; never runs code from them."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fastfundus.errors import CheckpointError

__all__ = ["read_foreign", "resample_positions"]

_NESTED = ("state_dict", "model_state_dict", "model", "model_ema", "teacher", "net")
"""Keys under which training programs store the weights, in the order in which they are tried."""
_DEEPEST = 16
_INERT_MODULES = (
    nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Sequential,
    nn.Dropout, nn.Identity, nn.Flatten, nn.parallel.DataParallel,
)  # fmt: skip


def read_foreign(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read every tensor of a file with weights.

    Pickles are read with torch's restricted unpickler, which accepts plain data and tensors. A whole pickled network is
    accepted as well if it consists only of torchvision's ResNet, DataParallel and layers of torch.nn; any other object
    is refused.

    Args:
        path: a .safetensors file, or a file written by `torch.save`.

    Returns:
        Tensors by name, without the prefix "module.", and a description of the file.

    Raises:
        CheckpointError: the file is missing or damaged, contains other objects, or contains no tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file, or a file written by torch.save")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), "safetensors"
        except Exception as error:
            # safetensors raises an error type of its Rust library; any error means that the file is not valid.
            raise CheckpointError(f"{path} is not a valid safetensors file ({error}); copy it again") from None
    from torchvision.models import resnet

    allowed = [*_INERT_MODULES, resnet.ResNet, resnet.Bottleneck, resnet.BasicBlock, collections.OrderedDict]
    try:
        with torch.serialization.safe_globals(allowed):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler raises many types of errors for files in other formats, in every case without running any code.
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = (lines or str(error).splitlines() or [type(error).__name__])[0].strip()
        raise CheckpointError(
            f"{path}: cannot be read as weights ({reason[:200]}). Only tensors, plain data and torchvision's ResNets "
            "are accepted, because other pickled objects could run code"
        ) from None
    return _tensors_of(loaded, path)


def _tensors_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    what = "a state dict"
    if isinstance(loaded, nn.Module):
        what = f"a pickled {type(loaded).__name__}"
        loaded = _taken_apart(loaded)
    while isinstance(loaded, dict):
        inner = next((key for key in _NESTED if isinstance(loaded.get(key), dict | nn.Module)), None)
        if inner is None:
            break
        what = f"a checkpoint with {inner!r}"
        loaded = _taken_apart(loaded[inner]) if isinstance(loaded[inner], nn.Module) else loaded[inner]
    tensors = {}
    if isinstance(loaded, dict):
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors; is it a checkpoint with weights?")
    return {key.removeprefix("module."): value for key, value in tensors.items()}, what


def _taken_apart(module: nn.Module, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a pickled network by name, without calling its methods: the file may have replaced them."""
    if depth > _DEEPEST:
        raise CheckpointError(f"a pickled network is nested more than {_DEEPEST} levels deep; the file is not valid")
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in vars(module).get(kind, {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value.detach()
    for name, inner in vars(module).get("_modules", {}).items():
        if isinstance(inner, nn.Module):
            found |= _taken_apart(inner, f"{prefix}{name}.", depth + 1)
    return found


def resample_positions(value: Tensor, length: int, source: str) -> Tensor:
    """Resample position embeddings to another square grid of patches; keep those of the tokens before the grid.

    Args:
        value: [1, T, C], T tokens.
        length: number of tokens wanted.
        source: name of their file, for the error.

    Returns:
        float32 [1, length, C].

    Raises:
        CheckpointError: the number of tokens before the grid differs.

    Source: bicubic with antialiasing, as in timm's `resample_abs_pos_embed`.
    """
    old, new = (int(count**0.5) for count in (value.shape[1], length))
    extra = value.shape[1] - old * old
    if length - new * new != extra:
        raise CheckpointError(
            f"{source}: its {value.shape[1]} position embeddings cannot be resampled to {length}: the number of tokens "
            "before the grid differs"
        )
    grid = value[:, extra:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([value[:, :extra].float(), grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)
