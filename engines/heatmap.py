"""Heatmaps of a bundle's graph, computed by OpenVINO on the CPU for any backend. Does not need torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.openvino_core import shared_core
from fastfundus.engines.runtime import FEATURES, GRAPH
from fastfundus.errors import BundleError
from fastfundus.machine import cpu_computes_bfloat16

__all__ = ["HEATMAP", "METHOD", "Heatmapper"]

HEATMAP = "heatmap.onnx"
METHOD = "Grad-CAM of the last feature maps"


class Heatmapper:
    """Computes heatmaps with two graphs: from photo to features, and from features to heatmaps.

    Args:
        bundle: a bundle with heatmaps; see `available`.

    Raises:
        BundleError: if the bundle has no heatmaps, or OpenVINO cannot load its graphs.
    """

    def __init__(self, bundle: Bundle) -> None:
        if not self.available(bundle):
            raise BundleError(f"{bundle.path}: has no heatmaps ({(bundle.metadata.get('heatmap') or {}).get('note')})")
        core = shared_core()
        try:
            graph = core.read_model(bundle.folder / GRAPH)
            graph.add_outputs(FEATURES)
            graph.reshape([1, bundle.spec.size, bundle.spec.size, 3])
            # Match the precision of a float32 engine; for other engines, OpenVINO chooses the fastest that is native.
            config = {"PERFORMANCE_HINT": "LATENCY"}
            if bundle.precision == "fp32" or not cpu_computes_bfloat16():
                config["INFERENCE_PRECISION_HINT"] = "f32"
            self._features: Any = core.compile_model(graph, "CPU", config)
            self._heat: Any = core.compile_model(bundle.folder / HEATMAP, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise BundleError(
                f"{bundle.path}: OpenVINO cannot load its heatmaps ({str(error).splitlines()[0]})"
            ) from None

    @staticmethod
    def available(bundle: Bundle) -> bool:
        """Return whether a bundle has heatmaps."""
        return HEATMAP in bundle.metadata["files"]

    def heat(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute the heatmaps of a photo.

        Args:
            photo: uint8 [S, S, 3] RGB, prepared according to the bundle's spec.

        Returns:
            float32 [L, h, w], one heatmap per label, covering the photo at a lower resolution. Values are non-negative
            and in units of the logit; divide by the maximum for display.
        """
        features = self._features(photo[None])[1]
        return np.array(self._heat(features)[0][0])
