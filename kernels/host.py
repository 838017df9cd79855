"""The CPU implementation, csrc/sample_host.cpp, compiled on first use and kept in a cache folder.

Without a C++ compiler, the operator falls back to the reference: the results agree within `tolerances.py`, but take
about thirty times longer. `fastfundus doctor` reports which of the two is in use.
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
    """The compiled library. Its function releases the GIL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._sample = library.fastfundus_sample_photo
        self._sample.argtypes = [pointer, pointer, pointer, number, number, number]
        self._sample.restype = None

    def sample(
        self, pixels: int, jobs: NDArray[Any], out: int, out_size: int, item_bytes: int, out_type: int, mode: int
    ) -> Callable[[int], None]:
        """Return a function that samples photo n.

        Args:
            pixels: address of the buffer of photos.
            jobs: packed jobs, one per photo.
            out: address of the output.
            out_size: side of the output in pixels.
            item_bytes: bytes per output value.
            out_type: 0 float32, 1 float16, 2 bfloat16, 3 uint8.
            mode: one of `jobs.MODES`.
        """
        address, stride = jobs.ctypes.data, jobs.itemsize
        photo_bytes = 3 * out_size * out_size * item_bytes

        def sample_photo(n: int) -> None:
            self._sample(pixels, address + n * stride, out + n * photo_bytes, out_size, out_type, mode)

        return sample_photo


@dataclass(frozen=True, slots=True)
class _Loaded:
    library: HostLibrary | None
    reason: str
    """Why the library is unavailable; empty if it was loaded."""


@functools.lru_cache(maxsize=1)
def load() -> _Loaded:
    """Load the library, compiling it if necessary; on failure return the reason. Never raises."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return _Loaded(None, "no C++ compiler: install g++")
    try:
        return _Loaded(HostLibrary(cached_build(compiler, FLAGS, SOURCE, ".so")), "")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        return _Loaded(None, f"{compiler} cannot compile {SOURCE.name}: {reason.strip()[:500]}")


def in_parallel(job: Callable[[int], None], count: int, threads: int) -> None:
    """Call job(0) ... job(count - 1) on `threads` threads.

    Threads are started for each call: this takes tens of microseconds, while a photo takes milliseconds, and a
    persistent pool would not survive a fork.
    """
    if min(count, threads) <= 1:
        for n in range(count):
            job(n)
        return
    with ThreadPoolExecutor(min(count, threads)) as pool:
        for _ in pool.map(job, range(count)):
            pass
