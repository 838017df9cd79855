"""CUDA graphs through the driver API, which pycuda does not wrap: capture work on a stream, launch it as one graph.

Source: CUDA Driver API, stream management and graph management. The functions exist in CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["CudaGraph", "driver"]

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may continue to allocate memory."""


@cache
def driver() -> ctypes.CDLL:
    """Return the driver library with argument and return types set for the functions used here."""
    library = ctypes.CDLL("libcuda.so.1")
    handle, out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    for name, arguments in {
        "cuStreamBeginCapture_v2": [handle, ctypes.c_int],
        "cuStreamEndCapture": [handle, out],
        "cuGraphInstantiateWithFlags": [out, handle, ctypes.c_ulonglong],
        "cuGraphLaunch": [handle, handle],
        "cuGraphExecDestroy": [handle],
        "cuGraphDestroy": [handle],
        "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


class CudaGraph:
    """Work that a stream received inside a `recorded` block. The CUDA context must be current in every call."""

    def __init__(self) -> None:
        self._run = ctypes.c_void_p()

    @contextmanager
    def recorded(self, stream: int) -> Iterator[None]:
        """Record the work enqueued on the stream in this block instead of running it.

        Args:
            stream: handle of a stream other than the default stream.

        Raises:
            RuntimeError: if a CUDA call fails; the message contains the name of the CUDA error.
        """
        library, graph = driver(), ctypes.c_void_p()
        _check("cuStreamBeginCapture", library.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL))
        try:
            yield
        finally:
            # End the capture after an exception too: a stream that keeps capturing runs nothing.
            ended = library.cuStreamEndCapture(stream, ctypes.byref(graph))
        _check("cuStreamEndCapture", ended)
        try:
            _check("cuGraphInstantiate", library.cuGraphInstantiateWithFlags(ctypes.byref(self._run), graph, 0))
        finally:
            library.cuGraphDestroy(graph)

    def launch(self, stream: int) -> None:
        """Launch the recorded work on a stream asynchronously."""
        _check("cuGraphLaunch", driver().cuGraphLaunch(self._run, stream))

    def free(self) -> None:
        """Free the recorded graph. Safe to call twice."""
        if self._run:
            driver().cuGraphExecDestroy(self._run)
            self._run = ctypes.c_void_p()


def _check(what: str, code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'error').decode()} ({code})")
