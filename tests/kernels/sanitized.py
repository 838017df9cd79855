"""Run the host library of `sample` on a file of cases, in a process with sanitizers.

    python -m tests.kernels.sanitized LIBRARY.so CASES.npz RESULTS.npz [BYTES]

The pixel buffer has exactly the required size, so that reading one byte too many is detected. With BYTES, the buffer is
that many bytes too small, to verify the detection. NumPy only, because torch and sanitizers are incompatible.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from fastfundus.kernels.host import HostLibrary
from fastfundus.kernels.jobs import pack_jobs

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]


def main(library: str, cases: str, results: str, missing: int) -> None:
    host, arrays, out = HostLibrary(Path(library)), np.load(cases), {}
    for name in sorted({key.split("/")[0] for key in arrays}):
        pixels, offsets, sizes, geometry, colour, size = (arrays[f"{name}/{part}"] for part in "posgcn")
        room = libc.malloc(len(pixels) - missing)
        ctypes.memmove(room, pixels.ctypes.data, len(pixels) - missing)
        for nearest in (False, True):
            jobs, mode = pack_jobs(
                offsets, sizes, geometry, colour, out_size=int(size), available=len(pixels), nearest=nearest
            )
            for out_type, dtype in enumerate((np.float32, np.float16, np.uint16)):
                fresh = np.full((len(jobs), size, size, 3), np.nan if out_type < 2 else 0x7FC0).astype(dtype)
                job = host.sample(room, jobs, fresh.ctypes.data, int(size), fresh.itemsize, out_type, mode)
                for n in range(len(jobs)):
                    job(n)
                out[f"{name}/{nearest}/{out_type}"] = fresh
    np.savez(results, **out)


if __name__ == "__main__":
    main(*sys.argv[1:4], missing=int(sys.argv[4]) if len(sys.argv) > 4 else 0)
