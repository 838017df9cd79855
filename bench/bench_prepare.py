"""`prepare` on camera JPEGs against its peers and against its own decoder: one core and two, all in turns in one run.

    python -m bench.bench_prepare       timed, on the real camera JPEGs of FASTFUNDUS_DATA; writes bench/results
    make test                           once, tiny, on drawn photos, to see that it still works

Every variant ends with uint8 at 512 px. Only FastFundus also finds the field, cuts it out, judges kind and quality, and
hashes the file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bench.paired import environment, pinned_to, run_in_turns
from bench.parity import arguments
from bench.real_photos import DATA
from fastfundus.kernels import reference
from fastfundus.photo.decode import decode
from fastfundus.photo.header import read_header
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.plan import plan_decode
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, draw_photo

PACKAGES = (
    "torch", "torchvision", "pillow", "opencv-python-headless", "simplejpeg", "nvidia-dali-cuda130", "numpy"
)  # fmt: skip
BILINEAR = v2.Resize((512, 512), antialias=True)
BICUBIC = v2.Resize((512, 512), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def camera_jpegs() -> list[Path]:
    """The real camera files of 5 to 12 megapixels."""
    folders = ("fullres_dr", "hrf/images", "idrid/images", "eyepacs")
    paths = [path for folder in folders for path in sorted((DATA / folder).glob("*.jp*g"))]
    if len(paths) < 15:
        raise SystemExit(f"no camera photographs at {DATA}: set FASTFUNDUS_DATA to their folder")
    return paths


def pillow_torchvision(path: Path) -> np.ndarray:
    """Everything decoded, then an antialiased resize, at its fastest setting."""
    with Image.open(path) as image:
        return v2.functional.pil_to_tensor(BILINEAR(image.convert("RGB"))).numpy()


def pillow_torchvision_bicubic(path: Path) -> np.ndarray:
    """The same as RETFound and many others have it: bicubic."""
    with Image.open(path) as image:
        return v2.functional.pil_to_tensor(BICUBIC(image.convert("RGB"))).numpy()


def opencv_area(path: Path) -> np.ndarray:
    """Everything decoded, then an area average."""
    return cv2.resize(cv2.imread(str(path)), (512, 512), interpolation=cv2.INTER_AREA)


def decode_alone(path: Path) -> np.ndarray:
    """The limit: read and decode by the very plan of `prepare`."""
    data = path.read_bytes()
    header = read_header(data)
    return decode(data, header, plan_decode(header, 512))


def fastfundus(path: Path) -> np.ndarray:
    """The whole of `prepare` for one file."""
    result = prepare_photo(path, PreprocessSpec(size=512))
    assert result.image is not None, f"{path}: {result.reason}"
    return result.image


def dali(paths: Sequence[Path], threads: int) -> Callable[[], object]:
    """DALI's CPU operators: decode, then an antialiased resize."""
    from nvidia.dali import fn, pipeline_def, types

    # Not ahead of the call: in turns with others it would work while they are timed.
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
        return fn.resize(fn.decoders.image(files, device="cpu", output_type=types.RGB), size=[512, 512], antialias=True)

    built = pipeline()
    built.build()

    def run() -> object:
        (images,) = built.run()
        assert images.as_cpu().as_array().shape == (len(paths), 512, 512, 3)
        return images

    return run


def each(job: Callable[[Path], np.ndarray], paths: Sequence[Path], threads: int) -> Callable[[], object]:
    """Run a job on every file, in so many threads."""
    if threads == 1:
        return lambda: [job(path).shape for path in paths]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda path: job(path).shape, paths))


def parity(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Mean absolute difference in grey levels between a crop by the plan and one from a full decode, by file.

    The reference cuts the same piece of retina from a full decode and averages areas exactly.
    """
    found = {}
    spec = PreprocessSpec(size=512, mask_outside=False)
    for path in paths:
        result = prepare_photo(path, spec)
        exact = reference.sample(*arguments(path, spec), torch.float32)[0].permute(1, 2, 0).numpy()
        divisor = plan_decode(read_header(path.read_bytes()), 512).divisor
        found[path.name] = {"divisor": divisor, "grey_levels": float(np.abs(result.image - exact).mean())}
    return found


def measure(paths: Sequence[Path], rounds: int, *, with_dali: bool = True) -> dict[str, Any]:
    """Everything, as plain data."""
    keep_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"photos": len(paths), "rounds": rounds}
    result["megapixels"] = float(
        np.mean([np.prod(read_header(path.read_bytes()).upright_size) for path in paths]) / 1e6
    )
    result["megabytes"] = float(np.mean([path.stat().st_size for path in paths]) / 1e6)
    for cores in (1, 2):
        with pinned_to(cores):
            variants = {
                "fastfundus": each(fastfundus, paths, cores),
                "decoder alone": each(decode_alone, paths, cores),
                "Pillow + torchvision, bilinear": each(pillow_torchvision, paths, cores),
                "Pillow + torchvision, bicubic": each(pillow_torchvision_bicubic, paths, cores),
                "OpenCV, full decode + area": each(opencv_area, paths, cores),
            }
            if with_dali:
                variants["DALI CPU, decode + resize"] = dali(paths, cores)
            result[f"cores_{cores}"] = run_in_turns(variants, len(paths), rounds)
    result["parity"] = parity(paths)
    return result


def test_prepare_bench_runs(tmp_path: Path) -> None:
    """Once, on small drawn photos; the sums that the report makes of it hold."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'fastfundus[dali]'")
    paths = []
    for seed in range(2):
        path = tmp_path / f"{seed}.jpg"
        photo = draw_photo(seed, camera=CAMERAS[1], long_side=2600)
        cv2.imwrite(str(path), photo.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        paths.append(path)
    threads = cv2.getNumThreads(), torch.get_num_threads()
    result = measure(paths, 1)
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])
    assert set(result["cores_1"]) == set(result["cores_2"])
    assert len(result["cores_1"]) == 6
    for entry in result["parity"].values():
        assert entry["divisor"] == 2
        assert entry["grey_levels"] < 1.5


def main() -> None:
    """Measure on the real files and write the JSON."""
    result = {"what": "prepare to 512 px", **environment(PACKAGES), **measure(camera_jpegs(), rounds=9)}
    name = f"prepare_cpu_{time.strftime('%Y%m')}.json"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / name
    target.write_text(json.dumps(result, indent=1) + "\n")
    for cores in (1, 2):
        ours = result[f"cores_{cores}"]["fastfundus"]["ms"]
        for name, entry in result[f"cores_{cores}"].items():
            print(f"{cores} core(s)  {name:28} {entry['ms']:7.2f} ms  {entry['ms'] / ours:5.2f} x")
    worst = max(entry["grey_levels"] for entry in result["parity"].values())
    print(f"parity: {worst:.2f} grey levels at most; {target}")


if __name__ == "__main__":
    main()
