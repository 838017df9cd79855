"""Study of the paper's question on real photographs: does upstream training on fundus photographs help?

    python -m bench.evidence.study [--work DIR] [--output bench/results/study_cpu_YYYYMM.json]

Upstream: normal or abnormal, on three fifths of ODIR's patients. Downstream, in five folds each from scratch and from
the upstream weights: DR or none on another set, and five findings at once on the ODIR patients not used upstream, with
a tenth, a quarter, half and all of the labels. The model is ResNet-18 at 224 px, which a CPU can do in an hour.
ImageNet weights were not available.
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

import polars as pl

from bench import RESULTS
from bench.harness.machine import environment
from bench.harness.real_photos import DATA, need

SIZE = 224
FINDINGS = ("eye_D", "eye_G", "eye_C", "eye_A", "eye_M")
TEXT = """
[study]
folds = 5
fractions = [0.1, 0.25, 0.5, 1.0]

[upstream.fundus]
caches = ["upstream"]
config.model.backbone = "resnet18"
config.loop.epochs = 25
config.loop.batch_size = 32

[tasks.dr]
caches = ["dr"]
config.model.backbone = "resnet18"
config.data.labels = ["normal"]
config.loop.epochs = 15
config.loop.batch_size = 16
config.optimizer.learning_rate = 0.0003

[tasks.findings]
caches = ["findings"]
config.task = "multilabel"
config.model.backbone = "resnet18"
config.data.labels = LABELS
config.loop.epochs = 8
config.loop.batch_size = 32
config.optimizer.learning_rate = 0.0003

[inits]
scratch = "scratch"
fundus = "upstream:fundus"
"""


def command(*arguments: object) -> str:
    """Run a fastfundus command and return its standard output; standard error is shown as it is written."""
    done = subprocess.run([sys.executable, "-m", "fastfundus", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed")
    return done.stdout


def prepare(work: Path) -> None:
    """Build three caches: ODIR patients for upstream, the other ODIR patients, and another set."""
    odir = pl.read_csv(DATA / "odir" / "labels.csv", schema_overrides={"patient": pl.String})
    patients = odir["patient"].unique().sort().sample(fraction=1.0, shuffle=True, seed=1)
    upstream = patients[: len(patients) * 3 // 5]
    column = next(name for name in ("file", "path", "image", "filename") if name in odir.columns)
    for name, part in (
        ("upstream", odir.filter(pl.col("patient").is_in(upstream.implode()))),
        ("findings", odir.filter(~pl.col("patient").is_in(upstream.implode()))),
    ):
        base = str(DATA.resolve() / "odir" / "images") + "/"
        part.with_columns((pl.lit(base) + pl.col(column)).alias(column)).write_csv(work / f"{name}.csv")
        command("prepare", work / f"{name}.csv", "--output", work / name, "--size", SIZE)
    folder = DATA / "dr"
    command("prepare", folder, "--labels", folder / "labels.csv", "--output", work / "dr", "--size", SIZE)


def main() -> None:
    """Prepare the caches, run the study, and write the JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"study_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--work", type=Path, help="Folder to keep, so that an interrupted study can resume.")
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    need(DATA / "odir" / "labels.csv")
    need(DATA / "dr" / "labels.csv")
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        if not (work / "dr").exists():
            prepare(work)
        (work / "study.toml").write_text(TEXT.replace("LABELS", json.dumps(FINDINGS)))
        print(command("study", work / "study.toml", "--output", work / "study"), flush=True)
        table = pl.read_csv(work / "study" / "table.csv")
        point = json.loads((work / "study" / "upstream" / "fundus" / "operating_point.json").read_text())
        document = {
            **environment(("torch", "timm", "numpy", "scikit-learn")),
            "minutes": (time.monotonic() - began) / 60,
            "size": SIZE,
            "upstream_test": point["labels"]["abnormal"]["test"],
            "table": table.to_dicts(),
        }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
