"""csrc's CUDA kernels for the runtime without torch: found in the fatbin and launched through pycuda.

The device's primary context is retained, the one that torch, TensorRT and the CUDA runtime use too: memory and streams
of any of them can be passed. A context of its own, which `pycuda.autoinit` makes, would not see theirs.
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
"""sample.cu's kPixels."""
_MODES = ("interpolate", "integrate", "nearest")
OUTPUTS = ("f32", "f16", "bf16", "u8")
OutputType = Literal["f32", "f16", "bf16", "u8"]


@contextmanager
def current(context: Any, *, cuda: Any) -> Iterator[None]:
    """Make a context of pycuda this thread's in the block, and put back what was there.

    Args:
        context: a retained one.
        cuda: the module `pycuda.driver`.
    """
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


def fatbin() -> Path:
    """Compile csrc/sample.cu for A100, H100/H200, B200 and later GPUs, unless the cache folder has it.

    Raises:
        FastFundusError: there is no nvcc.
        subprocess.CalledProcessError: it refuses; its words are in `stderr`.
    """
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise FastFundusError(
            "nvcc compiles the CUDA kernels and is not there: install the CUDA toolkit, or bring the file that "
            "`make -C csrc` writes on a machine that has it"
        )
    return cached_build(compiler, FLAGS, CSRC / "sample.cu", ".fatbin")


class CudaSampler:
    """`sample` on one GPU, on memory that the caller owns; nothing is allocated after construction.

    Args:
        image: the fatbin; None takes `fatbin()`.
        device: number of the GPU.

    Raises:
        MissingDependency: pycuda is not installed.
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
                    # Pointers to pixels, jobs and output, and the output's side.
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
        """Start sampling a batch; returns before it is done.

        Args:
            pixels: device address of the photos, uint8 [H, W, 3] each, at their jobs' offsets.
            jobs: device address of `count` jobs, as `kernels.jobs.pack_jobs` packs and checks them.
            count: photos.
            out: device address of [count, out_size, out_size, 3] of the output type, aligned to 16 bytes.
            out_size: side of the output in pixels.
            output: one of `OUTPUTS`; "u8" rounds to grey levels.
            mode: from `pack_jobs`.
            stream: a pycuda stream; None is the default stream.

        Raises:
            ValueError: an argument is not allowed; the message names it.
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
        """Give the kernels and the context back. Safe to call twice."""
        if self._functions:
            self._functions.clear()
            with current(self._context, cuda=self._cuda):
                del self._module
            self._context.detach()

    def __enter__(self) -> Self:
        """Return the sampler; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
