"""Scaling of screening, and a check of its cost model on networks and photos that the model was not fitted to.

    python -m bench.suites.bench_cost [--output bench/results/cost_cpu_YYYYMM.json]

Scaling: photos/s by number of cores, batch size, image size and backbone; memory and time for manifests of up to a
million photos. Cost model: core-seconds to prepare one photo, fitted to synthetic JPEGs of many sizes and qualities,
and core-seconds of the engine per GFLOP, fitted to small networks. The model then predicts other networks at other
sizes on photos from real cameras (FASTFUNDUS_DATA), which are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from bench import RESULTS
from bench.harness.machine import environment
from bench.harness.real_photos import DATA, need
from bench.suites.bench_screen import bundle_of
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.openvino_backend import precisions
from fastfundus.records import SourcePhoto
from fastfundus.sizing.cost import Machine, PhotoCost, PhotoKind, fit_photo_cost, kind_of, predict
from fastfundus.sizing.throughput import engine_rate, prepare_rate, screen_rate
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo

CORES = os.cpu_count() or 1
FITTED = (("resnet18", 224), ("resnet18", 384), ("resnet34", 320))
CHECKED = (("resnet50", 512), ("resnet50", 224), ("resnet18", 512))
WIDTHS, QUALITIES = (1024, 1600, 2304, 3072, 4096), (75, 92, 97)
MANIFESTS = (10_000, 100_000, 1_000_000)


def several(paths: list[Path], count: int) -> list[SourcePhoto]:
    """Return `count` photos that repeat the given files under different names."""
    return [SourcePhoto(paths[n % len(paths)], f"{n}.jpg", f"p{n}") for n in range(count)]


def fit_preparing(folder: Path, spec: PreprocessSpec, seconds: float) -> tuple[PhotoCost, list[dict[str, Any]]]:
    """Measure the core-seconds of synthetic photos by size and quality, and fit the cost to them."""
    kinds, costs = [], []
    for width in WIDTHS:
        image = draw_photo(width, lesions=("drusen",), long_side=width).image[..., ::-1]
        for quality in QUALITIES:
            path = folder / f"{width}_{quality}.jpg"
            cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            kinds.append(kind_of(path.read_bytes(), spec))
            costs.append(prepare_rate(several([path], 16 * CORES), spec, seconds).core_seconds)
    fitted = fit_photo_cost(kinds, costs)
    rows = [
        {**asdict(kind), "measured_s": cost, "fitted_s": fitted.seconds(kind)}
        for kind, cost in zip(kinds, costs, strict=True)
    ]
    return fitted, rows


def pixels_of(size: int) -> np.ndarray:
    """Return random photos for an engine; its speed does not depend on their content."""
    return np.random.default_rng(0).integers(0, 256, (16, size, size, 3), dtype=np.uint8)


def engine_seconds(bundle: Bundle, seconds: float) -> float:
    """Measure the engine's core-seconds per photo."""
    with bundle.load() as engine:
        return engine_rate(engine, pixels_of(bundle.spec.size), seconds).core_seconds


def built(folder: Path, backbone: str, size: int, precision: str) -> Bundle:
    """Open a bundle with random weights, building it first if it does not exist."""
    place = folder / f"{backbone}_{size}_{precision}"
    return Bundle.open(place) if place.exists() else bundle_of(backbone, size, precision, place)[0]


def predictions(folder: Path, precision: str, seconds: float) -> dict[str, Any]:
    """Fit the model to synthetic photos and small networks, then predict and measure others."""
    of_gflop, rows = [], []
    for backbone, size in FITTED:
        bundle = built(folder, backbone, size, precision)
        cost, gflop = engine_seconds(bundle, seconds), float(bundle.metadata["gflop"])
        of_gflop.append(cost / gflop)
        rows.append({"backbone": backbone, "size": size, "gflop": gflop, "core_s": cost})
    rate = float(np.median(of_gflop))
    need(DATA / "fullres_dr")
    cameras = sorted((DATA / "fullres_dr").rglob("*.jp*g"))
    checks = []
    for backbone, size in CHECKED:
        bundle = built(folder, backbone, size, precision)
        drawn = folder / f"drawn_{size}"
        drawn.mkdir(exist_ok=True)
        cost, fit = fit_preparing(drawn, bundle.spec, seconds / 4)
        photos = several(cameras, 96)
        kinds = [kind_of(path.read_bytes(), bundle.spec) for path in cameras]
        mean = PhotoKind(*(float(np.mean([getattr(kind, name) for kind in kinds])) for name in asdict(kinds[0])))
        gflop = float(bundle.metadata["gflop"])
        prediction = predict(
            Machine(CORES), prepare_s=cost.seconds(mean), megabytes=mean.megabytes, engine_s=rate * gflop
        )
        measured, _ = screen_rate(photos, bundle, 2 * seconds)
        checks.append(
            {
                "backbone": backbone,
                "size": size,
                "gflop": gflop,
                "cost": asdict(cost),
                "fit": fit,
                "photos": asdict(mean),
                "predicted": asdict(prediction),
                "measured": asdict(measured),
                "prepare": {"predicted_s": cost.seconds(mean),
                            "measured_s": prepare_rate(photos, bundle.spec, seconds).core_seconds},
                "engine": {"predicted_s": rate * gflop, "measured_s": engine_seconds(bundle, seconds)},
            }
        )  # fmt: skip
        print(backbone, size, precision, prediction.photos_per_s, measured.photos_per_s, flush=True)
    return {"s_per_gflop": rate, "fitted_on": rows, "checks": checks}


