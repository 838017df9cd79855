"""OpenVINO on the CPU: the default engine. No torch."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import Blueprint, Engine
from fastfundus.errors import BundleError

__all__ = ["PACKAGE", "OpenVinoEngine", "build", "forbid_telemetry", "load", "precisions", "shared_core"]

PACKAGE = "openvino"


def forbid_telemetry(package: str) -> None:
    """Call before importing OpenVINO or a tool of its makers: a machine that screens patients reports to nobody.

    Importing OpenVINO alone sends statistics over the network, unless its package for that is absent: so it is made to
    look. What a program has imported before us stays as it is.
    """
    if package not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


@functools.cache
def shared_core() -> Any:
    """OpenVINO's core, one for the whole process and never freed before it ends.

    Its CPU plugin installs a stack for signal handlers, and puts back the one it found when it is freed. Two cores
    freed in the order they were made leave a stack that is gone: the next Ctrl-C then ends in a segmentation fault.
    """
    forbid_telemetry("openvino")
    import openvino

    return openvino.Core()


def precisions() -> tuple[str, ...]:
    """Precisions that this processor computes in, integers last: "bf16" where it has AMX or AVX-512 BF16.

    "int8" runs on any; what is left in floating point then computes in bf16 where there is such.
    """
    return ("bf16", "fp32", "int8") if _has_bf16() else ("fp32", "int8")


def _has_bf16() -> bool:
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def load(folder: Path, about: dict[str, Any]) -> OpenVinoEngine:
    """Load the engine of a bundle."""
    return OpenVinoEngine(folder / about["engine"], about["spec"]["size"], about["precision"])


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Convert ONNX to OpenVINO's own format; what stays in floating point is chosen when loading.

    Args:
        blueprint: its graph, and for "int8" its calibration photos.
        folder: where the engine goes.
        precision: one of `precisions`.

    Returns:
        What `bundle.json` says of the engine: its file, and for "int8" how it was quantised.
    """
    # Before the import: the core's comes without telemetry.
    core = shared_core()
    import openvino

    model = core.read_model(blueprint.graph)
    about: dict[str, Any] = {"engine": "engine.xml", "needs": {}}
    if precision == "int8":
        from fastfundus.engines.quantize import quantize_openvino

        model, about["quantisation"] = quantize_openvino(model, blueprint.calibration)
    openvino.save_model(model, folder / "engine.xml", compress_to_fp16=False)
    return about


class OpenVinoEngine(Engine):
    """A model compiled for this CPU.

    Photos are dealt to as many requests as there are streams, which run at once: on small machines this keeps every
    core busy better than one stream that spans them all.

    Args:
        file: `engine.xml`, or an ONNX graph.
        size: side of the photos in pixels.
        precision: one of `precisions`.

    Raises:
        BundleError: it was built for bfloat16 and this processor has none, or cannot be loaded.
    """

    def __init__(self, file: Path, size: int, precision: str) -> None:
        core = shared_core()
        if precision not in precisions():
            raise BundleError(
                f"{file.parent}: was built for bfloat16, which this processor lacks; build here with --precision fp32, "
                "or run the graph inside it in float32: --backend openvino"
            )
        # Everything that could differ from the engine that passed the gate is named, not left to defaults.
        rest = "f32" if precision == "fp32" or not _has_bf16() else "bf16"
        config = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": rest}
        try:
            model = core.read_model(file)
            # A fixed batch of one lets the compiler plan memory; photos are spread over streams.
            model.reshape([1, size, size, 3])
            self._model: Any = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BundleError(
                f"{file}: OpenVINO cannot load it ({str(error).splitlines()[0]}); build it again"
            ) from None
        count = self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # Plain requests, waited for in turn. OpenVINO's queue with a Python callback can deadlock when it is freed: its
        # destructor holds the interpreter's lock while the last callback asks for it.
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
