"""Kernels measured against the copy bandwidth of the same run; called by `gpu_suite.sh` after the tests.

Each case knows the minimum bytes it must move: the source pixels under its outputs, each read once, and the outputs,
each written once. The time for these bytes at copy bandwidth is the limit. Kernels, the CUDA twin and peers
are interleaved, every timed output is compared, and a case with a wrong output is reported without a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cuda_twin import CudaTwin
from bench.gpu.part import measured, started, tests_of, write_part
from bench.harness.comparison import Case, Limit, Variant, compare
from bench.harness.limits import copy_limit
from fastfundus.kernels import host, reference
from fastfundus.kernels import sample as triton_sample
from fastfundus.kernels.ops import DTYPES, packed


@dataclass(frozen=True)
class Inputs:
    """Photos and matrices for sampling, and the minimum bytes it must move."""

    name: str
    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    geometry: Tensor
    colour: Tensor
    out_size: int
    dtype: torch.dtype

    @property
    def given(self) -> tuple[Any, ...]:
        """All arguments of a kernel except the pixels."""
        return self.offsets, self.sizes, self.geometry, self.colour, self.out_size, self.dtype

    @property
    def source_bytes(self) -> int:
        """3 bytes for each source pixel under the output; an output pixel covers the area of the determinant."""
        areas = torch.linalg.det(self.geometry[:, :, :2].double()).abs() * self.out_size**2
        return int(3 * torch.minimum(areas, self.sizes.double().prod(dim=1)).sum())

    @property
    def output_bytes(self) -> int:
        """3 channels of the output dtype for each output pixel."""
        return len(self.sizes) * 3 * self.out_size**2 * torch.empty(0, dtype=self.dtype).element_size()


def make_inputs(
    name: str, height: int, width: int, count: int, out_size: int, dtype: torch.dtype, *, turned: bool
) -> Inputs:
    """Make random photos of one size, each with a geometry that covers most of it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count * 3 * height * width,), dtype=torch.uint8, generator=generator)
    side = min(height, width)
    angle = torch.rand(count, generator=generator) * 0.5 - 0.25 if turned else torch.zeros(count)
    scale = side / out_size * (0.9 if turned else 1.0)
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    centre = torch.tensor([width / 2, height / 2])
    shift = centre - linear @ torch.full((2,), out_size / 2)
    colour = torch.cat([torch.eye(3) / 58, torch.full((3, 1), -2.0)], dim=1).repeat(count, 1, 1)
    sizes = torch.tensor([[height, width]], dtype=torch.int32).repeat(count, 1)
    offsets = torch.arange(count) * (3 * height * width)
    geometry = torch.cat([linear, shift[:, :, None]], dim=2)
    return Inputs(name, pixels, offsets, sizes, geometry, colour, out_size, dtype)


def all_inputs(dry_run: bool) -> list[Inputs]:
    """Return inputs for sampling as in training, and for reducing camera photos to the model's input size."""
    small, count, camera, few = (16, 2, (40, 60), 2) if dry_run else (512, 128, (2592, 3872), 32)
    same = f"sample {small} to {small}"
    found = [make_inputs(same, small, small, count, small, dtype, turned=True) for dtype in DTYPES]
    whole = f"sample ragged {camera[1]}x{camera[0]} to {small}"
    found.append(make_inputs(whole, *camera, few, small, DTYPES[2], turned=False))
    found.append(make_inputs(f"sample ragged, rotated, to {small}", *camera, few, small, DTYPES[2], turned=True))
    return found


ALLOWED = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Tolerances by dtype, for outputs between -2 and 2.4: one rounding of the type, doubled because Triton's interpreter
truncates, and the rounding of positions at 4,000 pixels."""


def sampling(inputs: Inputs, device: torch.device, twin: CudaTwin | None, copy: Limit) -> tuple[Case, list[Variant]]:
    """Build the case of Triton's kernel and, if given, its CUDA twin; the first photo is checked with the reference."""
    pixels = inputs.pixels.to(device)
    jobs, mode = packed(pixels, *inputs.given[:-1])
    first = (value[:1] for value in inputs.given[:4])
    want = reference.sample(inputs.pixels, *first, inputs.out_size, torch.float32)

    def from_reference(got: Tensor, _: Tensor) -> float:
        return float((got[:1].float().cpu() - want).abs().max())

    def triton() -> Tensor:
        return triton_sample.launch(pixels, jobs, inputs.out_size, inputs.dtype, mode).permute(0, 3, 1, 2)

    ways: dict[str, Callable[[], Tensor]] = {"Triton": triton}
    if twin is not None:
        ways["CUDA"] = lambda: twin.sample(pixels, *inputs.given)
    total = inputs.source_bytes + inputs.output_bytes
    kind = str(inputs.dtype).removeprefix("torch.")
    case = Case(
        f"{inputs.name}, {kind}", f"{len(inputs.sizes)} photos", len(inputs.sizes), total,
        "3 bytes read per source pixel under the output, 3 values written per output pixel",
        limit=Limit(copy.what, total * copy.ms),
    )  # fmt: skip
    return case, [
        Variant(name, job, name == "Triton", "", ALLOWED[inputs.dtype], from_reference) for name, job in ways.items()
    ]


