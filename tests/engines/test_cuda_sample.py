"""Tests of the csrc kernels launched through pycuda.

Without a GPU, a test double replaces pycuda. It rejects calls that pycuda would reject, and runs the host build of the
same arithmetic on the given addresses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfundus.engines import cuda_sample
from fastfundus.engines.cuda_sample import CudaSampler, current
from fastfundus.errors import FastFundusError, MissingDependency
from fastfundus.kernels import reference
from fastfundus.kernels.ops import packed
from tests.engines.gpu_double import Gpu, install
from tests.kernels.cases import CASES, case
from tests.kernels.implementations import SAMPLERS, rounding

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def image() -> Path:
    return cuda_sample.fatbin()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    double = install(monkeypatch)
    yield double
    assert not double.current, "a context is still current"
    assert not double.retained, "a context is still retained"


@pytest.mark.parametrize("name", CASES)
def test_launches_what_the_reference_says(gpu: Gpu, image: Path, name: str) -> None:
    batch = case(name)
    jobs, mode = packed(*batch.arguments)
    room = torch.full((2 * 3 * batch.out_size**2 + 4,), np.nan)
    out = room[(-room.data_ptr() // 4) % 4 :][: 2 * 3 * batch.out_size**2]
    with CudaSampler(image) as sampler, current(sampler._context, cuda=gpu):
        stream = gpu.Stream()
        sampler.launch(
            batch.pixels.data_ptr(), jobs.ctypes.data, 2, out.data_ptr(), batch.out_size, "f32", mode, stream
        )
        assert out.isnan().all(), "the launch must be asynchronous"
        stream.synchronize()
    got = out.view(2, batch.out_size, batch.out_size, 3).permute(0, 3, 1, 2)
    assert (got - reference.sample(*batch.arguments, torch.float32)).abs().max() <= batch.grey_levels
    assert gpu.kernels == [(f"fastfundus_sample_f32_{'integrate' if mode else 'interpolate'}", stream)]


@pytest.mark.parametrize("name", CASES)
def test_grey_levels_are_rounded_and_cut_off(gpu: Gpu, image: Path, name: str) -> None:
    """Compare bytes, as engines take them, with the reference; values next to half a level may round either way."""
    batch = case(name)
    pixels, offsets, sizes, geometry, _, out_size = batch.arguments
    # A colour matrix whose results fall outside 0 to 255 on both sides.
    colour = torch.eye(4)[:3].repeat(2, 1, 1) * 4
    colour[:, :, 3] = -400
    jobs, mode = packed(pixels, offsets, sizes, geometry, colour, out_size)
    out = np.empty(2 * 3 * out_size**2 + 16, np.uint8)
    start = -out.ctypes.data % 16
    with CudaSampler(image) as sampler:
        sampler.launch(pixels.data_ptr(), jobs.ctypes.data, 2, out.ctypes.data + start, out_size, "u8", mode)
    got = torch.from_numpy(out[start : start + 2 * 3 * out_size**2]).view(2, out_size, out_size, 3).permute(0, 3, 1, 2)
    exact = reference.sample(pixels, offsets, sizes, geometry, colour, out_size, torch.float32)
    assert (got - exact.clamp(0, 255)).abs().max() <= 0.5 + 4 * batch.grey_levels
    assert exact.min() < 0 or exact.max() > 255, "the test must exercise clipping"


def test_bad_launches_are_refused(gpu: Gpu, image: Path) -> None:
    sampler = CudaSampler(image)
    with pytest.raises(
        ValueError, match="output must be one of f32, f16, bf16, u8 and mode 0, 1 or 2, got 'f64' and 0"
    ):
        sampler.launch(0, 0, 1, 0, 4, "f64", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out must be aligned to 16 bytes, got address 0x8"):
        sampler.launch(0, 0, 1, 8, 4, "f32", 0)
    with pytest.raises(ValueError, match="3000 photos of 16384 x 16384 are too many"):
        sampler.launch(0, 0, 3000, 0, 16384, "f32", 0)
    sampler.launch(0, 0, 0, 0, 4, "f32", 0)
    assert gpu.kernels == []
    sampler.close()
    sampler.close()


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingDependency, match=r"fastfundus\[tensorrt\]"):
        CudaSampler()
    monkeypatch.setattr(cuda_sample.shutil, "which", lambda name: None)
    with pytest.raises(FastFundusError, match="make -C csrc"):
        cuda_sample.fatbin()


@pytest.mark.gpu
def test_the_launcher_on_a_gpu(tmp_path: Path) -> None:
    """Run the same kernels through the C launcher, in torch's memory and on its stream."""
    from bench.gpu.cuda_twin import CudaTwin

    twin = CudaTwin.build(tmp_path)
    for name in CASES:
        batch = case(name)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = twin.sample(batch.pixels.cuda(), *batch.arguments[1:], dtype).cpu().float()
            want = reference.sample(*batch.arguments, torch.float32)
            allowed = batch.grey_levels + rounding(SAMPLERS["host"], dtype) * want.abs()
            assert ((got - want).abs() <= allowed).all(), (name, dtype)
