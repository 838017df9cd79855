"""Test double of a GPU in host memory: `pycuda.driver` and the graph functions of libcuda.

Work on a stream runs only when the stream is synchronised, so buffers that are read too early or reused too soon give
wrong results. Copies must use pinned memory and stay within allocations.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastfundus.kernels import host
from fastfundus.kernels.jobs import JOB

DEVICE = ("NVIDIA H200", (9, 0))


def run_kernel(name: str, grid: tuple[int, ...], pixels: int, jobs: int, out: int, out_size: int) -> None:
    """Run the host build of a csrc kernel on the given addresses."""
    _, _, output, mode = name.split("_")
    count = grid[0] // (-(-out_size * out_size // 256))
    assert grid == (count * -(-out_size * out_size // 256), 1)
    there = np.frombuffer((ctypes.c_char * (count * JOB.itemsize)).from_address(jobs), JOB)
    library = host.load().library
    assert library is not None
    types_of = {"f32": (4, 0), "f16": (2, 1), "bf16": (2, 2), "u8": (1, 3)}
    modes = {"interpolate": 0, "integrate": 1, "nearest": 2}
    job = library.sample(pixels, there, out, out_size, *types_of[output], modes[mode])
    for n in range(count):
        job(n)


class Gpu(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        gpu = self
        self.current: list[Any] = []
        self.retained = 0
        self.room = 1 << 40
        self.allocated = 0
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: list[np.ndarray] = []
        self.streams: dict[int, Any] = {}
        self.launches = 0
        self.kernels: list[tuple[str, Any]] = []
        self.started = False

        class Error(Exception):
            pass

        class OutOfMemory(Error):
            pass

        class Context:
            def push(self) -> None:
                assert gpu.retained, "the context was released"
                gpu.current.append(self)

            @staticmethod
            def pop() -> None:
                gpu.current.pop()

            def detach(self) -> None:
                gpu.retained -= 1

        class Device:
            def __init__(self, number: int) -> None:
                assert gpu.started, "init must be called first"
                assert number == 0

            def name(self) -> str:
                return DEVICE[0]

            def compute_capability(self) -> tuple[int, int]:
                return DEVICE[1]

            def retain_primary_context(self) -> Context:
                gpu.retained += 1
                return Context()

        class Allocation:
            def __init__(self, size: int) -> None:
                assert gpu.current, "no context is current"
                if size > gpu.room:
                    raise OutOfMemory("cuMemAlloc failed: out of memory")
                self.data = np.full(size, 0xAB, np.uint8)
                self.address = self.data.ctypes.data
                gpu.memory[self.address] = self.data
                gpu.allocated += 1

            def __int__(self) -> int:
                return self.address

            def free(self) -> None:
                assert gpu.current, "no context is current"
                del gpu.memory[self.address]

        class Stream:
            def __init__(self) -> None:
                assert gpu.current, "no context is current"
                self.handle = 0x1000 + len(gpu.streams)
                self.todo: list[Callable[[], None]] = []
                self.recording: list[Callable[[], None]] | None = None
                gpu.streams[self.handle] = self
                gpu.allocated += 1

            def give(self, work: Callable[[], None]) -> None:
                assert gpu.current, "no context is current"
                (self.todo if self.recording is None else self.recording).append(work)

            def synchronize(self) -> None:
                assert self.recording is None, "a capturing stream must not be synchronised"
                for work in self.todo:
                    work()
                self.todo.clear()

        class Function:
            def __init__(self, name: str) -> None:
                self.name, self.format = name, ""

            def prepare(self, format: str) -> None:
                self.format = format

            def prepared_async_call(
                self, grid: tuple[int, ...], block: tuple[int, ...], stream: Stream | None, *given: int
            ) -> None:
                assert gpu.current, "no context is current"
                assert self.format == "PPPi"
                assert block == (256, 1, 1)
                # Packed as in pycuda 2026.1.
                assert struct.unpack(self.format, struct.pack(self.format, *given)) == given
                gpu.kernels.append((self.name, stream))
                if stream is None:
                    run_kernel(self.name, grid, *given)
                else:
                    stream.give(lambda: run_kernel(self.name, grid, *given))

        class Module:
            def __init__(self, image: bytes) -> None:
                # The binary contains the kernel names as text.
                self.names = set(re.findall(rb"fastfundus_sample_[a-z0-9]+_[a-z]+", image))

            def get_function(self, name: str) -> Function:
                assert name.encode() in self.names, f"named symbol not found: {name}"
                return Function(name)

        self.module_from_buffer = Module
        self.Error, self.MemoryError, self.Context, self.Device, self.Stream = (
            Error, OutOfMemory, Context, Device, Stream,
        )  # fmt: skip
        self.mem_alloc = Allocation

    def init(self) -> None:
        self.started = True

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        assert self.current, "no context is current"
        made = np.zeros(shape, dtype)
        self.pinned.append(made)
        self.allocated += 1
        return made

    def at(self, address: int, size: int) -> np.ndarray:
        """Return a view of device memory after checking that it is allocated."""
        for start, data in self.memory.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise AssertionError("illegal memory access")

    def _is_pinned(self, host: np.ndarray) -> bool:
        return any(np.shares_memory(host, entry) for entry in self.pinned)

    def memcpy_htod_async(self, dest: Any, src: np.ndarray, stream: Any) -> None:
        assert self._is_pinned(src)
        address = int(dest)

        def work() -> None:
            self.at(address, src.nbytes)[:] = np.frombuffer(src.tobytes(), np.uint8)

        stream.give(work)

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Any) -> None:
        stream.give(lambda: np.copyto(self.at(dest, size), self.at(src, size).copy()))

    def memcpy_dtoh_async(self, dest: np.ndarray, src: Any, stream: Any) -> None:
        assert self._is_pinned(dest)
        address = int(src)

        def work() -> None:
            dest[...] = np.frombuffer(self.at(address, dest.nbytes).tobytes(), dest.dtype).reshape(dest.shape)

        stream.give(work)


def install(patch: pytest.MonkeyPatch) -> Gpu:
    """Replace pycuda with the double."""
    gpu = Gpu()
    package = types.ModuleType("pycuda")
    package.driver = gpu  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "pycuda", package)
    patch.setitem(sys.modules, "pycuda.driver", gpu)
    return gpu


class GraphDriver:
    """Test double of the graph functions of libcuda, operating on a `Gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.fail = 0

    def cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        assert mode == 1
        self.gpu.streams[stream].recording = []
        return self.fail

    def _made(self, out: Any, work: list[Callable[[], None]]) -> int:
        handle = 0x100 + len(self.graphs)
        self.graphs[handle] = work
        out._obj.value = handle
        return 0

    def cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        work, self.gpu.streams[stream].recording = self.gpu.streams[stream].recording, None
        return self._made(graph, work)

    def cuGraphInstantiateWithFlags(self, run: Any, graph: Any, flags: int) -> int:
        assert flags == 0
        return self._made(run, list(self.graphs[graph.value]))

    def cuGraphLaunch(self, run: Any, stream: int) -> int:
        self.gpu.launches += 1
        for work in self.graphs[run.value]:
            self.gpu.streams[stream].give(work)
        return 0

    def cuGraphExecDestroy(self, run: Any) -> int:
        self.graphs[run.value] = []
        return 0

    cuGraphDestroy = cuGraphExecDestroy

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_TEST"
        return 0
