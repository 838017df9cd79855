"""csrc's CUDA kernels on torch tensors, called through the C launcher, for checks and timing on a GPU machine."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import ROOT
from fastfundus.kernels.ops import DTYPES, packed

CSRC = ROOT / "csrc"


class CudaTwin:
    """The library built by `make -C csrc library`."""

    def __init__(self, path: Path) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._launch = ctypes.CDLL(str(path)).fastfundus_launch_sample
        self._launch.argtypes = [pointer, pointer, ctypes.c_int64, pointer, number, number, number, pointer]
        self._launch.restype = ctypes.c_int32

    @classmethod
    def build(cls, folder: Path) -> CudaTwin:
        """Compile the library with nvcc into `folder`, and load it."""
        subprocess.run(["make", "-s", "-C", str(CSRC), f"BUILD={folder}", "library"], check=True, capture_output=True)
        return cls(folder / "libfastfundus_sample.so")

    def sample(
        self, pixels: Tensor, offsets: Tensor, sizes: Tensor, geometry: Tensor, colour: Tensor, out_size: int,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Sample photos on a GPU; see `kernels.ops.sample_ragged`."""
        jobs, mode = packed(pixels, offsets, sizes, geometry, colour, out_size)
        there = torch.from_numpy(jobs.view(np.uint8)).to(pixels.device)
        out = torch.empty(len(jobs), out_size, out_size, 3, dtype=dtype, device=pixels.device)
        error = self._launch(
            pixels.data_ptr(), there.data_ptr(), len(jobs), out.data_ptr(), out_size, DTYPES.index(dtype), mode,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"the CUDA twin's kernel failed to launch: error {error}")
        return out.permute(0, 3, 1, 2)
