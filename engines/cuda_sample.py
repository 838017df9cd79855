"""The CUDA kernels of csrc for the torch-free runtime, loaded from the fatbin and launched through pycuda.

This module retains the device's primary context, which torch, TensorRT and the CUDA runtime share, so memory and
streams of any of them can be passed. A separate context, such as `pycuda.autoinit` creates, could not access them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from fastfundus.errors import FastFundusError, require
from fastfundus.kernels.building import CSRC, cached_build
from fastfundus.kernels.jobs import MODES

__all__ = ["FLAGS", "OUTPUTS", "CudaSampler", "current", "fatbin"]

FLAGS = (
    "-std=c++17", "-O3", "-fatbin", "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
    "-gencode", "arch=compute_100,code=[sm_100,compute_100]",
)  # fmt: skip
_PIXELS_A_BLOCK = 256
"""`kPixels` in sample.cu."""
_MODES = ("interpolate", "integrate", "nearest")
OUTPUTS = ("f32", "f16", "bf16", "u8")
OutputType = Literal["f32", "f16", "bf16", "u8"]


@contextmanager
def current(context: Any, *, cuda: Any) -> Iterator[None]:
    """Make a pycuda context current in this thread for the block, then restore the previous one.

    Args:
        context: a retained context.
        cuda: the module `pycuda.driver`.
    """
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


def fatbin() -> Path:
    """Return the fatbin of csrc/sample.cu for A100, H100/H200, B200 and later GPUs, compiled unless it is cached.

    Raises:
        FastFundusError: if nvcc is not installed.
        subprocess.CalledProcessError: if compilation fails; `stderr` contains the compiler's output.
    """
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise FastFundusError(
            "nvcc, which compiles the CUDA kernels, was not found: install the CUDA toolkit, or copy the file that "
            "`make -C csrc` writes on a machine with the toolkit"
        )
    return cached_build(compiler, FLAGS, CSRC / "sample.cu", ".fatbin")


class CudaSampler:
    """Runs the `sample` kernels on one GPU in memory owned by the caller; allocates nothing after construction.

    Args:
        image: path of the fatbin; None uses `fatbin()`.
        device: index of the GPU.

    Raises:
        MissingDependency: if pycuda is not installed.
    """

    def __init__(self, image: Path | None = None, device: int = 0) -> None:
        require("pycuda", extra="tensorrt")
        import pycuda.driver as cuda

        cuda.init()
        self._cuda = cuda
        self._context = cuda.Device(device).retain_primary_context()
        with current(self._context, cuda=cuda):
            self._module = cuda.module_from_buffer((image or fatbin()).read_bytes())
            self._functions: dict[tuple[str, int], Any] = {}
            for output in OUTPUTS:
                for mode in MODES:
                    function = self._module.get_function(f"fastfundus_sample_{output}_{_MODES[mode]}")
                    # Three pointers (pixels, jobs, output) and the output size.
                    function.prepare("PPPi")
                    self._functions[output, mode] = function

    def launch(
        self,
        pixels: int,
        jobs: int,
        count: int,
        out: int,
        out_size: int,
        output: OutputType,
        mode: int,
        stream: Any = None,
    ) -> None:
        """Start sampling a batch asynchronously.

        Args:
            pixels: device address of the photos, each uint8 [H, W, 3] at the offset given by its job.
            jobs: device address of `count` jobs, packed and validated by `kernels.jobs.pack_jobs`.
            count: number of photos.
            out: device address of [count, out_size, out_size, 3] in the output type, aligned to 16 bytes.
            out_size: side of the output in pixels.
            output: one of `OUTPUTS`; "u8" rounds to integer grey levels.
            mode: mode returned by `pack_jobs`.
            stream: a pycuda stream; None is the default stream.

        Raises:
            ValueError: if an argument is invalid; the message names it.
        """
        if (output, mode) not in self._functions:
            raise ValueError(
                f"output must be one of {', '.join(OUTPUTS)} and mode 0, 1 or 2, got {output!r} and {mode!r}"
            )
        if out % 16:
            raise ValueError(f"out must be aligned to 16 bytes, got address {out:#x}")
        blocks = -(-out_size * out_size // _PIXELS_A_BLOCK) * count
        if blocks > 2**31 - 1:
            raise ValueError(f"{count} photos of {out_size} x {out_size} are too many for one launch: split the batch")
        if blocks == 0:
            return
        with current(self._context, cuda=self._cuda):
            self._functions[output, mode].prepared_async_call(
                (blocks, 1), (_PIXELS_A_BLOCK, 1, 1), stream, pixels, jobs, out, out_size
            )

    def close(self) -> None:
        """Release the kernels and the context. Safe to call twice."""
        if self._functions:
            self._functions.clear()
            with current(self._context, cuda=self._cuda):
                del self._module
            self._context.detach()

    def __enter__(self) -> Self:
        """Return the sampler, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the sampler."""
        self.close()
