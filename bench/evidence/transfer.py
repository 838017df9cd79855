"""The paper's two training steps on real photographs, from scratch and with upstream training, written as JSON.

    python -m bench.evidence.transfer [--output bench/results/transfer_cpu_YYYYMM.json] [--work FOLDER]

This measures whether upstream training on fundus photographs helps. Upstream: normal or abnormal, per eye, on `odir`;
the patients of its first fold are held out. Downstream, each from scratch and from the upstream run with everything
else equal: no retinopathy or retinopathy on `dr`, in five folds; and vessels on `drive`, with sixteen photos for
development and four for testing. Settings were fixed beforehand and are the same for both starts. Needs the real
photographs under FASTFUNDUS_DATA; takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench import RESULTS, ROOT
from bench.harness.machine import environment
from bench.harness.real_photos import DATA, need
from fastfundus.evaluation.metrics import auroc

BACKBONE = "resnet18"
SIZE, VESSEL_SIZE = 224, 576
UPSTREAM = ("--label", "normal", "--epochs", 30, "--learning-rate", 1e-3, "--batch-size", 32)
TUNING = ("--label", "normal", "--epochs", 20, "--learning-rate", 5e-4, "--batch-size", 16, "--folds", 5)
RESAMPLES = 2000


def run(*arguments: object) -> dict[str, Any]:
    """Run one command as a user would; return its JSON output if `--json` is given."""
    command = [sys.executable, "-m", "fastfundus", *map(str, arguments)]
    print("$ fastfundus", *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(done.stdout) if "--json" in arguments else {}


def prepared(work: Path, name: str, *arguments: object) -> Path:
    """Return a cache, building it if it does not exist."""
    cache = work / name
    if not cache.exists():
        run("prepare", *arguments, "--output", cache)
    return cache


def trained(work: Path, name: str, cache: Path, *arguments: object) -> Path:
    """Return a run or a cross-validation, training it if it does not exist."""
    folder = work / name
    if not (folder / "operating_point.json").exists() and not (folder / "folds.json").exists():
        run("train", cache, "--output", folder, "--backbone", BACKBONE, "--amp", *arguments)
    return folder


def paired_difference(tables: dict[str, pl.DataFrame]) -> dict[str, float]:
    """Return the AUROC of upstream minus scratch on the same photos, with an interval from resampling patients."""
    both = tables["upstream"].join(tables["scratch"], on="path", suffix="_scratch")
    truth = both["label_abnormal"].to_numpy()
    _, number = np.unique(both["patient"].to_numpy(), return_inverse=True)
    count = int(number.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, number]
    weights = np.concatenate([np.ones((1, len(both))), draws.astype(float)])
    difference = auroc(both["p_abnormal"].to_numpy(), truth, weights) - auroc(
        both["p_abnormal_scratch"].to_numpy(), truth, weights
    )
    low, high = np.percentile(difference[1:], (2.5, 97.5))
    return {"value": float(difference[0]), "low": float(low), "high": float(high)}


def grading(work: Path) -> dict[str, Any]:
    """Train upstream on odir and downstream on dr."""
    odir = prepared(
        work, "odir", DATA / "odir", "--labels", DATA / "odir" / "labels.csv", "--size", SIZE, "--adapter", "csv"
    )
    dr = prepared(work, "dr", DATA / "dr", "--labels", DATA / "dr" / "labels.csv", "--size", SIZE, "--adapter", "csv")
    upstream = trained(work, "upstream", odir, *UPSTREAM)
    document = json.loads((upstream / "operating_point.json").read_text())
    result: dict[str, Any] = {"upstream": document["labels"]["abnormal"]["test"], "downstream": {}}
    tables = {}
    for start, init in (("scratch", "scratch"), ("upstream", upstream)):
        folder = trained(work, f"dr_{start}", dr, *TUNING, "--init", init)
        folds = json.loads((folder / "folds.json").read_text())
        tables[start] = pl.read_parquet(folder / "out_of_fold.parquet")
        result["downstream"][start] = {
            "pooled": folds["out_of_fold"]["labels"]["abnormal"],
            "over_folds": folds["mean_and_sd"]["abnormal"]["auroc"],
        }
    result["difference"] = paired_difference(tables)
    return result


def vessels(work: Path, upstream: Path) -> dict[str, Any]:
    """Train on DRIVE: sixteen photos for development, three of them for validation, and four for testing."""
    layout = work / "drive_layout"
    if not layout.exists():
        # The layout of the unpacked DRIVE archive, copied because links to folders are not followed.
        shutil.copytree(DATA / "drive", layout / "training")
    drive = prepared(work, "drive", f"{layout}/", "--adapter", "drive", "--size", VESSEL_SIZE)
    names = sorted(pl.read_parquet(drive / "manifest.parquet")["path"])
    sides = ["test"] * 4 + ["val"] * 3 + ["train"] * (len(names) - 7)
    # Assigned once with a fixed seed, not chosen.
    order = np.random.default_rng(0).permutation(len(names))
    split = work / "drive_split.csv"
    pl.DataFrame({"path": [names[place] for place in order], "split": sides}).write_csv(split)
    result = {}
    for start, init in (("scratch", "scratch"), ("upstream", upstream)):
        config = work / f"vessels_{start}.toml"
        recipe = (ROOT / "fastfundus" / "recipes" / "vessels.toml").read_text()
        config.write_text(f'{recipe}\n[data]\nsplit_file = "{split}"\n')
        folder = trained(work, f"drive_{start}", drive, "--config", config, "--init", init, "--epochs", 25)
        document = json.loads((folder / "operating_point.json").read_text())
        result[start] = {**document["labels"]["vessel"]["test"], "pixels": document["overall"]["test"]["pixels_auroc"]}
    return result


def main() -> None:
    """Run all steps and write the JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"transfer_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--work", type=Path, help="Folder that keeps caches and runs; existing ones are reused.")
    options = parser.parse_args()
    for name in ("odir", "dr"):
        need(DATA / name / "labels.csv")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        metadata = environment(("torch", "timm", "segmentation-models-pytorch"))
        document = {
            **metadata,
            "backbone": BACKBONE,
            "size": SIZE,
            "settings": {"upstream": list(map(str, UPSTREAM)), "downstream": list(map(str, TUNING))},
            "grading": grading(work),
            "vessels": vessels(work, work / "upstream"),
        }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
