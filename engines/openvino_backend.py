"""OpenVINO on the CPU: the default engine. No torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import check_photos
from fastfundus.errors import BundleError

__all__ = ["PACKAGE", "OpenVinoEngine", "build", "load", "needs", "precisions", "shared_core"]

PACKAGE = "openvino"
_NAMES = {"fp32": "f32", "bf16": "bf16"}
"""Precisions that can be built, by OpenVINO's name for them."""


@functools.cache
def shared_core() -> Any:
    """OpenVINO's core, one for the whole process and never freed before it ends.

    Its CPU plugin installs a stack for signal handlers, and puts back the one it found when it is freed. Two cores
    freed in the order they were made leave a stack that is gone: the next Ctrl-C then ends in a segmentation fault.
    """
    import openvino

    return openvino.Core()


def precisions() -> tuple[str, ...]:
    """Precisions that this processor computes in, fastest first: "bf16" where it has AMX or AVX-512 BF16."""
    has_bf16 = "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if has_bf16 else ("fp32",)


def load(folder: Path, about: dict[str, Any]) -> OpenVinoEngine:
    """Load the engine of a bundle."""
    return OpenVinoEngine(folder / about["engine"], about["spec"]["size"], about["precision"])


def needs() -> dict[str, str]:
    """What a machine must have: nothing, OpenVINO compiles when it loads."""
    return {}


def build(model: Any, graph: Path, size: int, folder: Path, precision: str) -> str:
    """Convert ONNX to OpenVINO's own format; weights stay float32, the precision is chosen when loading.

    Args:
        model: of torch; not used.
        graph: the ONNX file.
        size: side of the photos in pixels.
        folder: where the engine goes.
        precision: one of `precisions`.

    Returns:
        The engine's file, relative to `folder`.
    """
    import openvino

    openvino.save_model(openvino.convert_model(graph), folder / "engine.xml", compress_to_fp16=False)
    return "engine.xml"


class OpenVinoEngine:
    """A model compiled for this CPU.

    Photos are dealt to as many requests as there are streams, which run at once: on small machines this keeps every
    core busy better than one stream that spans them all.
    """

    def __init__(self, file: Path, size: int, precision: str) -> None:
        core = shared_core()
        if precision not in precisions():
            raise BundleError(
                f"{file.parent}: was built for bfloat16, which this processor lacks; build here with --precision fp32"
            )
        self._size = size
        # Everything that could differ from the engine that passed the gate is named, not left to defaults.
        config = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": _NAMES[precision]}
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

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities [N, L] of photos uint8 [N, S, S, 3]."""
        check_photos(photos, self._size, self._model)
        result = np.full((len(photos), self._model.output(0).partial_shape[1].get_length()), np.nan, np.float32)
        streams = len(self._requests)
        for row in range(len(photos) + streams):
            request = self._requests[row % streams]
            if row >= streams and row - streams < len(photos):
                request.wait()
                result[row - streams] = request.get_output_tensor(0).data[0]
            if row < len(photos):
                request.start_async({0: photos[row : row + 1]})
        return result

    def close(self) -> None:
        """Free the compiled model."""
        self._requests, self._model = [], None
