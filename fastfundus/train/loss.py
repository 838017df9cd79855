"""What is minimised: plain functions of logits and targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["binary_loss"]


def binary_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    positive_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of yes and no, its mean over all elements.

    Args:
        logits: [N, L] float32.
        targets: [N, L] float32, 0 or 1.
        smoothing: targets become smoothing / 2 and 1 - smoothing / 2; 0 to 0.5.
        gamma: focal loss: elements are weighted by (1 - p)^gamma, p the probability given to the right answer.
        positive_weight: what a positive counts against a negative.

    Returns:
        A scalar.

    Source: focal loss, Lin et al., ICCV 2017, without its alpha; label smoothing, Szegedy et al., CVPR 2016.
    """
    smooth = targets * (1 - smoothing) + smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
    if gamma > 0:
        # Of the hard targets: smoothing says how sure to become, not which answer is right.
        loss = loss * torch.sigmoid(torch.where(targets > 0.5, -logits, logits)) ** gamma
    if positive_weight != 1:
        loss = loss * torch.where(targets > 0.5, positive_weight, 1.0)
    return loss.mean()
