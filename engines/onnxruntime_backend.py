"""ONNX Runtime on the CPU: the portable engine, the very graph that every bundle holds. No torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import check_photos
from fastfundus.errors import BundleError, require

__all__ = ["PACKAGE", "OnnxRuntimeEngine", "build", "load", "needs", "precisions"]

PACKAGE = "onnxruntime"


def precisions() -> tuple[str, ...]:
    """Precisions that this machine computes in, fastest first."""
    return ("fp32",)


def needs() -> dict[str, str]:
    """What a machine must have: nothing but ONNX Runtime."""
    return {}


def build(model: Any, graph: Path, size: int, folder: Path, precision: str) -> str:
    """The graph of the bundle is the engine; as `openvino_backend.build`."""
    shutil.copy(graph, folder / graph.name)
    return graph.name


def load(folder: Path, about: dict[str, Any]) -> OnnxRuntimeEngine:
    """Load the engine of a bundle."""
    return OnnxRuntimeEngine(folder / about["engine"], about["spec"]["size"])


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime, on all cores.

    Args:
        file: the ONNX graph.
        size: side of the photos in pixels.

    Raises:
        MissingDependency: onnxruntime is not installed.
        BundleError: the graph cannot be loaded.
    """

    def __init__(self, file: Path, size: int) -> None:
        runtime = require("onnxruntime", extra="onnxruntime")
        options = runtime.SessionOptions()
        # Named rather than left to defaults: an engine must be the one that passed the gate.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        try:
            self._session: Any = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # Its errors share no type of their own but derive from Exception alone.
            raise BundleError(
                f"{file}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); build it again"
            ) from None
        self._size, self._input = size, self._session.get_inputs()[0].name

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities [N, L] of photos uint8 [N, S, S, 3]."""
        check_photos(photos, self._size, self._session)
        result: NDArray[np.float32] = self._session.run(None, {self._input: np.ascontiguousarray(photos)})[0]
        return result

    def close(self) -> None:
        """Free the session."""
        self._session = None
