"""Screening on the CPU: against the peers' loop, against its own slowest stage, and its memory over many photos.

    python -m bench.bench_screen [--output bench/results/screen_cpu_YYYYMM.json] [--only speed memory start serve]

The peers' loop: a DataLoader of two workers decodes with PIL, resizes and normalises with torchvision, and torch runs
the model eager in float32 in batches of 16. Camera JPEGs of 10 megapixels (FASTFUNDUS_DATA), ResNet-50 at 512 px,
random weights: speed does not depend on them. The peers do not find the field, judge quality, or hash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.bench_engine import BATCH, drawn
from bench.bench_serve import serve_under_load
from bench.paired import environment
from bench.real_photos import DATA, need
from fastfundus.data import list_photos
from fastfundus.engines.build import build_bundle
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.openvino_backend import precisions
from fastfundus.engines.trials import Evidence
from fastfundus.errors import GateRefused
from fastfundus.records import SourcePhoto
from fastfundus.screen.audit import verify
from fastfundus.screen.crew import Crew
from fastfundus.screen.pipeline import Timing, screen_photos
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset

PEERS = "PIL, torchvision, torch eager float32"
SIZE, ROUNDS = 512, 3
MANY = (1_000, 10_000, 50_000)


def bundle_of(backbone: str, size: int, precision: str, folder: Path) -> tuple[Bundle, torch.nn.Module]:
    """A bundle of random weights, and its network."""
    torch.manual_seed(0)
    network = timm.create_model(backbone, num_classes=1).eval()
    model = ScreeningModel(network, PreprocessSpec(size=size), [1.0]).eval()
    photos = drawn(size, 24)
    # Far from what random weights give: no decision hangs on the last digit.
    point = {
        "temperature": 1.0,
        "threshold": 0.9,
        "finding": True,
        "target_sensitivity": None,
        "note": "random weights",
    }
    bundle, _ = build_bundle(
        model, PreprocessSpec(size=size), {"abnormal": point | {"test": None}}, Evidence(photos[:8], None, photos[8:]),
        folder, provenance={"backbone": backbone}, precision=precision,
    )  # fmt: skip
    return bundle, network


class PeerPhotos(Dataset[torch.Tensor]):
    """Photos as the peers read them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        spec = PreprocessSpec(size=SIZE)
        self.transform = transforms.Compose(
            [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def by_peers(network: torch.nn.Module, paths: list[Path]) -> int:
    """Score photos as the peers do."""
    done = 0
    with torch.inference_mode():
        for batch in DataLoader(PeerPhotos(paths), batch_size=BATCH, num_workers=2):
            done += len(torch.sigmoid(network(batch)))
    return done


def decode_alone(photos: list[SourcePhoto], bundle: Bundle) -> list[np.ndarray]:
    """Read and prepare, with every core and no engine."""
    crew = Crew(bundle.spec)
    slots = [crew.begin(photo) for photo in photos]
    images = [crew.take(slot).image for slot in slots]
    crew.close()
    return [image for image in images if image is not None]


def speed(folder: Path) -> dict[str, Any]:
    """Photos/s of each in turns, and of the stages alone."""
    originals = sorted((DATA / "fullres_dr").rglob("*.jp*g"))
    need(DATA / "fullres_dr")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(64):
        (photos / f"{number:03d}.jpg").symlink_to(originals[number % len(originals)].resolve())
    listing = list_photos(photos, adapter="folder").photos
    paths = [photo.path for photo in listing]
    bundles: dict[str, Bundle] = {}
    for precision in precisions():
        try:
            bundles[precision], network = bundle_of("resnet50", SIZE, precision, folder / precision)
        except GateRefused as error:
            print(f"{precision}: {error}", flush=True)
    times: dict[str, list[float]] = {}
    busy: dict[str, dict[str, float]] = {}

    def note(name: str, began: float) -> None:
        times.setdefault(name, []).append((time.perf_counter() - began) / len(paths))

    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        if by_peers(network, paths) != len(paths):
            raise SystemExit("the peers lost photos")
        note(PEERS, began)
        began = time.perf_counter()
        images = np.stack(decode_alone(listing, next(iter(bundles.values()))))
        note("decoding alone", began)
        for precision, bundle in bundles.items():
            with bundle.load() as engine:
                began = time.perf_counter()
                for row in range(0, len(images), BATCH):
                    engine.infer(images[row : row + BATCH])
                note(f"engine alone, {precision}", began)
                timing = Timing()
                began = time.perf_counter()
                rows = list(screen_photos(listing, bundle, timing, engine=engine))
                note(f"screen, {precision}", began)
            if {row.status for row in rows} != {"ok"}:
                raise SystemExit("not every photo was scored; no figure is worth anything")
            busy[precision] = timing.busy | {"cores": timing.cores_busy}
        if not number:
            times = {}
        print(number, {name: f"{1 / values[-1]:.2f}" for name, values in times.items()}, flush=True)

    def ratio(slow: str, fast: str) -> dict[str, float]:
        values = np.array(times[slow]) / np.array(times[fast])
        return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}

    def of_limit(precision: str) -> float:
        """Stages share the cores: what both would take one after the other, each with all cores, is the limit."""
        both = np.array(times["decoding alone"]) + np.array(times[f"engine alone, {precision}"])
        return float(np.median(both / np.array(times[f"screen, {precision}"])))

    return {
        "photos": len(paths),
        "mean_bytes": statistics.mean(path.stat().st_size for path in paths),
        "rounds": ROUNDS,
        "images_per_s": {name: 1 / statistics.median(values) for name, values in times.items()},
        "over_peers": {name: ratio(PEERS, f"screen, {name}") for name in bundles},
        "of_engine_alone": {name: ratio(f"engine alone, {name}", f"screen, {name}") for name in bundles},
        "of_both_stages": {name: of_limit(name) for name in bundles},
        "busy": busy,
    }


def run_command(*arguments: object) -> tuple[float, float, str]:
    """Seconds and highest memory in GiB of a command of ours, and what it printed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        command = [sys.executable, "-m", "fastfundus", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        highest = 0
        while process.poll() is None:
            # Not what the system tells afterwards: that begins with the memory of the process that started it.
            with contextlib.suppress(OSError, TypeError):
                told = Path(f"/proc/{process.pid}/status").read_text()
                highest = max(highest, int(re.search(r"VmHWM:\s+(\d+) kB", told)[1]))  # type: ignore[index]
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{arguments} failed")
        printed.seek(0)
        return seconds, highest / (1 << 20), printed.read()


def memory(folder: Path) -> dict[str, Any]:
    """Highest memory of screening more and more photos, most of them copies of one another; and the start-up."""
    bundle, _ = bundle_of("resnet18", 64, "fp32", folder / "small")
    write_dataset(folder / "drawn", 100, seed=3, long_sides=(320,))
    originals = sorted((folder / "drawn" / "images").iterdir())
    found: dict[str, Any] = {"originals": len(originals), "runs": []}
    for count in MANY:
        photos = folder / f"{count}"
        for number in range(count):
            place = photos / f"{number // 1000:03d}" / f"{number:06d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(originals[number % len(originals)], place)
        output = folder / f"out{count}"
        seconds, gib, printed = run_command("screen", bundle.path, photos, "--output", output, "--json")
        results = pl.read_parquet(output / "results.parquet")
        # Copies of one photo are each an input, and equal in everything but their name.
        same = results.group_by("sha256").agg(pl.col("p_abnormal").n_unique(), pl.col("status").n_unique())
        if len(results) != count or same["p_abnormal"].max() != 1 or same["status"].max() != 1:
            raise SystemExit(f"{count} inputs gave {len(results)} rows, or copies differ")
        faults = verify(output).faults
        told = json.loads(printed)
        row = {"inputs": count, "seconds": seconds, "images_per_s": told["images_per_s"], "peak_gib": gib}
        size = sum((output / name).stat().st_size for name in ("results.parquet", "results.csv", "audit.jsonl"))
        row["bytes_a_row"] = size / count
        found["runs"].append(row | {"audit_faults": len(faults), "row_groups": -(-count // 512)})
        print(found["runs"][-1], flush=True)
    return found


def start(folder: Path) -> dict[str, Any]:
    """From the command to the report of one photo, and how long the program itself takes to be ready."""
    precision = precisions()[0]
    bundle, _ = bundle_of("resnet50", SIZE, precision, folder / "bundle")
    write_dataset(folder / "drawn", 1, seed=3, long_sides=(1024,))
    photo = next((folder / "drawn" / "images").iterdir())
    output = folder / "one"
    times = [run_command("screen", bundle.path, photo, "--output", output, "--overwrite")[0] for _ in range(7)]
    return {"precision": precision, "seconds": statistics.median(times), "most": max(times)}


def serve(folder: Path) -> dict[str, Any]:
    """The server under load."""
    bundle, _ = bundle_of("resnet18", 224, "fp32", folder / "served")
    write_dataset(folder / "asked", 60, seed=4, long_sides=(1024,), poor_share=0.1)
    return serve_under_load(bundle, sorted((folder / "asked" / "images").iterdir()), seconds=60)


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / "results" / f"screen_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--only", nargs="+", default=["speed", "memory", "start", "serve"])
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    document = kept | environment(
        ("torch", "torchvision", "openvino", "pillow", "simplejpeg", "numpy", "fastapi", "uvicorn")
    )
    for part, job in {"speed": speed, "memory": memory, "start": start, "serve": serve}.items():
        if part in options.only:
            with tempfile.TemporaryDirectory() as name:
                document[part] = job(Path(name))
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            print(part, document[part], flush=True)


if __name__ == "__main__":
    main()
