"""ONNX Runtime on the CPU: the portable engine, the very graph that every bundle holds. No torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import GRAPH, Blueprint, Engine
from fastfundus.errors import BundleError, require

__all__ = ["PACKAGE", "OnnxRuntimeEngine", "build", "load", "precisions"]

PACKAGE = "onnxruntime"


def precisions() -> tuple[str, ...]:
    """Precisions that this machine computes in, fastest first."""
    return ("fp32",)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """The graph of the bundle is the engine; as `openvino_backend.build`."""
    shutil.copy(blueprint.graph, folder / GRAPH)
    return {"engine": GRAPH, "needs": {}}


def load(folder: Path, about: dict[str, Any]) -> OnnxRuntimeEngine:
    """Load the engine of a bundle."""
    return OnnxRuntimeEngine(folder / about["engine"], about["spec"]["size"])


class OnnxRuntimeEngine(Engine):
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
        self._input = self._session.get_inputs()[0].name
        super().__init__(size, str(file.parent))

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._session.run(None, {self._input: np.ascontiguousarray(photos)})[0]
        return result

    def _free(self) -> None:
        self._session = None
