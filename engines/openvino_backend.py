"""OpenVINO backend on the CPU, the default. Does not need torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.openvino_core import shared_core
from fastfundus.engines.quantize import quantize_openvino
from fastfundus.engines.runtime import Blueprint, Engine, require_size
from fastfundus.errors import BundleError
from fastfundus.machine import cpu_computes_bfloat16, cpu_quota, usable_cores

__all__ = ["PACKAGE", "OpenVinoEngine", "build", "load", "precisions"]

PACKAGE = "openvino"


def precisions() -> tuple[str, ...]:
    """Return the precisions this processor computes in, int8 last: "bf16" needs AMX or AVX-512 BF16.

    "int8" runs on any processor; layers left in floating point then use bf16 where available.
    """
    return ("bf16", "fp32", "int8") if _has_bf16() else ("fp32", "int8")


def _has_bf16() -> bool:
    # OpenVINO reports the processor's units, but its kernels respect a limit set by ONEDNN_MAX_CPU_ISA.
    return cpu_computes_bfloat16() and "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def load(folder: Path, metadata: dict[str, Any]) -> OpenVinoEngine:
    """Load the engine of a bundle."""
    return OpenVinoEngine(folder / metadata["engine"], metadata["spec"]["size"], metadata["precision"])


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Convert the ONNX graph to OpenVINO's format; the floating-point type is chosen when the engine is loaded.

    Args:
        blueprint: source of the engine; only its graph and, for "int8", its calibration photos are used.
        folder: folder to write the engine to.
        precision: one of `precisions`.

    Returns:
        Entries for `bundle.json`: the engine's file and, for "int8", how it was quantised.
    """
    # Must precede the import, because `shared_core` disables telemetry.
    core = shared_core()
    import openvino

    model = core.read_model(blueprint.graph)
    metadata: dict[str, Any] = {"engine": "engine.xml", "needs": {}}
    if precision == "int8":
        model, metadata["quantisation"] = quantize_openvino(model, blueprint.calibration)
    openvino.save_model(model, folder / "engine.xml", compress_to_fp16=False)
    return metadata


class OpenVinoEngine(Engine):
    """Engine that runs a model compiled for this CPU.

    Photos are distributed over one inference request per stream, and all streams run concurrently. On small machines
    this uses the cores better than a single stream that spans all of them.

    Args:
        file: path of `engine.xml` or of an ONNX graph.
        size: side of the photos in pixels.
        precision: one of `precisions`.

    Raises:
        BundleError: if the engine was built for bfloat16 and this processor lacks it, or it cannot be loaded.
    """

    def __init__(self, file: Path, size: int, precision: str) -> None:
        core = shared_core()
        if precision not in precisions():
            raise BundleError(
                f"{file.parent}: built for bfloat16, which this processor lacks; rebuild it with --precision fp32, or "
                "run the float32 graph in the bundle: --backend openvino"
            )
        # Set explicitly instead of relying on defaults, so that the engine is the one that passed the gate.
        rest = "f32" if precision == "fp32" or not _has_bf16() else "bf16"
        config: dict[str, Any] = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": rest}
        quota = cpu_quota()
        if quota is not None:
            # OpenVINO respects the CPU affinity of the process, but not the CPU quota of a container.
            config["INFERENCE_NUM_THREADS"] = usable_cores()
        try:
            model = core.read_model(file)
            require_size(
                file, [dim.get_length() if dim.is_static else None for dim in model.input(0).partial_shape], size
            )
            # A fixed batch size of one lets the compiler plan memory; photos are distributed over streams.
            model.reshape([1, size, size, 3])
            self._model: Any = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BundleError(
                f"{file}: OpenVINO cannot load it ({str(error).splitlines()[0]}); rebuild the engine"
            ) from None
        count = self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # Plain requests, awaited in turn. OpenVINO's queue with a Python callback can deadlock when it is freed: its
        # destructor holds the GIL while the last callback waits for it.
        self._requests: list[Any] = [self._model.create_infer_request() for _ in range(count)]
        self._shape = tuple(self._model.output(0).shape)[1:]
        super().__init__(size, str(file.parent))

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        result = np.full((len(photos), *self._shape), np.nan, np.float32)
        streams = len(self._requests)
        for row in range(len(photos) + streams):
            request = self._requests[row % streams]
            if row >= streams and row - streams < len(photos):
                request.wait()
                result[row - streams] = request.get_output_tensor(0).data[0]
            if row < len(photos):
                request.start_async({0: photos[row : row + 1]})
        return result

    def _free(self) -> None:
        self._requests, self._model = [], None
