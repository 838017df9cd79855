"""CUDA graphs by the driver's own interface, for pycuda has none: record what a stream is given, launch it as one.

Source: CUDA Driver API, stream management and graph management; the functions are those of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["CudaGraph", "driver"]

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating."""


@cache
def driver() -> ctypes.CDLL:
    """The driver's library, with the types of what is used of it."""
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
    """What a stream was given while `recorded` was open. The context must be current in every call."""

    def __init__(self) -> None:
        self._run = ctypes.c_void_p()

    @contextmanager
    def recorded(self, stream: int) -> Iterator[None]:
        """Record what the stream is given in the block, instead of doing it.

        Args:
            stream: the handle of a stream that is not the default one.

        Raises:
            RuntimeError: CUDA refuses; the message holds its name of the error.
        """
        library, graph = driver(), ctypes.c_void_p()
        _check("cuStreamBeginCapture", library.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL))
        try:
            yield
        finally:
            # Also after an exception: a stream that goes on recording would do nothing any more.
            ended = library.cuStreamEndCapture(stream, ctypes.byref(graph))
        _check("cuStreamEndCapture", ended)
        try:
            _check("cuGraphInstantiate", library.cuGraphInstantiateWithFlags(ctypes.byref(self._run), graph, 0))
        finally:
            library.cuGraphDestroy(graph)

    def launch(self, stream: int) -> None:
        """Do what was recorded, in a stream; returns before it is done."""
        _check("cuGraphLaunch", driver().cuGraphLaunch(self._run, stream))

    def free(self) -> None:
        """Free what was recorded. Safe to call twice."""
        if self._run:
            driver().cuGraphExecDestroy(self._run)
            self._run = ctypes.c_void_p()


def _check(what: str, code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'error').decode()} ({code})")
