"""Where an engine looks: heatmaps from a bundle's graph, by OpenVINO on the CPU whatever its engine is. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.openvino_backend import shared_core
from fastfundus.engines.runtime import FEATURES, GRAPH
from fastfundus.errors import BundleError

__all__ = ["HEATMAP", "METHOD", "Heatmapper"]

HEATMAP = "heatmap.onnx"
METHOD = "Grad-CAM of the last feature maps"


class Heatmapper:
    """Two graphs: photo to features, and features to heat.

    Args:
        bundle: its graph must have features; see `available`.

    Raises:
        BundleError: it has none, or OpenVINO cannot load it.
    """

    def __init__(self, bundle: Bundle) -> None:
        if not self.available(bundle):
            raise BundleError(f"{bundle.path}: has no heatmaps ({(bundle.about.get('heatmap') or {}).get('note')})")
        core = shared_core()
        try:
            graph = core.read_model(bundle.folder / GRAPH)
            graph.add_outputs(FEATURES)
            graph.reshape([1, bundle.spec.size, bundle.spec.size, 3])
            # As exact as the engine that decides; what the processor computes fastest in is fine for eight bits.
            config = {"PERFORMANCE_HINT": "LATENCY"}
            if bundle.precision == "fp32":
                config["INFERENCE_PRECISION_HINT"] = "f32"
            self._features: Any = core.compile_model(graph, "CPU", config)
            self._heat: Any = core.compile_model(bundle.folder / HEATMAP, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise BundleError(
                f"{bundle.path}: OpenVINO cannot load its heatmaps ({str(error).splitlines()[0]})"
            ) from None

    @staticmethod
    def available(bundle: Bundle) -> bool:
        """Whether a bundle has heatmaps."""
        return HEATMAP in bundle.about["files"]

    def heat(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Say where the network looks.

        Args:
            photo: uint8 [S, S, 3] RGB, prepared as the bundle's spec says.

        Returns:
            float32 [L, h, w] by label, in the frame of the photo, coarser than it; not negative, in units of the logit:
            divide by the largest to look at it.
        """
        features = self._features(photo[None])[1]
        return np.array(self._heat(features)[0][0])
