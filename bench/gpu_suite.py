"""Measures the kernels against the copy bandwidth of the same run; `gpu_suite.sh` calls it after the tests.

A case knows the bytes that it cannot do without: source pixels under its outputs, each read once, and outputs, each
written once. The time that these take at the copy bandwidth is the limit. Every timed output is compared with the
reference, and a case that differs is reported without a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cuda_twin import CudaTwin
from bench.harness import Clock, quartiles
from bench.machine import environment
from fastfundus.kernels import cell_sums as triton_cell_sums
from fastfundus.kernels import host, reference
from fastfundus.kernels import sample as triton_sample
from fastfundus.kernels.ops import DTYPES, packed


@dataclass(frozen=True)
class Case:
    """Photos and matrices, and the bytes that sampling them cannot do without."""

    name: str
    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    geometry: Tensor
    colour: Tensor
    out_size: int
    dtype: torch.dtype

    @property
    def source_bytes(self) -> int:
        """3 bytes for each source pixel under the output: its area is the determinant, per output pixel."""
        areas = torch.linalg.det(self.geometry[:, :, :2].double()).abs() * self.out_size**2
        return int(3 * torch.minimum(areas, self.sizes.double().prod(dim=1)).sum())

    @property
    def output_bytes(self) -> int:
        """3 channels of the output type for each output pixel."""
        return len(self.sizes) * 3 * self.out_size**2 * torch.empty(0, dtype=self.dtype).element_size()


def make_case(name: str, height: int, width: int, count: int, out_size: int, dtype: torch.dtype, turned: bool) -> Case:
    """Random photos of one size, each under a geometry that covers most of it."""
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
    return Case(name, pixels, offsets, sizes, geometry, colour, out_size, dtype)


def cases(dry_run: bool) -> list[Case]:
    """Training's sampling, and camera files brought to the model's size."""
    small, count, camera, few = (16, 2, (40, 60), 2) if dry_run else (512, 128, (2592, 3872), 32)
    found = [make_case(f"sample {small} to {small}", small, small, count, small, dtype, True) for dtype in DTYPES]
    found.append(make_case(f"sample ragged {camera[1]}x{camera[0]} to {small}", *camera, few, small, DTYPES[2], False))
    found.append(make_case(f"sample ragged, turned, to {small}", *camera, few, small, DTYPES[2], True))
    return found


def timed(job: Callable[[], object], device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of a call on the device: median and quartiles; caches are flushed before each."""
    clock, warm = Clock(device.type), 3 if device.type == "cuda" else 1
    return quartiles([clock.time(job)[0] for _ in range(rounds + warm)][warm:])


def copy_bandwidth(device: torch.device, dry_run: bool) -> float:
    """GB/s of a copy of memory to memory, read and written bytes together."""
    size = 1 << 16 if dry_run else 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timed(lambda: target.copy_(source), device, 20)["ms"] / 1e6


def launcher(case: Case, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Tensor], float]]:
    """What samples the case by Triton on the device, and what compares a result with the reference."""
    pixels = case.pixels.to(device)
    jobs, mode = packed(pixels, case.offsets, case.sizes, case.geometry, case.colour, case.out_size)

    def run() -> Tensor:
        return triton_sample.launch(pixels, jobs, case.out_size, case.dtype, mode).permute(0, 3, 1, 2)

    def difference(result: Tensor) -> float:
        first = (value[:1] for value in (case.offsets, case.sizes, case.geometry, case.colour))
        want = reference.sample(case.pixels, *first, case.out_size, torch.float32)
        return float((result[:1].float().cpu() - want).abs().max())

    return run, difference


ALLOWED = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Outputs lie between -2 and 2.4: one rounding of the type, twice where Triton's interpreter cuts bits off, and the
positions' rounding at 4,000 pixels."""


def report(case: Case, times: dict[str, float], wrong: float, copy: float) -> dict[str, Any]:
    """One row: a time only where the result is right."""
    total = case.source_bytes + case.output_bytes
    row: dict[str, Any] = {
        "photos": len(case.sizes), "dtype": str(case.dtype).removeprefix("torch."), "largest_difference": wrong,
        "source_bytes": case.source_bytes, "output_bytes": case.output_bytes, "limit_ms": total / copy / 1e6,
    }  # fmt: skip
    if not wrong <= ALLOWED[case.dtype]:
        return row | {"failed": f"differs from the reference by {wrong:.3g}, {ALLOWED[case.dtype]} are allowed"}
    rate = total / times["ms"] / 1e6
    photos = 1000 * len(case.sizes) / times["ms"]
    return row | times | {"gb_per_s": rate, "share_of_copy": rate / copy, "photos_per_s": photos}


def torchvision_chain(size: int) -> Callable[[Tensor], Tensor]:
    """The same changes by torchvision, on a batch that shares one draw: its fastest setting."""
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


def peers(device: torch.device, dry_run: bool, rounds: int) -> dict[str, Any]:
    """Torchvision's transforms on the device, as they are and compiled; left out where it is not installed."""
    try:
        chain = torchvision_chain(16 if dry_run else 512)
    except ImportError as error:
        return {"torchvision v2": {"failed": str(error)}}
    size, count = (16, 2) if dry_run else (512, 128)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
    found: dict[str, dict[str, Any]] = {"torchvision v2": timed(lambda: chain(images), device, rounds)}
    if device.type == "cuda":
        compiled = torch.compile(chain)
        try:
            found["torchvision v2, compiled"] = timed(lambda: compiled(images), device, rounds)
        except RuntimeError as error:
            found["torchvision v2, compiled"] = {"failed": str(error)[:300]}
    for row in found.values():
        if "ms" in row:
            row["photos_per_s"] = 1000 * count / row["ms"]
    return found


