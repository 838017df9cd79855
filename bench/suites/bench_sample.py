"""`sample` on one core against its peers, interleaved in one run.

    make bench SUITES=sample        timed
    make test                       once with tiny inputs

Augmentation ends with normalised float32 for the model, unless a peer's row states otherwise. Reducing a camera photo
to 512 px starts from decoded pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from bench.gpu.suite import make_inputs, torchvision_chain
from bench.harness.comparison import Case, Variant, compare
from bench.harness.limits import copy_limit
from bench.harness.machine import pinned_to
from fastfundus.config import AugmentConfig
from fastfundus.kernels import host, reference
from fastfundus.kernels.ops import sample_ragged
from fastfundus.photo.memory import keep_memory
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import draw_epoch

LEVEL = 1 / 58
"""One grey level, in units of the normalised output."""


def albumentations_chain(size: int, *, same: bool) -> Any:
    """Build similar augmentations with Albumentations, per photo; unless `same`, a crop brings photos to `size`."""
    # Otherwise it checks the network for a newer version of itself.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A

    near = (0.85, 1.15)
    crop = A.RandomResizedCrop((size, size), scale=(0.64, 1.0), ratio=(1.0, 1.0), interpolation=cv2.INTER_AREA)
    return A.Compose(
        [
            *([] if same else [crop]),
            A.Affine(scale=(1.0, 1.25) if same else 1.0, rotate=(-15, 15), p=1.0),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(near, near, near, (-6 / 360, 6 / 360), p=1.0),
            A.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def first(images: Any) -> np.ndarray:
    """Return the result of a variant as float32 [N, H, W, 3]."""
    if isinstance(images, torch.Tensor):
        return images.float().permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(image, np.float32) for image in images])


def farthest(got: Any, want: Any) -> float:
    """Return the largest difference."""
    return float(np.abs(first(got) - first(want)).max())


def on_average(got: Any, want: Any) -> float:
    """Return the mean difference; rounding intermediate values to grey levels costs half a level."""
    return float(np.abs(first(got) - first(want)).mean())


def in_the_mean(got: Any, want: Any) -> float:
    """Return the difference of the means, for variants that draw their own augmentations."""
    got, want = first(got), first(want)
    return float(abs(got.mean() - want.mean())) if got.shape == want.shape else float("inf")


def augmenting(side: int, size: int, count: int) -> tuple[Case, list[Variant]]:
    """Build the case of augmenting `count` photos of `side` pixels to `size`; ours is checked against the reference."""
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    drawn = draw_epoch(AugmentConfig(), PreprocessSpec(size=size), count, seed=0, epoch=0)
    geometry, colour = torch.from_numpy(drawn.geometry), torch.from_numpy(drawn.colour)
    geometry *= side / size
    arrays = images.numpy()
    planes = images.permute(0, 3, 1, 2).contiguous()
    chain = torchvision_chain(size)
    # OpenCV measures positions from pixel centres.
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

    place = torch.arange(count) * 3 * side * side, torch.tensor([[side, side]] * count, dtype=torch.int32)
    given = images.view(-1), *place, geometry, colour, size
    want = reference.sample(*given, torch.float32)
    looked_at = torch.linalg.det(geometry[:, :, :2].double()).abs().clamp(max=(side / size) ** 2).sum()
    bytes_ = int(size * size * (3 * looked_at + 12 * count))
    same = side == size
    case = Case(
        f"augment at {size} px" if same else f"augment {side} to {size} px",
        f"{count} photos uint8 [{side}, {side}, 3] to float32 [{size}, {size}, 3]", count, bytes_,
        "3 bytes read per source pixel under the output, 12 written per output pixel", limit=copy_limit(bytes_),
    )  # fmt: skip
    # The photos are noise: interpolating four pixels where the area covers more gives different noise.
    like = (0.5 * LEVEL, on_average) if same else (0.5, in_the_mean)
    albumentations = albumentations_chain(size, same=same)
    return case, [
        Variant("FastFundus, float32", lambda: sample_ragged(*given, torch.float32), True, "", 1e-3,
                lambda got, _: farthest(got, want)),
        Variant("FastFundus, bfloat16", lambda: sample_ragged(*given, torch.bfloat16),
                tolerance=2e-2, distance=farthest),
        Variant("OpenCV, warpAffine + transform", opencv, False,
                "same matrices, intermediate values rounded to grey levels" if same
                else f"at {side} px bilinear, without area averaging", *like),
        Variant("Albumentations, photo by photo", lambda: [albumentations(image=image)["image"] for image in arrays],
                False, "one affine transform, implemented with OpenCV" if same
                else f"at {side} px preceded by an area-averaged crop",
                0.5, in_the_mean),
        Variant("torchvision v2, photo by photo", lambda: torch.stack([chain(image) for image in planes]),
                False, "uint8 until normalisation", 0.5, in_the_mean),
        Variant("torchvision v2, one draw for the batch", lambda: chain(planes), False, "uint8 until normalisation",
                0.5, in_the_mean),
    ]  # fmt: skip


def minifying(height: int, width: int, size: int, count: int) -> tuple[Case, list[Variant]]:
    """Build the case of reducing the central square of decoded camera photos to `size` by exact areas."""
    inputs = make_inputs("", height, width, count, size, torch.float32, turned=False)
    colour = torch.eye(3, 4).repeat(count, 1, 1)
    given = inputs.pixels, inputs.offsets, inputs.sizes, inputs.geometry, colour, size
    want = reference.sample(*given, torch.float32)
    images = inputs.pixels.view(count, height, width, 3).numpy()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    squares = [image[top : top + side, left : left + side] for image in images]
    planes = torch.from_numpy(np.ascontiguousarray(squares)).permute(0, 3, 1, 2).contiguous()
    resize = v2.Resize((size, size), antialias=True)

    def opencv() -> list[np.ndarray]:
        return [cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA) for square in squares]

    bytes_ = count * (3 * side * side + 12 * size * size)
    case = Case(
        f"{width}x{height} to {size} px", f"central squares of {count} decoded photos", count, bytes_,
        "3 bytes read per pixel of the central square, 12 written per output pixel", limit=copy_limit(bytes_),
    )  # fmt: skip
    return case, [
        # In grey levels: float32 positions lose precision at thousands of pixels.
        Variant("FastFundus", lambda: sample_ragged(*given), True, "", 0.05, lambda got, _: farthest(got, want)),
        # OpenCV rounds to whole grey levels.
        Variant("OpenCV, INTER_AREA", opencv, False, "exact area averages", 0.51, farthest),
        Variant("torchvision v2, Resize", lambda: torch.stack([resize(image) for image in planes]), False,
                "antialiased, with a triangle filter twice as wide as the box", 12.0, on_average),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """Restrict a test to one core and the libraries to one thread."""
    loaded = host.load()
    assert loaded.library is not None, loaded.reason
    keep_memory()
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with pinned_to(1):
        yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.filterwarnings("ignore")  # the peers' own warnings
def test_augment(benchmark: Any, side: int) -> None:
    """Measure crop, rotation, flip, colour jitter and normalisation.

    Larger photos are averaged by area, as when reading from files or in the first epochs of a run.
    """
    case, variants = augmenting(*((side // 8, 64, 2) if benchmark.disabled else (side, 512, 16)))
    assert len(compare(case, variants, rounds=9, benchmark=benchmark)["variants"]) == 6


def test_minify(benchmark: Any) -> None:
    """Measure the reduction of a camera photo to the model's input size."""
    case, variants = minifying(*((90, 140, 64, 2) if benchmark.disabled else (2592, 3872, 512, 4)))
    assert len(compare(case, variants, rounds=9, benchmark=benchmark)["variants"]) == 3
