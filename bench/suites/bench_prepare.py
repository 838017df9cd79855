"""`prepare` on camera JPEGs against peers and against its own decoder, on one and two cores, interleaved in one run.

    make bench SUITES=prepare       timed, on the real camera JPEGs of FASTFUNDUS_DATA
    make test                       once with tiny synthetic photos, as a smoke test

Every variant ends with uint8 at the model's input size. Only FastFundus also finds and crops the field, runs the
fundus and quality checks, and hashes the file. Its crops are compared with exact area averages of a full decode; the
peers' results are compared with each other. Each peer has its own process, as its users run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bench.evidence.parity import arguments
from bench.harness.comparison import Case, Variant, compare
from bench.harness.machine import pinned_to
from bench.harness.own_process import OwnProcess
from bench.harness.real_photos import camera_jpegs
from bench.tables.targets import DECODER, HABIT, HABIT_KEPT
from fastfundus.kernels import reference
from fastfundus.photo.decode import decode
from fastfundus.photo.decode_plan import plan_decode
from fastfundus.photo.header import read_header
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo

Images = Sequence[np.ndarray]
OTHER_FILTER = 4.0
"""Mean grey levels by which area, triangle and cubic filters and scaling in the DCT may differ."""


def by_pillow(size: int, interpolation: v2.InterpolationMode, *, draft: bool = False) -> Callable[[Path], np.ndarray]:
    """Return a job that decodes with Pillow and resizes with antialiasing.

    With `draft`, libjpeg decodes at the smallest scale that loses nothing at `size`.
    """
    resize = v2.Resize((size, size), interpolation=interpolation, antialias=True)

    def job(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            if draft:
                image.draft("RGB", (size, size))
            return v2.functional.pil_to_tensor(resize(image.convert("RGB"))).permute(1, 2, 0).numpy()

    return job


def by_opencv(size: int, *, reduced: bool = False) -> Callable[[Path], np.ndarray]:
    """Return a job that decodes with OpenCV and resizes by area averages.

    With `reduced`, OpenCV halves the decoded size as often as `size` allows.
    """

    def job(path: Path) -> np.ndarray:
        flags = cv2.IMREAD_COLOR
        if reduced:
            with Image.open(path) as image:  # reads the header only
                scale = min(image.size) // size
            steps = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
            flags = next((flag for step, flag in steps if scale >= step), flags)
        return cv2.resize(cv2.imread(str(path), flags), (size, size), interpolation=cv2.INTER_AREA)[..., ::-1]

    return job


def decode_alone(size: int) -> Callable[[Path], np.ndarray]:
    """Return the job that sets the limit: reading and decoding with the same plan as `prepare`."""

    def job(path: Path) -> np.ndarray:
        data = path.read_bytes()
        header = read_header(data)
        return decode(data, header, plan_decode(header, size))

    return job


def ours(spec: PreprocessSpec) -> Callable[[Path], np.ndarray]:
    """Return a job that runs all of `prepare` on one file."""

    def job(path: Path) -> np.ndarray:
        result = prepare_photo(path, spec)
        assert result.image is not None, f"{path}: {result.reason}"
        return result.image

    return job


def by_dali(paths: Sequence[Path], size: int, threads: int) -> Callable[[], Images]:
    """Return a job with DALI's CPU operators: decoding, then an antialiased resize."""
    from nvidia.dali import fn, pipeline_def, types

    # No prefetching: it would work ahead while other variants are timed.
    @pipeline_def(  # type: ignore[misc]
        batch_size=len(paths),
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline() -> Any:
        files, _ = fn.readers.file(files=[str(path) for path in paths])
        decoded = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        return fn.resize(decoded, size=[size, size], antialias=True)

    built = pipeline()
    built.build()

    def run() -> Images:
        (images,) = built.run()
        return images.as_cpu().as_array()

    return run


def exact_crops(paths: Sequence[Path], size: int) -> Images:
    """Return the crops that `prepare` makes, but sampled by exact areas from a full decode; float32 [S, S, 3] each."""
    spec = PreprocessSpec(size=size)
    return [reference.sample(*arguments(path, spec), torch.float32)[0].permute(1, 2, 0).numpy() for path in paths]


def from_exact(exact: Images) -> Callable[[Images, Images], float]:
    """Return a distance function: mean grey-level difference of the worst photo's unmasked pixels.

    The distance is infinite if at least half of a photo is masked.
    """

    def distance(images: Images, _: Images) -> float:
        worst = 0.0
        for image, want in zip(images, exact, strict=True):
            kept = image.any(axis=-1)
            worst = max(worst, float(np.abs(image - want)[kept].mean()) if kept.mean() > 0.5 else np.inf)
        return worst

    return distance


def apart(images: Images, want: Images) -> float:
    """Return the mean grey-level difference of the worst photo."""
    pairs = zip(images, want, strict=True)
    return max(float(np.abs(np.subtract(image, other, dtype=np.float32)).mean()) for image, other in pairs)


def in_colour(images: Images, want: Images) -> float:
    """Return the largest difference of mean colours in grey levels, for images decoded at different sizes."""
    pairs = zip(images, want, strict=True)
    return max(float(np.abs(image.mean((0, 1)) - other.mean((0, 1))).max()) for image, other in pairs)


def each(job: Callable[[Path], np.ndarray], paths: Sequence[Path], threads: int) -> Callable[[], Images]:
    """Return a job over all files in `threads` threads; the libraries use no threads of their own."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if threads == 1:
        return lambda: [job(path) for path in paths]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(job, paths))


def peer(
    make: Callable[..., Callable[[Path], np.ndarray]], paths: Sequence[Path], threads: int, arguments: dict[str, Any]
) -> Callable[[], Images]:
    """Build a job in the process where this is called, and return it applied to all files; see `each`."""
    return each(make(**arguments), paths, threads)


def preparing(paths: Sequence[Path], size: int, threads: int, *, here: bool) -> tuple[Case, list[Variant]]:
    """Build the case and its variants; peers run in this process if `here`."""

    def own(make: Callable[..., Callable[[Path], np.ndarray]], **arguments: Any) -> OwnProcess:
        return OwnProcess(peer, make, paths, threads, {"size": size, **arguments}, here=here)

    bilinear, bicubic = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC
    megapixels = np.mean([np.prod(read_header(path.read_bytes()).upright_size) for path in paths]) / 1e6
    total = sum(path.stat().st_size for path in paths)
    case = Case(
        f"prepare, {threads} {'core' if threads == 1 else 'cores'}",
        f"{len(paths)} camera JPEGs of {megapixels:.1f} megapixels and {total / len(paths) / 1e6:.1f} MB on average to "
        f"uint8 [{size}, {size}, 3]",
        units=len(paths), bytes=total + len(paths) * 3 * size * size,
        bytes_how="the files read, 3 bytes written per output pixel", limit=DECODER,
    )  # fmt: skip
    peers = [
        (
            HABIT_KEPT,
            each(by_pillow(size, bilinear), paths, threads),
            "bilinear, with FastFundus's malloc settings",
        ),
        (
            "Pillow + torchvision, bicubic",
            own(by_pillow, interpolation=bicubic),
            "as in RETFound and many other repositories",
        ),
        (
            "Pillow by draft + torchvision",
            own(by_pillow, interpolation=bilinear, draft=True),
            "DCT-domain scaling, rarely used",
        ),
        ("OpenCV + area", own(by_opencv), "full decode"),
        ("OpenCV reduced + area", own(by_opencv, reduced=True), "DCT-domain scaling, rarely used"),
        ("DALI CPU", OwnProcess(by_dali, paths, size, threads, here=here), "full decode, antialiased resize"),
    ]
    habit = own(by_pillow, interpolation=bilinear)
    return case, [
        Variant("FastFundus", each(ours(PreprocessSpec(size=size)), paths, threads), False,
                "decode, field detection, crop, quality check, hash", 1.5,
                from_exact(exact_crops(paths, size))),
        Variant(DECODER, each(decode_alone(size), paths, threads), False, "upper bound, same decode plan", 1.5,
                in_colour),
        Variant(HABIT, habit, True, "typical PyTorch pipeline, the baseline", distance=apart),
        *(Variant(name, job, False, settings, OTHER_FILTER, apart) for name, job, settings in peers),
    ]  # fmt: skip


def drawn_jpegs(folder: Path) -> list[Path]:
    """Write two small synthetic JPEGs."""
    paths = []
    for seed in range(2):
        photo = draw_photo(seed, camera=CAMERAS[1], long_side=640)
        paths.append(folder / f"{seed}.jpg")
        cv2.imwrite(str(paths[-1]), photo.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return paths


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the thread counts of the libraries after a test."""
    keep_memory()
    threads = cv2.getNumThreads(), torch.get_num_threads()
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.parametrize("cores", [1, 2])
def test_prepare(benchmark: Any, tmp_path: Path, cores: int) -> None:
    """Measure the path from file to uint8 photo."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'fastfundus[dali]'")
    paths, size = (drawn_jpegs(tmp_path), 128) if benchmark.disabled else (camera_jpegs(), 512)
    with pinned_to(cores):
        found = compare(*preparing(paths, size, cores, here=benchmark.disabled), rounds=9, benchmark=benchmark)
    assert len(found["variants"]) == 9