def profile_case(device: torch.device, dry_run: bool, copy: float, rounds: int) -> dict[str, Any]:
    """The brightness of cells: every byte is read once, and next to nothing written."""
    height, width, count, bins = (40, 60, 2, 8) if dry_run else (2592, 3872, 32, 64)
    pixels = torch.randint(0, 256, (count * 3 * height * width,), dtype=torch.uint8)
    place = torch.arange(count) * (3 * height * width), torch.tensor([[height, width]] * count, dtype=torch.int32)
    there = pixels.to(device)
    result = triton_cell_sums.launch(there, *place, bins)
    right = torch.equal(result[:1].cpu(), reference.cell_sums(pixels, place[0][:1], place[1][:1], bins))
    if not right:
        return {"failed": "differs from the reference"}
    times = timed(lambda: triton_cell_sums.launch(there, *place, bins), device, rounds)
    rate = len(pixels) / times["ms"] / 1e6
    return {"photos": count, "source_bytes": len(pixels), **times, "gb_per_s": rate, "share_of_copy": rate / copy}


def decoding(dry_run: bool) -> dict[str, Any]:
    """Photos/s of DALI's decoder alone, by the share that goes to the hardware units; empty without DALI."""
    try:
        import cv2

        from fastfundus.dali.decode import DaliDecoder
        from fastfundus.synthetic import draw_photo
    except ImportError as error:
        return {"left_out": str(error)}
    on_gpu = torch.cuda.is_available() and not dry_run
    side, count = (3456, 64) if on_gpu else (256, 4)
    drawn = [draw_photo(seed=seed, long_side=side).image[..., ::-1] for seed in range(4)]
    files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes() for image in drawn] * (count // 4)
    found: dict[str, Any] = {"megapixels": drawn[0].shape[0] * drawn[0].shape[1] / 1e6}
    for load in (0.0, 0.65, 1.0) if on_gpu else (0.0,):
        decoder = DaliDecoder(device_id=0 if on_gpu else None, batch_size=count, hw_decoder_load=load)
        times = timed(lambda decoder=decoder: decoder.decode(files), torch.device("cuda" if on_gpu else "cpu"), 5)
        found[f"hw_decoder_load {load}"] = {**times, "photos_per_s": 1000 * count / times["ms"]}
    return found


def tests_of(path: Path) -> dict[str, int]:
    """Counts of a JUnit file; a run that crashed leaves none."""
    if not path.is_file():
        return {"crashed": 1}
    suite = next(iter(ElementTree.parse(path).getroot()))
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def gpu_environment() -> dict[str, Any]:
    """What a result must say about the GPU and the compilers; versions as the modules tell them."""
    import triton

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "nvidia_smi": said("nvidia-smi", query, "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1:],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__},
    }


def main() -> int:
    """Measure, write one JSON, print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    dry_run: bool = options.dry_run
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: run on a machine that has one, or with --dry-run")
    device, rounds = torch.device("cpu" if dry_run else "cuda"), 2 if dry_run else 30
    copy = copy_bandwidth(device, dry_run)
    result: dict[str, Any] = {
        "dry_run": dry_run,
        **environment(()),
        **gpu_environment(),
        "tests": tests_of(options.tests),
    }
    result |= {"copy_gb_per_s": copy, "triton": {}, "cuda": {}}
    with tempfile.TemporaryDirectory() as folder:
        # Without a GPU the twin is only built: that it compiles is known then, and its maths are the host's.
        twin = CudaTwin.build(Path(folder))
        for case in cases(dry_run):
            name = f"{case.name}, {str(case.dtype).removeprefix('torch.')}"
            run, difference = launcher(case, device)
            result["triton"][name] = report(case, timed(run, device, rounds), difference(run()), copy)
            if not dry_run:
                pixels = case.pixels.to(device)
                rest = case.offsets, case.sizes, case.geometry, case.colour, case.out_size, case.dtype

                def run_twin(pixels: Tensor = pixels, rest: Any = rest) -> Tensor:
                    return twin.sample(pixels, *rest)

                result["cuda"][name] = report(case, timed(run_twin, device, rounds), difference(run_twin()), copy)
    result["triton"]["field profile"] = profile_case(device, dry_run, copy, rounds)
    result["peers"] = peers(device, dry_run, rounds)
    result["dali"] = decoding(dry_run)
    result["host"] = {"compiled": host.load().library is not None}
    chip = "dry_run" if dry_run else torch.cuda.get_device_name().split()[-1].lower()
    target = options.output / f"kernels_{chip}_{time.strftime('%Y%m')}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"copy: {copy:.0f} GB/s; tests: {result['tests']}")
    for kind in ("triton", "cuda"):
        for name, row in result[kind].items():
            told = row.get("failed") or f"{row['ms']:.3f} ms, {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%}"
            print(f"{kind:7} {name:45} {told} of copy")
    for name, row in result["peers"].items():
        print(f"peer    {name:45} {row.get('failed') or format(row['photos_per_s'], '.0f') + ' photos/s'}")
    print(target)
    failed = [name for kind in ("triton", "cuda") for name, row in result[kind].items() if "failed" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
