"""Grad-CAM: the last feature maps of a network, weighted by the gradient of a logit with respect to each map.

Source: Selvaraju et al., ICCV 2017. For vision transformers, the maps are the patch tokens before the last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastfundus.errors import ConfigError

__all__ = ["SplitNetwork", "grad_cam", "split"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SplitNetwork:
    """A network split in two after its last feature maps."""

    features: Tensor
    """Features at the split, for a batch of photos."""
    head: Function
    """Computes logits [N, L] from `features`."""
    as_maps: Function
    """Converts features, or gradients of them, to maps [N, C, h, w]."""


def split(network: Any, inputs: Tensor) -> SplitNetwork:
    """Run a network up to its last feature maps.

    Args:
        network: a timm model in evaluation mode.
        inputs: [N, 3, S, S], normalised.

    Raises:
        ConfigError: the network has no last feature maps and is not a vision transformer.
    """
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        raise ConfigError(f"{type(network).__name__}: cannot be split after its last features; explain it by occlusion")
    with torch.no_grad():
        if hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens") and hasattr(network, "norm"):
            return _split_tokens(network, inputs)
        features = network.forward_features(inputs)
    wide = getattr(network, "num_features", None)
    if features.ndim == 4 and features.shape[1] == wide:
        return SplitNetwork(features, network.forward_head, lambda maps: maps)
    if features.ndim == 4 and features.shape[3] == wide:
        return SplitNetwork(features, network.forward_head, lambda maps: maps.permute(0, 3, 1, 2))
    raise ConfigError(f"{type(network).__name__}: its last features are not maps; explain it by occlusion")


def _split_tokens(network: Any, inputs: Tensor) -> SplitNetwork:
    """Split before the last block: after it, only the token that the head reads receives a gradient."""
    last, kept = network.blocks[-1], []
    hook = last.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    try:
        network.forward_features(inputs)
    finally:
        hook.remove()
    height, width = network.patch_embed.grid_size
    prefix = network.num_prefix_tokens

    def as_maps(tokens: Tensor) -> Tensor:
        return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, height, width)

    return SplitNetwork(kept[0], lambda tokens: network.forward_head(network.norm(last(tokens))), as_maps)


def grad_cam(features: Tensor, head: Function, as_maps: Function = lambda maps: maps) -> Tensor:
    """Compute a heat map for each output.

    Args:
        features: input of `head` for N photos.
        head: computes logits [N, L], independently for each photo.
        as_maps: converts `features`, and gradients of them, to [N, C, h, w].

    Returns:
        [N, L, h, w], non-negative, in units of the logit.
    """
    logits, pull = cast(tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], torch.func.vjp(head, features))
    maps, heat = as_maps(features), []
    # One label at a time, because exporters cannot trace a vmap over directions.
    for direction in torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device):
        weights = as_maps(pull(direction.expand_as(logits))[0]).mean((-2, -1))
        heat.append(torch.relu((weights[:, :, None, None] * maps).sum(1)))
    return torch.stack(heat, dim=1)
