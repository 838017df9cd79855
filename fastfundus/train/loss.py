"""What is minimised: plain functions of logits and truth, one a kind of head.

Every known label weighs the same, however batches fall: sums over a batch are divided by the photos in it and by
`known`, the known labels of an average training photo. So parts of a batch, in turn or on several devices, add up to
the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastfundus.models.activation import Activation

__all__ = ["LOSSES", "binary_loss", "class_loss", "grade_loss", "known_labels", "rarity_weight", "vessel_loss"]


def binary_loss(
    logits: Tensor,
    truth: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    weight: Tensor | float = 1.0,
    known: float | None = None,
) -> Tensor:
    """Cross-entropy of yes and no.

    Args:
        logits: [N, L] float32.
        truth: [N, L] float32, 0 to 1, or NaN: not known, and then without influence.
        smoothing: truth becomes smoothing / 2 and 1 - smoothing / 2; 0 to 0.5.
        gamma: focal loss: labels are weighted by |truth - p|^gamma, p the probability given to yes.
        weight: what a yes counts against a no, one for all or [L].
        known: known labels of an average photo; None says that all L are.

    Returns:
        A scalar.

    Source: focal loss, Lin et al., ICCV 2017, without its alpha, for blended truth as in Li et al., NeurIPS 2020; label
    smoothing, Szegedy et al., CVPR 2016.
    """
    is_known = ~truth.isnan()
    loss = _each(logits, torch.where(is_known, truth, 0.0), smoothing, gamma, weight)
    return torch.where(is_known, loss, 0.0).sum() / (len(logits) * (known or logits.shape[1]))


def _each(logits: Tensor, truth: Tensor, smoothing: float, gamma: float, weight: Tensor | float) -> Tensor:
    """Cross-entropy of yes and no of every element, as `binary_loss` says; all truth is known."""
    smooth = truth * (1 - smoothing) + smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
    if gamma > 0:
        # Of the hard truth: smoothing says how sure to become, not which answer is right.
        loss = loss * (truth - torch.sigmoid(logits)).abs() ** gamma
    return loss * (1 + (weight - 1) * truth)


def class_loss(
    logits: Tensor,
    truth: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    weight: Tensor | float = 1.0,
    known: float | None = None,
) -> Tensor:
    """Cross-entropy of classes of which one is true; as `binary_loss`, but truth sums to 1 and smoothing is shared out.

    The loss of focal gamma is weighted by (1 - p)^gamma, p the probability of the true class.
    """
    chances = functional.log_softmax(logits, dim=1)
    loss = -chances * (truth * (1 - smoothing) + smoothing / logits.shape[1])
    if gamma > 0:
        loss = loss * (1 - chances.exp()) ** gamma
    loss = loss * weight
    return loss.sum() / len(logits)


def grade_loss(
    logits: Tensor,
    truth: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    weight: Tensor | float = 1.0,
    known: float | None = None,
) -> Tensor:
    """Cross-entropy of "one grade further" among the photos that have come so far; as `binary_loss`.

    Args:
        logits: [N, L].
        truth: [N, L], 1 for each grade that is reached.
        smoothing: as there.
        gamma: as there.
        weight: as there.
        known: steps that an average photo says something about.

    Source: `fastfundus.models.activation.ACTIVATIONS`.
    """
    reached = torch.cat([torch.ones_like(truth[:, :1]), truth[:, :-1]], dim=1)
    # Of blended photos a share may have come so far: it counts for so much, and of it a share goes on.
    further = torch.where(reached > 0, truth / reached.clamp(min=1e-6), 0.0)
    loss = _each(logits, further, smoothing, gamma, weight) * reached
    return loss.sum() / (len(logits) * (known or logits.shape[1]))


LOSSES = {"sigmoid": binary_loss, "softmax": class_loss, "cumulative": grade_loss}
"""By kind of head."""


def vessel_loss(logits: Tensor, truth: Tensor, *, dice: float, weight: float = 1.0) -> Tensor:
    """Cross-entropy and soft Dice of a map, within the field.

    Args:
        logits: [N, 1, S, S] float32.
        truth: [N, 1, S, S] float32, 0 or 1; NaN outside the field.
        dice: share of the Dice loss.
        weight: what a vessel pixel counts against another one.

    Source: Milletari et al., V-Net, 3DV 2016: Dice of all tiles of the batch together, with squares below.
    """
    inside = ~truth.isnan()
    truth = torch.where(inside, truth, 0.0)
    entropy = _each(logits, truth, 0.0, 0.0, weight)
    pixels = inside.sum().clamp(min=1)
    chances = torch.where(inside, torch.sigmoid(logits), 0.0)
    overlap = 2 * (chances * truth).sum() / ((chances**2).sum() + (truth**2).sum()).clamp(min=1.0)
    return (1 - dice) * torch.where(inside, entropy, 0.0).sum() / pixels + dice * (1 - overlap)


def known_labels(truth: NDArray[np.float64], kind: Activation) -> float:
    """Labels that an average photo brings to the loss."""
    if kind == "cumulative":
        return float(1 + truth[:, :-1].sum() / len(truth))
    return float(np.isfinite(truth).sum() / len(truth))


def rarity_weight(truth: NDArray[np.float64], kind: Activation) -> NDArray[np.float32]:
    """[L] weights with which yes and no, or all classes, weigh the same; 1 where an output has no yes."""
    yes = np.nansum(truth, axis=0)
    if kind == "softmax":
        weight = len(truth) / (np.maximum(yes, 1) * max(1, (yes > 0).sum()))
    elif kind == "cumulative":
        come = np.r_[len(truth), yes[:-1]]
        weight = (come - yes) / np.maximum(yes, 1)
    else:
        weight = (truth == 0).sum(axis=0) / np.maximum(yes, 1)
    return np.where((yes > 0) & (weight > 0), weight, 1.0).astype(np.float32)
