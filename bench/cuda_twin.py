"""csrc's CUDA kernels on torch's memory, through the C launcher: to check and to time them on a machine with a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastfundus.kernels.ops import DTYPES, packed

CSRC = Path(__file__).parents[1] / "csrc"


class CudaTwin:
    """The library that `make -C csrc library` builds."""

    def __init__(self, path: Path) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._launch = ctypes.CDLL(str(path)).fastfundus_launch_sample
        self._launch.argtypes = [pointer, pointer, ctypes.c_int64, pointer, number, number, number, pointer]
        self._launch.restype = ctypes.c_int32

    @classmethod
    def build(cls, folder: Path) -> CudaTwin:
        """Compile with nvcc into `folder`, and load."""
        subprocess.run(["make", "-s", "-C", str(CSRC), f"BUILD={folder}", "library"], check=True, capture_output=True)
        return cls(folder / "libfastfundus_sample.so")

    def sample(
        self, pixels: Tensor, offsets: Tensor, sizes: Tensor, geometry: Tensor, colour: Tensor, out_size: int,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """As `kernels.ops.sample_ragged`, on a GPU."""
        jobs, mode = packed(pixels, offsets, sizes, geometry, colour, out_size)
        there = torch.from_numpy(jobs.view(np.uint8)).to(pixels.device)
        out = torch.empty(len(jobs), out_size, out_size, 3, dtype=dtype, device=pixels.device)
        error = self._launch(
            pixels.data_ptr(), there.data_ptr(), len(jobs), out.data_ptr(), out_size, DTYPES.index(dtype), mode,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"the CUDA twin did not start: error {error}")
        return out.permute(0, 3, 1, 2)
