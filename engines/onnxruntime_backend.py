"""ONNX Runtime backend on the CPU: a portable engine that runs the ONNX graph in every bundle. Does not need torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import GRAPH, Blueprint, Engine, require_size
from fastfundus.errors import BundleError, require
from fastfundus.machine import usable_cores

__all__ = ["PACKAGE", "OnnxRuntimeEngine", "build", "load", "precisions"]

PACKAGE = "onnxruntime"


def precisions() -> tuple[str, ...]:
    """Return the precisions this machine computes in, fastest first."""
    return ("fp32",)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Copy the graph of the bundle, which is the engine; see `openvino_backend.build`."""
    shutil.copy(blueprint.graph, folder / GRAPH)
    return {"engine": GRAPH, "needs": {}}


def load(folder: Path, metadata: dict[str, Any]) -> OnnxRuntimeEngine:
    """Load the engine of a bundle."""
    return OnnxRuntimeEngine(folder / metadata["engine"], metadata["spec"]["size"])


class OnnxRuntimeEngine(Engine):
    """Engine that runs a graph in ONNX Runtime, on all available cores.

    Args:
        file: path of the ONNX graph.
        size: side of the photos in pixels.

    Raises:
        MissingDependency: if onnxruntime is not installed.
        BundleError: if the graph cannot be loaded.
    """

    def __init__(self, file: Path, size: int) -> None:
        runtime = require("onnxruntime", extra="onnxruntime")
        options = runtime.SessionOptions()
        # Set explicitly instead of relying on defaults, so that the engine is the one that passed the gate.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        try:
            self._session: Any = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # The errors of ONNX Runtime have no common base class other than Exception.
            raise BundleError(
                f"{file}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); rebuild it"
            ) from None
        entry = self._session.get_inputs()[0]
        self._input = entry.name
        require_size(file, entry.shape, size)
        super().__init__(size, str(file.parent))

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._session.run(None, {self._input: np.ascontiguousarray(photos)})[0]
        return result

    def _free(self) -> None:
        self._session = None
