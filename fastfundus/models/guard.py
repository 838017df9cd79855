"""Distance of a photo from those that a network learned from, by the network's own features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Guard", "GuardModel", "Penultimate", "fit_guard_model"]

_COMPONENTS = 64
_MIN_DEVIATION = 1e-3
"""A smaller one would measure the rounding of 16-bit engines: a bfloat16 element of a unit vector is off by 1e-4."""


@dataclass(frozen=True, slots=True)
class GuardModel:
    """A Gaussian of unit features: K directions with their own variance, and one variance for all others."""

    mean: NDArray[np.float32]
    """[F]"""
    components: NDArray[np.float32]
    """[K, F], orthonormal rows."""
    deviations: NDArray[np.float32]
    """[K + 1] standard deviation along each component; the last one is that of every other direction."""

    def distances(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the Mahalanobis distance of features [N, F] from the mean, [N]."""
        module = Guard(self, 1.0)
        with torch.no_grad():
            return module.distance(torch.from_numpy(features)).numpy()[:, 0]


def fit_guard_model(features: NDArray[np.float32]) -> GuardModel:
    """Fit the Gaussian.

    Args:
        features: [N, F] penultimate features of training photos, N at least 2.

    Source: probabilistic PCA, Tipping and Bishop, J. R. Statist. Soc. B 1999; distances of unit features, Mueller and
    Hein, Mahalanobis++, ICML 2025.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean = unit.mean(axis=0, dtype=np.float64)
    centred = unit - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(unit) - 1))
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    # At least half of the photos' dimensions are left to the common variance, which would otherwise be that of noise.
    count = min(_COMPONENTS, len(values) - 1, len(unit) // 4)
    rest = max(float(values[count:].mean()), _MIN_DEVIATION**2)
    deviations = np.sqrt(np.append(np.maximum(values[:count], rest), rest))
    # Contiguous: safetensors writes the memory of an array, whatever its strides.
    components = np.ascontiguousarray(vectors[:, :count].T, np.float32)
    return GuardModel(mean.astype(np.float32), components, deviations.astype(np.float32))


class Guard(nn.Module):
    """Maps penultimate features [N, F] to how unfamiliar they are, float32 [N, 1].

    The value is d / (d + limit) with d the distance from the training photos: 0 to 1, and above `records.GUARD_LIMIT`
    beyond the limit. It stays in float32 in engines of any precision.

    Args:
        model: the fitted Gaussian.
        limit: distance beyond which photos are unfamiliar, above 0.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    def __init__(self, model: GuardModel, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.from_numpy(model.mean))
        self.register_buffer("components", torch.from_numpy(model.components))
        self.register_buffer("scale", torch.from_numpy(1 / model.deviations[:-1]))
        self.rest = 1 / float(model.deviations[-1])

    def distance(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance of features [N, F], [N, 1]."""
        features = features.float()
        unit = features / torch.clamp(torch.sqrt((features * features).sum(dim=1, keepdim=True)), min=1e-12)
        centred = unit - self.mean
        along = centred @ self.components.T
        # What the components leave over, itself: as a difference of squares it would be lost in rounding.
        over = (centred - along @ self.components) * self.rest
        along = along * self.scale
        squared = (along * along).sum(dim=1, keepdim=True) + (over * over).sum(dim=1, keepdim=True)
        return torch.sqrt(squared)

    def forward(self, features: Tensor) -> Tensor:
        """Return how unfamiliar features [N, F] are, [N, 1]."""
        distance = self.distance(features)
        return distance / (distance + self.limit)


class Penultimate(nn.Module):
    """The features that a timm network's final linear layer receives, [N, F]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @staticmethod
    def available(network: nn.Module, size: int) -> bool:
        """Return whether a network has such features, tried with a photo of `size` pixels."""
        device = next((parameter.device for parameter in network.parameters()), None)
        try:
            with torch.no_grad():
                shape = Penultimate(network)(torch.zeros(1, 3, size, size, device=device)).shape
        except (AttributeError, TypeError, RuntimeError):
            # Not every network of timm divides its head like this.
            return False
        return len(shape) == 2

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features of inputs [N, 3, S, S]."""
        network: Any = self.network
        features: Tensor = network.forward_head(network.forward_features(inputs), pre_logits=True)
        return features