def over_cores(folder: Path, precision: str, seconds: float) -> list[dict[str, Any]]:
    """Measure photos/s of preparation and of the engine by cores, each in a process limited to these cores."""
    bundle = built(folder, "resnet50", 512, precision)
    found = []
    for cores in range(1, CORES + 1):
        for part in ("prepare", "engine"):
            arguments = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "bench.suites.bench_cost",
                "--part",
                part,
                str(bundle.path),
            ]
            done = subprocess.run(
                ["taskset", "-c", f"0-{cores - 1}", *arguments, "--seconds", str(seconds)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found.append({"cores": cores, "part": part, "photos_per_s": float(done.stdout.splitlines()[-1])})
            print(found[-1], flush=True)
    return found


def one_part(part: str, path: Path, seconds: float) -> float:
    """Measure photos/s of one stage on the cores available to this process."""
    bundle = Bundle.open(path)
    if part == "engine":
        with bundle.load() as engine:
            return engine_rate(engine, pixels_of(bundle.spec.size), seconds).photos_per_s
    from fastfundus.screening import decode_pool

    os.cpu_count = lambda: len(os.sched_getaffinity(0))  # type: ignore[assignment]
    assert decode_pool.os is os
    cameras = sorted((DATA / "fullres_dr").rglob("*.jp*g"))
    return prepare_rate(several(cameras, 32), bundle.spec, seconds).photos_per_s


def over_batch(bundle: Bundle, seconds: float) -> list[dict[str, Any]]:
    """Measure the engine's photos/s by the number of photos per call."""
    pixels = pixels_of(bundle.spec.size)
    with bundle.load() as engine:
        rates = {count: engine_rate(engine, pixels[:count], seconds).photos_per_s for count in (1, 2, 4, 8, 16)}
    return [{"batch": count, "photos_per_s": rate} for count, rate in rates.items()]


MANIFEST = """
import sys, time
from pathlib import Path
from fastfundus.config import DataConfig
from fastfundus.data import PhotoCache
from fastfundus.data.split import assign_splits
began = time.perf_counter()
cache = PhotoCache.open(Path(sys.argv[1]))
opened = time.perf_counter()
split = assign_splits(cache.manifest, cache.manifest["abnormal"].to_numpy().astype(int), DataConfig(), [])
status = Path("/proc/self/status").read_text()
print(opened - began, time.perf_counter() - opened, int(status.split("VmHWM:")[1].split()[0]) / 1024, len(split.names))
"""


def over_manifest(folder: Path, small: SmallCache, counts: tuple[int, ...] = MANIFESTS) -> list[dict[str, Any]]:
    """Measure time and memory to open a cache and split it by patient, for up to a million photos of 32 px.

    The manifest has the real columns and synthetic rows; the file of pixels is sparse.
    """
    found = []
    for count in counts:
        place = folder / f"rows_{count}"
        small.grown_to(count, place)
        done = subprocess.run([sys.executable, "-c", MANIFEST, place], capture_output=True, text=True, check=True)
        opened, split, mib, names = map(float, done.stdout.split())
        assert names == count
        found.append({"photos": count, "open_s": opened, "split_s": split, "peak_mib": mib})
        print(found[-1], flush=True)
    return found


class SmallCache:
    """A small cache of synthetic photos, whose rows are repeated to make larger caches."""

    def __init__(self, folder: Path) -> None:
        from fastfundus.data import build_cache, list_photos
        from fastfundus.synthetic import write_dataset

        write_dataset(folder / "photos", 20, seed=8, poor_share=0.0, long_sides=(256,), workers=1)
        listing = list_photos(folder / "photos", labels=folder / "photos" / "labels.csv")
        self._path = folder / "small"
        build_cache(listing.photos, self._path, PreprocessSpec(size=32), source=listing.root)

    def grown_to(self, count: int, folder: Path) -> None:
        """Write a cache of `count` rows."""
        import shutil

        shutil.copytree(self._path, folder, ignore=shutil.ignore_patterns("photos.npy", "manifest.parquet"))
        rows = pl.read_parquet(self._path / "manifest.parquet")
        many = pl.concat([rows] * -(-count // len(rows)))[:count].with_row_index("_n")
        number = pl.col("_n").cast(pl.String)
        many = many.with_columns(
            path=pl.lit("images/") + number + ".jpg",
            sha256=number.str.zfill(64),
            patient=pl.lit("p") + (pl.col("_n") // 2).cast(pl.String),
        ).drop("_n")
        many.write_parquet(folder / "manifest.parquet")
        header = np.lib.format.open_memmap(folder / "photos.npy", mode="w+", dtype=np.uint8, shape=(count, 32, 32, 3))
        del header


def main() -> None:
    """Run the measurements and write the results as JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"cost_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--part", nargs=2, metavar=("PART", "BUNDLE"))
    options = parser.parse_args()
    if options.part:
        print(one_part(options.part[0], Path(options.part[1]), options.seconds))
        return
    precision = precisions()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = {
            **environment(("openvino", "simplejpeg", "numpy", "polars")),
            "precision": precision,
            "model": predictions(folder, precision, options.seconds),
            "cores": over_cores(folder, precision, options.seconds),
        }
        document["batch"] = over_batch(built(folder, "resnet50", 512, precision), options.seconds)
        document["manifest"] = over_manifest(folder, SmallCache(folder))
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
