"""csrc/sample_host.cpp on the CPU: compiled on first use, and kept in a cache folder.

Where there is no C++ compiler the operators fall back on the reference: the same values within `tolerances.py`, some
thirty times slower. `fastfundus doctor` says which of the two runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastfundus.kernels.building import CSRC, cached_build

__all__ = ["FLAGS", "SOURCE", "HostLibrary", "in_parallel", "load"]

SOURCE = CSRC / "sample_host.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class HostLibrary:
    """The compiled functions. They release the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._sample = library.fastfundus_sample_photo
        self._sample.argtypes = [pointer, pointer, pointer, number, number, number]
        self._sample.restype = None
        self._cells = library.fastfundus_cell_sums
        self._cells.argtypes = [pointer, number, number, number, pointer]
        self._cells.restype = None

    def sample(
        self, pixels: int, jobs: NDArray[Any], out: int, out_size: int, item_bytes: int, out_type: int, mode: int
    ) -> Callable[[int], None]:
        """Return what samples photo n: addresses of pixels, output, packed jobs, type (0 f32, 1 f16, 2 bf16, 3 u8)."""
        address, stride = jobs.ctypes.data, jobs.itemsize
        photo_bytes = 3 * out_size * out_size * item_bytes

        def sample_photo(n: int) -> None:
            self._sample(pixels, address + n * stride, out + n * photo_bytes, out_size, out_type, mode)

        return sample_photo

    def cell_sums(self, pixels: int, height: int, width: int, bins: int, out: int) -> None:
        """Sum one photo's brightest channel over its cells, into int64 [bins, bins] at `out`."""
        self._cells(pixels, height, width, bins, out)


@dataclass(frozen=True, slots=True)
class _Loaded:
    library: HostLibrary | None
    reason: str
    """Why there is no library; empty when there is."""


@functools.lru_cache(maxsize=1)
def load() -> _Loaded:
    """Compile if need be, load, and say why not where that fails. Never raises."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return _Loaded(None, "no C++ compiler: install g++")
    try:
        return _Loaded(HostLibrary(cached_build(compiler, FLAGS, SOURCE, ".so")), "")
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        return _Loaded(None, f"{compiler} cannot compile {SOURCE.name}: {told.strip()[:500]}")


def in_parallel(job: Callable[[int], None], count: int, threads: int) -> None:
    """Call job(0) ... job(count - 1) on so many threads.

    Threads are started for each call: they cost tens of microseconds, photos milliseconds, and no pool survives a fork.
    """
    if min(count, threads) <= 1:
        for n in range(count):
            job(n)
        return
    with ThreadPoolExecutor(min(count, threads)) as pool:
        for _ in pool.map(job, range(count)):
            pass
