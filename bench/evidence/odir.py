"""End-to-end run of the commands on real photographs of ODIR, with times and confidence intervals, written as JSON.

    python -m bench.evidence.odir [--output bench/results/odir_cpu_YYYYMM.json]

Needs the `odir` folder of real photographs under FASTFUNDUS_DATA. A model is first trained on synthetic photographs,
then fine-tuned at 224 px in five folds (the two-step path, without any hub), so that every real photo is tested once by
a model that has not seen its patient. Then the engine is built, and all photos are screened together with ten faulty
inputs. This takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from bench import RESULTS
from bench.harness.real_photos import DATA, need
from fastfundus.evaluation.metrics import binary_metrics


def run(times: dict[str, float], step: str, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    """Run one command as a user would, record its time, and return its standard output."""
    command = [*prefix, sys.executable, "-m", "fastfundus", *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    times[step] = round(time.perf_counter() - began, 1)
    if done.returncode:
        raise SystemExit(f"{step} failed: {' '.join(command)}")
    print(f"[{times[step]:.0f} s] {step}: {done.stdout.strip()[:2000]}", flush=True)
    return done.stdout


def write_broken(folder: Path, good: Path) -> None:
    """Write nine faulty files; the tenth fault is a path given twice."""
    folder.mkdir()
    data = good.read_bytes()
    pixels = cv2.imread(str(good))
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photograph\n")
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    cv2.imwrite(str(folder / "one_pixel.png"), np.full((1, 1, 3), 90, np.uint8))
    from PIL import Image

    with Image.open(good) as image:
        image.convert("CMYK").save(folder / "cmyk.jpg")
    cv2.imwrite(str(folder / "sixteen_bit.png"), pixels.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "grey.png"), pixels[..., 1])
    cv2.imwrite(str(folder / "black.png"), np.zeros((400, 400, 3), np.uint8))
    (folder / "forbidden.jpg").write_bytes(data)
    (folder / "forbidden.jpg").chmod(0)


def without_privilege() -> tuple[str, ...]:
    """Return a command prefix that drops the superuser's right to read every file, so that permissions apply."""
    if os.geteuid() or not shutil.which("setpriv"):
        return ()
    return ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


def main() -> None:
    """Run all steps and write the JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"odir_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--backbone", default="resnet18")
    options = parser.parse_args()
    odir = DATA / "odir"
    need(odir / "labels.csv")
    times: dict[str, float] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cache, backbone = work / "odir", ("--backbone", options.backbone)
        run(times, "prepare odir", "prepare", odir, "--labels", odir / "labels.csv", "--output", cache, "--size", 224)
        manifest = pl.read_parquet(cache / "manifest.parquet")
        results["prepare"] = dict(manifest["status"].value_counts(sort=True).iter_rows())

        run(times, "synthesize", "synthesize", "--output", work / "photos", "--patients", 400)
        synthetic = (work / "photos", "--labels", work / "photos" / "labels.csv", "--output", work / "synthetic")
        run(times, "prepare synthetic", "prepare", *synthetic, "--size", 224)
        upstream = ("train", work / "synthetic", "--output", work / "upstream", "--epochs", 10, *backbone)
        text = run(times, "train upstream", *upstream, "--learning-rate", 0.002, "--json")
        results["upstream, synthetic test patients"] = json.loads(text)["labels"]["abnormal"]["test"]

        # Every photo is tested once, by a model that has not seen its patient.
        parts = []
        tuning = ("--label", "normal", "--amp", "--init", work / "upstream", "--learning-rate", 0.0003, "--epochs", 5)
        for fold in range(5):
            folder = work / f"fold{fold}"
            arguments = ("train", cache, "--output", folder, "--fold", fold, *tuning, *backbone)
            text = run(times, f"fine-tune, fold {fold}", *arguments, "--json")
            results[f"fold {fold}, test patients"] = json.loads(text)["labels"]["abnormal"]["test"]
            run(times, f"evaluate, fold {fold}", "evaluate", folder, cache, "--output", work / f"evaluation{fold}")
            parts.append(pl.read_csv(work / f"evaluation{fold}" / "predictions.csv", schema_overrides={"patient": str}))
        pooled = pl.concat(parts)
        if not len(pooled) == pooled["sha256"].n_unique() == results["prepare"]["ok"]:
            print(f"note: {len(pooled)} predictions of {pooled['sha256'].n_unique()} different photos")
        scores, labels = pooled["p_abnormal"].to_numpy(), pooled["label_abnormal"].to_numpy()
        results["five folds pooled, held-out patients"] = binary_metrics(
            scores, labels, pooled["patient"].to_list(), 0.5
        ).to_dict()
        text = run(times, "build-engine", "build-engine", work / "fold0", "--output", work / "bundle", "--json")
        results["engine"] = json.loads(text)["parity"]
        good = sorted((odir / "images").iterdir())[5]
        write_broken(work / "broken", good)
        inputs = (odir / "images", work / "broken", good)
        screened = ("screen", work / "bundle", *inputs, "--output", work / "screening", "--json")
        results["screen"] = json.loads(run(times, "screen", *screened, prefix=without_privilege()))
        table = pl.read_csv(work / "screening" / "results.csv")
        broken = table.filter(pl.col("path").str.contains("/broken/"))
        results["broken"] = (
            broken.select("path", "status", "reason").with_columns(pl.col("path").str.split("/").list.last()).rows()
        )
        expected = len(list((odir / "images").iterdir())) + 9
        if not len(table) == table["path"].n_unique() == expected:
            raise SystemExit(f"{expected} inputs, but {len(table)} rows")
        del results["screen"]["report"]
        results["engine_speed"] = results["engine"]["images_per_s"] / results["engine"]["torch_images_per_s"]
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=RESULTS.parent)
    document = {
        "what": "ODIR, normal vs. abnormal per eye, 224 px, held-out patients",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "backbone": options.backbone,
        "seconds": times,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
