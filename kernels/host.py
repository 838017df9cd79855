"""csrc/sample_host.cpp on the CPU: compiled on first use, and kept in a cache folder.

Where there is no C++ compiler the operators fall back on the reference: the same values within `tolerances.py`, some
thirty times slower. `fastfundus doctor` says which of the two runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

__all__ = ["FLAGS", "SOURCES", "HostLibrary", "build", "load"]

# Beside this package, in a checkout and in an installed wheel alike.
_FOLDER = Path(__file__).parent.parent / "csrc"
SOURCES = (_FOLDER / "sample_host.cpp", _FOLDER / "sample.cuh")
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
        """Return what samples photo n: addresses of pixels and output, packed jobs, type (0 f32, 1 f16, 2 bf16)."""
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
        return _Loaded(HostLibrary(_cached(compiler)), "")
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        return _Loaded(None, f"{compiler} cannot compile {SOURCES[0].name}: {told.strip()[:500]}")


def build(compiler: str, target: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile to `target`, in place at once.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; its words are in `stderr`.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "library.so"
        command = [compiler, *flags, str(SOURCES[0]), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(fresh, target)
    return target


def _cached(compiler: str) -> Path:
    """The library in the cache folder, compiled anew when sources, compiler, flags or processor changed."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    parts = [version, *FLAGS, platform.machine(), _processor(), *(path.read_text() for path in SOURCES)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(home) / "fastfundus" / f"sample_host_{key}.so"
    return target if target.is_file() else build(compiler, target)


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


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