def torchvision_chain(size: int) -> Callable[[Tensor], Tensor]:
    """Build the same augmentations with torchvision; a batch shares one random draw, its fastest setting."""
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.64, 1.0), ratio=(1.0, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15, interpolation=bilinear),
            v2.ColorJitter(0.15, 0.15, 0.15, 6 / 360),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def augmenting(device: torch.device, dry_run: bool) -> tuple[Case, list[Variant]]:
    """Build the case of training augmentation by our kernel and by torchvision's transforms, eager and compiled."""
    chain = torchvision_chain(16 if dry_run else 512)
    size, count = (16, 2) if dry_run else (512, 128)
    inputs = make_inputs("", size, size, count, size, torch.float32, turned=True)
    pixels = inputs.pixels.to(device)
    jobs, mode = packed(pixels, *inputs.given[:-1])
    planes = pixels.view(count, size, size, 3).permute(0, 3, 1, 2).contiguous()

    def mean_apart(got: Tensor, want: Tensor) -> float:
        # The photos are noise: each variant draws its own augmentations and scales in its own way.
        return float((got.mean() - want.mean()).abs()) if got.numel() == want.numel() else float("inf")

    def triton() -> Tensor:
        return triton_sample.launch(pixels, jobs, size, torch.float32, mode)

    def drawn_alike(transform: Callable[[Tensor], Tensor]) -> Tensor:
        # Every call draws the same augmentation: an extreme one would move the mean beyond what is allowed.
        torch.manual_seed(0)
        return transform(planes)

    variants = [
        Variant("Triton", triton, True, distance=mean_apart),
        Variant("torchvision v2", lambda: drawn_alike(chain), False, "one random draw per batch", 0.5, mean_apart),
    ]
    if device.type == "cuda":
        compiled = torch.compile(chain)
        try:
            compiled(planes)
            variants.append(
                Variant(
                    "torchvision v2, compiled",
                    lambda: drawn_alike(compiled),
                    False,
                    "one random draw per batch",
                    0.5,
                    mean_apart,
                )
            )
        except RuntimeError as error:
            print(f"torchvision v2 does not compile: {str(error)[:200]}", flush=True)
    return Case(f"augment at {size} px", f"{count} photos uint8 to float32", count), variants


def decoding(dry_run: bool) -> tuple[Case, list[Variant]]:
    """Build the case of DALI's decoder alone, by the share of photos that the hardware units decode."""
    import cv2

    from fastfundus.dali.decode import DaliDecoder
    from fastfundus.synthetic import draw_photo

    on_gpu = torch.cuda.is_available() and not dry_run
    side, count = (3456, 64) if on_gpu else (256, 4)
    drawn = [draw_photo(seed=seed, long_side=side).image[..., ::-1] for seed in range(4)]
    files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes() for image in drawn] * (count // 4)

    def apart(got: Any, want: Any) -> float:
        if got[1] or want[1] or len(got[0].pixels) != len(want[0].pixels):
            return float("inf")
        # The units round transforms and colours differently; comparing a part of the pixels suffices.
        one, other = (photos.pixels[: 3 * side * side].float() for photos in (got[0], want[0]))
        return float((one - other).abs().mean())

    variants = []
    for load in (0.0, 0.65, 1.0) if on_gpu else (0.0,):
        decoder = DaliDecoder(device_id=0 if on_gpu else None, batch_size=count, hw_decoder_load=load)
        name = f"DALI, hw_decoder_load {load}"
        variants.append(Variant(name, lambda decoder=decoder: decoder.decode(files), load == 0.0, "", 3.0, apart))  # type: ignore[misc]
    megapixels = drawn[0].shape[0] * drawn[0].shape[1] / 1e6
    return Case("decode", f"{count} JPEGs of {megapixels:.1f} megapixels", count, sum(map(len, files))), variants


def main() -> int:
    """Measure the kernels, print and write the result of each case, and return the exit status."""
    options, device, metadata = started("tests")
    dry_run: bool = options.dry_run
    # Limit of one byte, read or written.
    copy = copy_limit(1, device=device.type, size=1 << 16 if dry_run else 1 << 30)
    metadata |= {
        "tests": tests_of(options.tests),
        "copy_gb_per_s": 1e-6 / copy.ms,
        "host": {"compiled": host.load().library is not None},
    }
    found: list[dict[str, Any]] = []

    def measure(name: str, job: Callable[..., tuple[Case, list[Variant]]], *arguments: Any, rounds: int) -> None:
        torch.manual_seed(0)  # some variants draw random augmentations
        try:
            found.append(measured(name, lambda: compare(*job(*arguments), rounds=rounds, device=device.type)))
        except ImportError as error:
            print(f"{name} was skipped: {error}", flush=True)
            return
        print(json.dumps(found[-1]), flush=True)
        write_part(options.output, "kernels", metadata, found)

    many, few = (2, 2) if dry_run else (30, 7)
    with tempfile.TemporaryDirectory() as folder:
        # Without a GPU the twin is only compiled; its arithmetic is the same as that of the host's build.
        twin = CudaTwin.build(Path(folder))
        for inputs in all_inputs(dry_run):
            measure(inputs.name, sampling, inputs, device, None if dry_run else twin, copy, rounds=many)
    measure("augment", augmenting, device, dry_run, rounds=few)
    measure("decode", decoding, dry_run, rounds=few)
    return 1 if any("failed" in case for case in found) else 0


if __name__ == "__main__":
    sys.exit(main())
