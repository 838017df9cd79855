"""How logits become probabilities, for NumPy and torch alike, by the kind of head."""

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
"""By task. "cumulative": logit k says how likely grade k + 1 is reached by a photo that has reached grade k; the
product of all up to k is the probability of reaching it, which can only fall as k grows. Source: CORN, Shi, Cao and
Raschka, Pattern Analysis and Applications 2023."""


def activate(logits: Tensor, kind: Activation) -> Tensor:
    """Logits [N, L, ...] to probabilities [N, L, ...]."""
    if kind == "softmax":
        return torch.softmax(logits, dim=1)
    if kind == "cumulative":
        # The product as a sum of logarithms: exporters know cumulative sums only.
        return torch.exp(torch.cumsum(nn.functional.logsigmoid(logits), dim=1))
    return torch.sigmoid(logits)


def probabilities(logits: NDArray[np.float64], kind: Activation) -> NDArray[np.float64]:
    """As `activate`, of float64 [N, L]."""
    return activate(torch.from_numpy(logits), kind).numpy()
