"""`sample` on one core against its peers, all in turns in one run.

    python -m bench.bench_sample        timed, at 512 px; writes bench/results
    make test                           once, tiny, to see that it still works

Augmenting ends with normalised float32 (or what a peer's row says) for the model; bringing a camera file to 512 px
begins with decoded pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torchvision.transforms import v2

from bench.gpu_suite import make_case, torchvision_chain
from bench.paired import environment, pinned_to, run_in_turns
from fastfundus.config import AugmentConfig
from fastfundus.kernels import host, reference
from fastfundus.kernels.ops import sample, sample_ragged
from fastfundus.photo.memory import keep_memory
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import draw_epoch

PACKAGES = ("torch", "torchvision", "opencv-python-headless", "numpy")


def augmenting(size: int, count: int) -> dict[str, Callable[[], object]]:
    """Training's augmentation of `count` photos; checked against the reference before it is timed."""
    spec = PreprocessSpec(size=size)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    geometry, colour = map(torch.from_numpy, draw_epoch(AugmentConfig(), spec, count, seed=0, epoch=0))
    arrays = images.numpy()
    planes = images.permute(0, 3, 1, 2).contiguous()
    chain = torchvision_chain(size)
    # OpenCV counts from pixel centres.
    halves = torch.tensor([0.5, 0.5])
    shift = geometry[:, :, 2] + geometry[:, :, :2] @ halves - 0.5
    warps = torch.cat([geometry[:, :, :2], shift[:, :, None]], 2).double().numpy()
    tints = colour.numpy()
    out = np.empty((count, size, size, 3), np.float32)

    def opencv() -> np.ndarray:
        for n in range(count):
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            warped = cv2.warpAffine(arrays[n], warps[n], (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT)
            cv2.transform(warped.astype(np.float32), tints[n], dst=out[n])
        return out

    place = torch.arange(count) * 3 * size * size, torch.tensor([[size, size]] * count, dtype=torch.int32)
    want = reference.sample(images.view(-1), *place, geometry, colour, size, torch.float32)
    assert (sample(images, geometry, colour, size) - want).abs().max() < 1e-3
    # One grey level is 1/58 of the output: OpenCV rounds to whole ones in between.
    assert np.abs(opencv() - want.permute(0, 2, 3, 1).numpy()).mean() < 0.5 / 58
    return {
        "FastFundus, float32": lambda: sample(images, geometry, colour, size),
        "FastFundus, bfloat16": lambda: sample(images, geometry, colour, size, torch.bfloat16),
        "OpenCV, warpAffine + transform": opencv,
        "torchvision v2, photo by photo": lambda: torch.stack([chain(image) for image in planes]),
        "torchvision v2, one draw for the batch": lambda: chain(planes),
    }


def minifying(height: int, width: int, size: int, count: int) -> dict[str, Callable[[], object]]:
    """The middle square of decoded camera files, brought to `size` with exact areas."""
    case = make_case("", height, width, count, size, torch.float32, turned=False)
    colour = torch.eye(3, 4).repeat(count, 1, 1)
    given = case.pixels, case.offsets, case.sizes, case.geometry, colour, size
    images = case.pixels.view(count, height, width, 3).numpy()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    squares = [image[top : top + side, left : left + side] for image in images]
    planes = torch.from_numpy(np.ascontiguousarray(squares)).permute(0, 3, 1, 2).contiguous()
    resize = v2.Resize((size, size), antialias=True)

    def opencv() -> list[np.ndarray]:
        return [cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA) for square in squares]

    ours = sample_ragged(*given).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.stack(opencv())).max() < 0.51
    return {
        "FastFundus": lambda: sample_ragged(*given),
        "OpenCV, INTER_AREA": opencv,
        "torchvision v2, Resize": lambda: [resize(image) for image in planes],
    }


def measure(size: int, count: int, camera: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Everything, as plain data."""
    loaded = host.load()
    assert loaded.library is not None, loaded.reason
    keep_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    few = max(2, count // 4)
    with pinned_to(1):
        parts = {
            f"augment at {size} px": run_in_turns(augmenting(size, count), count, rounds),
            f"{camera[1]}x{camera[0]} to {size} px": run_in_turns(minifying(*camera, size, few), few, rounds),
        }
    return {"photos": count, "rounds": rounds, "parts": parts}


def test_sample_bench_runs() -> None:
    """Once, tiny: the checks in it hold."""
    threads = cv2.getNumThreads(), torch.get_num_threads()
    result = measure(64, 2, (90, 140), 1)
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])
    assert [len(rows) for rows in result["parts"].values()] == [5, 3]
    assert all(row["ms"] > 0 for rows in result["parts"].values() for row in rows.values())


if __name__ == "__main__":
    result = {**environment(PACKAGES), **measure(512, 16, (2592, 3872), 9)}
    target = Path(__file__).parent / "results" / f"sample_cpu_{time.strftime('%Y%m')}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["parts"], indent=1))
