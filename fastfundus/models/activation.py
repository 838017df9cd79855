"""Activations that convert logits to probabilities, in NumPy and torch, by type of head."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "activate", "probabilities"]

Activation = Literal["sigmoid", "softmax", "cumulative"]
ACTIVATIONS: dict[str, Activation] = {
    "abnormality": "sigmoid",
    "multilabel": "sigmoid",
    "multiclass": "softmax",
    "ordinal": "cumulative",
    "vessels": "sigmoid",
}
"""Activation of each task. With "cumulative", logit k gives the probability that a photo with at least grade k has at
least grade k + 1. The product of all probabilities up to k is the probability of at least grade k + 1, which cannot
increase with k. Source: CORN, Shi, Cao and Raschka, Pattern Analysis and Applications 2023."""


def activate(logits: Tensor, kind: Activation) -> Tensor:
    """Convert logits [N, L, ...] to probabilities [N, L, ...]."""
    if kind == "softmax":
        return torch.softmax(logits, dim=1)
    if kind == "cumulative":
        # The product is computed as a sum of logarithms, because exporters support only cumulative sums.
        return torch.exp(torch.cumsum(nn.functional.logsigmoid(logits), dim=1))
    return torch.sigmoid(logits)


def probabilities(logits: NDArray[np.float64], kind: Activation) -> NDArray[np.float64]:
    """Convert float64 logits [N, L] to probabilities; see `activate`."""
    return activate(torch.from_numpy(logits), kind).numpy()
