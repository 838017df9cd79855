"""Training losses: plain functions of logits and ground truth, one per kind of head.

Every known label has the same weight, regardless of how batches are composed: sums over a batch are divided by the
number of its photos and by `known`, the number of known labels of an average training photo. The parts of a batch,
whether computed in turn or on several devices, therefore add up to the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastfundus.models.activation import Activation

__all__ = [
    "LOSSES",
    "binary_loss",
    "class_loss",
    "grade_loss",
    "known_labels",
    "prior_bias",
    "rarity_weight",
    "vessel_loss",
]


def binary_loss(
    logits: Tensor,
    truth: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    weight: Tensor | float = 1.0,
    known: float | None = None,
) -> Tensor:
    """Return the binary cross-entropy.

    Args:
        logits: [N, L] float32.
        truth: [N, L] float32 ground truth, 0 to 1, or NaN for unknown labels, which have no influence.
        smoothing: label smoothing, 0 to 0.5: targets 0 and 1 become smoothing / 2 and 1 - smoothing / 2.
        gamma: exponent of the focal loss: labels are weighted by |truth - p|^gamma, with p the predicted probability.
        weight: weight of a positive label relative to a negative one, for all outputs or [L].
        known: number of known labels of an average photo; None means all L.

    Returns:
        A scalar.

    Source: focal loss, Lin et al., ICCV 2017, without its alpha, for blended targets as in Li et al., NeurIPS 2020;
    label smoothing, Szegedy et al., CVPR 2016.
    """
    is_known = ~truth.isnan()
    loss = _each(logits, torch.where(is_known, truth, 0.0), smoothing, gamma, weight)
    return torch.where(is_known, loss, 0.0).sum() / (len(logits) * (known or logits.shape[1]))


def _each(logits: Tensor, truth: Tensor, smoothing: float, gamma: float, weight: Tensor | float) -> Tensor:
    """Return the binary cross-entropy of every element, see `binary_loss`; all labels must be known."""
    smooth = truth * (1 - smoothing) + smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
    if gamma > 0:
        # Relative to the unsmoothed target: smoothing limits the confidence, it does not change the right answer.
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
    """Return the cross-entropy of mutually exclusive classes.

    The arguments are those of `binary_loss`, but `truth` sums to 1 over the classes and smoothing is spread over all of
    them. The focal weight is (1 - p)^gamma, with p the probability of the true class.
    """
    log_probabilities = functional.log_softmax(logits, dim=1)
    loss = -log_probabilities * (truth * (1 - smoothing) + smoothing / logits.shape[1])
    if gamma > 0:
        loss = loss * (1 - log_probabilities.exp()) ** gamma
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
    """Return the binary cross-entropy of reaching the next grade, over the photos that reached the grade before.

    Args:
        logits: [N, L].
        truth: [N, L], 1 for each grade that is reached.
        smoothing: see `binary_loss`.
        gamma: see `binary_loss`.
        weight: see `binary_loss`.
        known: number of grade steps with a known outcome in an average photo.

    Source: `fastfundus.models.activation.ACTIVATIONS`.
    """
    reached = torch.cat([torch.ones_like(truth[:, :1]), truth[:, :-1]], dim=1)
    # A share of a blended photo may have reached a grade: it is the weight of the step, and a part of it goes further.
    further = torch.where(reached > 0, truth / reached.clamp(min=1e-6), 0.0)
    loss = _each(logits, further, smoothing, gamma, weight) * reached
    return loss.sum() / (len(logits) * (known or logits.shape[1]))


LOSSES = {"sigmoid": binary_loss, "softmax": class_loss, "cumulative": grade_loss}
"""Loss functions by kind of head."""


def vessel_loss(logits: Tensor, truth: Tensor, *, dice: float, weight: float = 1.0) -> Tensor:
    """Return the weighted sum of cross-entropy and soft Dice loss of a map, within the field.

    Args:
        logits: [N, 1, S, S] float32.
        truth: [N, 1, S, S] float32 ground truth, 0 or 1; NaN outside the field.
        dice: share of the Dice loss; the rest is cross-entropy.
        weight: weight of a vessel pixel relative to a background pixel in the cross-entropy.

    Source: Milletari et al., V-Net, 3DV 2016: Dice of all tiles of the batch together, with squares in the denominator.
    """
    inside = ~truth.isnan()
    truth = torch.where(inside, truth, 0.0)
    entropy = _each(logits, truth, 0.0, 0.0, weight)
    pixels = inside.sum().clamp(min=1)
    probabilities = torch.where(inside, torch.sigmoid(logits), 0.0)
    overlap = 2 * (probabilities * truth).sum() / ((probabilities**2).sum() + (truth**2).sum()).clamp(min=1.0)
    return (1 - dice) * torch.where(inside, entropy, 0.0).sum() / pixels + dice * (1 - overlap)


def known_labels(truth: NDArray[np.float64], kind: Activation) -> float:
    """Return the number of labels that an average photo contributes to the loss."""
    if kind == "cumulative":
        return float(1 + truth[:, :-1].sum() / len(truth))
    return float(np.isfinite(truth).sum() / len(truth))


_RARE = 0.1


def prior_bias(truth: NDArray[np.float64], kind: Activation) -> NDArray[np.float32]:
    """Return biases for which a head of zeros predicts the prevalence of rare outputs, and one half (1 / C) otherwise.

    Without them, the first steps of training only learn that rare findings are rare.

    Args:
        truth: [N, L] labels of the training photos, 0, 1 or NaN.
        kind: activation of the outputs.

    Returns:
        [L] logits. With "softmax", all are log prevalences if a class has less than half of an equal share; otherwise,
        outputs (or steps of a grade) below 10 % or above 90 % get the logit of their prevalence.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
    """
    known = ~np.isnan(truth)
    if kind == "cumulative":
        # A step is known for the photos that reached the grade before.
        known[:, 1:] &= truth[:, :-1] == 1
    # One further photo of each kind, so that an output without positives has a finite bias.
    share = (np.where(known, truth, 0).sum(axis=0) + 1) / (known.sum(axis=0) + 2)
    if kind == "softmax":
        share /= share.sum()
        rare = share.min() < 0.5 / len(share)
        return np.log(share).astype(np.float32) if rare else np.zeros(len(share), np.float32)
    rare = (share < _RARE) | (share > 1 - _RARE)
    return np.where(rare, np.log(share / (1 - share)), 0).astype(np.float32)


def rarity_weight(truth: NDArray[np.float64], kind: Activation) -> NDArray[np.float32]:
    """Return weights [L] that balance positives and negatives, or all classes; 1 for outputs without positives."""
    yes = np.nansum(truth, axis=0)
    if kind == "softmax":
        weight = len(truth) / (np.maximum(yes, 1) * max(1, (yes > 0).sum()))
    elif kind == "cumulative":
        come = np.r_[len(truth), yes[:-1]]
        weight = (come - yes) / np.maximum(yes, 1)
    else:
        weight = (truth == 0).sum(axis=0) / np.maximum(yes, 1)
    return np.where((yes > 0) & (weight > 0), weight, 1.0).astype(np.float32)
