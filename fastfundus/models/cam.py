"""Grad-CAM: the last maps of a network, weighted by how much each raises a logit.

Selvaraju et al., ICCV 2017. Of vision transformers the maps are the patches' tokens before the last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastfundus.errors import ConfigError

__all__ = ["Split", "grad_cam", "split"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Split:
    """A network cut in two behind its last maps."""

    features: Tensor
    """What lies at the cut, for some photos."""
    head: Function
    """From there to logits [N, L]."""
    as_maps: Function
    """What lies at the cut as maps [N, C, h, w]."""


def split(network: Any, inputs: Tensor) -> Split:
    """Run a network up to the cut.

    Args:
        network: of timm, in evaluation mode.
        inputs: [N, 3, S, S], normalised.

    Raises:
        ConfigError: it has no last maps, and is no vision transformer.
    """
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        raise ConfigError(f"{type(network).__name__}: has no last features; explain it by occlusion")
    with torch.no_grad():
        if hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens") and hasattr(network, "norm"):
            return _split_tokens(network, inputs)
        features = network.forward_features(inputs)
    wide = getattr(network, "num_features", None)
    if features.ndim == 4 and features.shape[1] == wide:
        return Split(features, network.forward_head, lambda maps: maps)
    if features.ndim == 4 and features.shape[3] == wide:
        return Split(features, network.forward_head, lambda maps: maps.permute(0, 3, 1, 2))
    raise ConfigError(f"{type(network).__name__}: its last features are no maps; explain it by occlusion")


def _split_tokens(network: Any, inputs: Tensor) -> Split:
    """Before the last block: behind it only the token that is read out still feels a gradient."""
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

    return Split(kept[0], lambda tokens: network.forward_head(network.norm(last(tokens))), as_maps)


def grad_cam(features: Tensor, head: Function, as_maps: Function = lambda maps: maps) -> Tensor:
    """Say where each output looks.

    Args:
        features: of N photos, what `head` takes.
        head: to logits [N, L], each photo by itself.
        as_maps: `features`, and gradients of them, as [N, C, h, w].

    Returns:
        [N, L, h, w], not negative, in units of the logit.
    """
    logits, pull = cast(tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], torch.func.vjp(head, features))
    maps, heat = as_maps(features), []
    # A label after the other: exporters follow no mapping over directions.
    for direction in torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device):
        weights = as_maps(pull(direction.expand_as(logits))[0]).mean((-2, -1))
        heat.append(torch.relu((weights[:, :, None, None] * maps).sum(1)))
    return torch.stack(heat, dim=1)
