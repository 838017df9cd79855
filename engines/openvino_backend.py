"""OpenVINO on the CPU: the default engine. No torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import check_photos
from fastfundus.errors import BundleError

__all__ = ["PRECISIONS", "OpenVinoEngine", "convert", "fastest_precision", "shared_core"]

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""Precisions that can be built, by OpenVINO's name for them."""


@functools.cache
def shared_core() -> Any:
    """OpenVINO's core, one for the whole process and never freed before it ends.

    Its CPU plugin installs a stack for signal handlers, and puts back the one it found when it is freed. Two cores
    freed in the order they were made leave a stack that is gone: the next Ctrl-C then ends in a segmentation fault.
    """
    import openvino

    return openvino.Core()


def fastest_precision() -> str:
    """Name the fastest precision here: "bf16" where the processor computes in bfloat16 (AMX or AVX-512 BF16)."""
    return "bf16" if "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"


def convert(onnx_file: Path, folder: Path) -> str:
    """Convert ONNX to OpenVINO's own format; weights stay float32, the precision is chosen when loading.

    Returns:
        The engine's file, relative to `folder`.
    """
    import openvino

    openvino.save_model(openvino.convert_model(onnx_file), folder / "engine.xml", compress_to_fp16=False)
    return "engine.xml"


class OpenVinoEngine:
    """A model compiled for this CPU.

    Photos are dealt to as many requests as there are streams, which run at once: on small machines this keeps every
    core busy better than one stream that spans them all.
    """

    def __init__(self, file: Path, size: int, precision: str) -> None:
        core = shared_core()
        if precision == "bf16" and fastest_precision() != "bf16":
            raise BundleError(
                f"{file.parent}: was built for bfloat16, which this processor lacks; build here with --precision fp32"
            )
        self._size = size
        # Everything that could differ from the engine that passed the gate is named, not left to defaults.
        config = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
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
        if self._model is None:
            raise BundleError("the engine was closed; load the bundle again")
        check_photos(photos, self._size)
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
