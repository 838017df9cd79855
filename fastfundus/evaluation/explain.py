"""Heatmaps of image regions that a run relies on, by two methods, and measures of their faithfulness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.models.activation import ACTIVATIONS, probabilities
from fastfundus.models.cam import grad_cam, split
from fastfundus.training.predict import inference_device
from fastfundus.training.run import Run

__all__ = ["CELLS", "METHODS", "Explainer", "Explanation", "Faithfulness", "faithfulness"]

METHODS = ("gradcam", "occlusion")
"""Grad-CAM at the last feature maps or tokens; and occlusion, the fall of each output's logit when a cell of the photo
is covered. Occlusion suits every network and takes `CELLS` squared times as long."""
CELLS = 14
"""Number of cells across a photo, for occlusion and for `faithfulness`."""
_BATCH = 16

Photos = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A run's predictions for some photos, and its heatmaps."""

    probabilities: Floats
    """[N, L] calibrated probabilities."""
    heat: NDArray[np.float32]
    """[N, L, h, w] heatmaps in the frame of the photos, non-negative, in units of the logit."""


class Explainer:
    """Predictions and heatmaps of one run.

    Args:
        run: a run of a task that outputs probabilities.
        method: one of `METHODS`.
    """

    def __init__(self, run: Run, method: Literal["gradcam", "occlusion"] = "gradcam") -> None:
        self.labels, self.method = run.labels, method
        self._device = inference_device()
        self._network: Any = run.load_model().to(self._device).eval().requires_grad_(False)
        self._kind = ACTIVATIONS[run.config.task]
        points = read_operating_point(run)["labels"]
        self._temperatures = np.array([points[name]["temperature"] for name in run.labels])
        self.thresholds = [float(points[name]["threshold"]) for name in run.labels]
        self._mean, self._std = torch.tensor(run.spec.mean), torch.tensor(run.spec.std)

    def probabilities(self, photos: Photos) -> Floats:
        """Return calibrated probabilities [N, L] of photos, uint8 [N, S, S, 3]."""
        return probabilities(self._logits(photos) / self._temperatures, self._kind)

    def explain(self, photos: Photos) -> Explanation:
        """Return probabilities and heatmaps of photos, uint8 [N, S, S, 3], preprocessed like the run's own.

        Raises:
            ConfigError: the method is Grad-CAM and the network has no feature maps to apply it to.
        """
        parts = [photos[row : row + _BATCH] for row in range(0, len(photos), _BATCH)]
        heat = [self._cam(part) if self.method == "gradcam" else self._occluded(part) for part in parts]
        return Explanation(self.probabilities(photos), np.concatenate(heat))

    def _inputs(self, photos: Photos) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(photos)).float() / 255
        return ((values - self._mean) / self._std).permute(0, 3, 1, 2).to(self._device)

    def _logits(self, photos: Photos) -> Floats:
        with torch.inference_mode():
            parts = [self._network(self._inputs(photos[row : row + _BATCH])) for row in range(0, len(photos), _BATCH)]
        return torch.cat(parts).double().cpu().numpy()

    def _cam(self, photos: Photos) -> NDArray[np.float32]:
        cut = split(self._network, self._inputs(photos))
        return grad_cam(cut.features, cut.head, cut.as_maps).cpu().numpy()

    def _occluded(self, photos: Photos) -> NDArray[np.float32]:
        size, whole = photos.shape[1], self._logits(photos)
        heat = np.zeros((len(photos), len(self.labels), CELLS, CELLS), np.float32)
        for number, photo in enumerate(photos):
            colour = _typical(photo)
            covered = np.repeat(photo[None], CELLS, axis=0)
            for row in range(CELLS):
                covered[:] = photo
                for column in range(CELLS):
                    covered[column][_cell(row, column, size)] = colour
                falls = whole[number] - self._logits(covered)
                heat[number, :, row] = np.maximum(falls, 0).T
        return heat


def _cell(row: int, column: int, size: int) -> tuple[slice, slice]:
    edges = np.linspace(0, size, CELLS + 1).round().astype(int)
    return slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])


def _typical(photo: Photos) -> NDArray[np.uint8]:
    """Return the median colour of the retina; covering with black would create an edge that no retina has."""
    inside = photo[photo.max(axis=2) > 0]
    return np.median(inside if len(inside) else photo.reshape(-1, 3), axis=0).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Areas under the curve of an output's probability over the share of the photo changed: [N] each.

    Deletion covers the hottest cells first, which should lower the probability quickly: low is good. Insertion reveals
    them first on a blurred photo: high is good. For reference, each has a baseline with cells in random order. Source:
    Petsiuk et al., BMVC 2018.
    """

    deletion: Floats
    insertion: Floats
    random_deletion: Floats
    random_insertion: Floats


def faithfulness(
    explainer: Explainer, photos: Photos, heat: NDArray[np.float32], label: int, *, steps: int = 14, seed: int = 0
) -> Faithfulness:
    """Measure the faithfulness of the heatmaps of one output.

    Args:
        explainer: the run to query.
        photos: uint8 [N, S, S, 3].
        heat: [N, h, w] heatmaps of the output.
        label: index of the output.
        steps: number of points per curve, not counting its start.
        seed: random seed of the baseline order.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in Faithfulness.__dataclass_fields__}
    for photo, hot in zip(photos, heat, strict=True):
        cells = cv2.resize(hot, (CELLS, CELLS), interpolation=cv2.INTER_AREA if len(hot) > CELLS else cv2.INTER_LINEAR)
        covered = np.empty_like(photo)
        covered[:] = _typical(photo)
        covered[photo.max(axis=2) == 0] = 0
        blurred = cv2.GaussianBlur(photo, (0, 0), len(photo) / 16)
        orders = {"": np.argsort(-cells.ravel(), kind="stable"), "random_": generator.permutation(CELLS * CELLS)}
        for prefix, order in orders.items():
            for name, start, end in (("deletion", photo, covered), ("insertion", blurred, photo)):
                curve = explainer.probabilities(_between(start, end, order, steps))[:, label]
                found[prefix + name].append(float(np.trapezoid(curve, dx=1 / steps)))
    return Faithfulness(**{name: np.array(values) for name, values in found.items()})


def _between(start: Photos, end: Photos, order: NDArray[np.int64], steps: int) -> Photos:
    """Return the photos between `start` and `end`, replacing an equal share of cells per step: [steps + 1, S, S, 3]."""
    way, photo = [start], start.copy()
    for part in np.array_split(order, steps):
        for place in part:
            cell = _cell(int(place) // CELLS, int(place) % CELLS, len(photo))
            photo[cell] = end[cell]
        way.append(photo.copy())
    return np.stack(way)
