"""A million photos before the first one is read: listing a folder, joining a table, dealing patients to splits.

    python -m bench.suites.bench_million [--output bench/results/million_cpu_YYYYMM.json] [--photos 1000000]

The files are empty and lie in memory, so that the time is that of the program. The table names photos without
extensions, in another order, as Kaggle's do. Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from bench import RESULTS
from bench.harness.machine import environment

_FOLDER = 1000
"""Photos a folder."""


def write_files(root: Path, count: int) -> None:
    """Write empty photos of both eyes of each patient, and a table `labels.csv` beside their folder."""
    for first in range(0, count, _FOLDER):
        folder = root / "photos" / f"{first // _FOLDER:04d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + _FOLDER, count)):
            (folder / f"{_name(number)}.jpg").touch()
    order = np.random.default_rng(0).permutation(count)
    rows = [f"{_name(number)},{number % 5},p{number // 2}" for number in order.tolist()]
    (root / "labels.csv").write_text("\n".join(["image,level,patient_id", *rows]) + "\n")


def _name(number: int) -> str:
    return f"{number // 2}_{'left' if number % 2 else 'right'}"


def measure(part: str, root: Path) -> float:
    """Return the seconds that a part takes: "list", "list and join", or "split"."""
    if part == "split":
        from fastfundus.data.deal import deal_groups

        patients = np.repeat(np.arange(500_000), 2)
        strata = np.random.default_rng(0).integers(0, 5, len(patients))
        began = time.perf_counter()
        deal_groups(patients, strata, 5, 0)
        return time.perf_counter() - began
    from fastfundus.data.source import list_photos

    labels = root / "labels.csv" if part == "list and join" else None
    began = time.perf_counter()
    list_photos(root / "photos", labels=labels, adapter="auto" if labels else "folder")
    return time.perf_counter() - began


def main() -> None:
    """Measure, and write the results as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS / f"million_cpu_{date.today():%Y%m}.json")
    parser.add_argument("--photos", type=int, default=1_000_000)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(measure(options.part, options.root))
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        write_files(Path(name), options.photos)
        seconds = {}
        for part in ("list", "list and join", "split"):
            command = [sys.executable, "-m", "bench.suites.bench_million", "--part", part, "--root", name]
            seconds[part] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(part, seconds[part], flush=True)
    seconds["join"] = seconds["list and join"] - seconds["list"]
    document = environment(("numpy", "polars")) | {"photos": options.photos, "seconds": seconds}
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
