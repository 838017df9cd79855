"""A small study: complete grid, bit-exact resume, reports of failures, and refusal of upstream leakage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.errors import ConfigError, DataError
from fastfundus.evaluation.compare import compare_areas
from fastfundus.spec import PreprocessSpec
from fastfundus.study.config import StudyConfig
from fastfundus.study.run import run_study
from fastfundus.study.tables import write_tables
from fastfundus.study.workers import _take_gpu
from fastfundus.synthetic import write_dataset
from tests.cli.test_cli import run

TEXT = """
[study]
folds = 3
fractions = [0.5, 1.0]

[upstream.fundus]
caches = ["upstream"]
config.model.backbone = "test_resnet"
config.loop.epochs = 1
config.loop.batch_size = 8

[tasks.eyes]
caches = ["eyes"]
config.model.backbone = "test_resnet"
config.loop.epochs = 1
config.loop.batch_size = 8

[tasks.broken]
caches = ["eyes"]
config.model.backbone = "test_resnet"
config.data.labels = ["no_such_column"]

[inits]
scratch = "scratch"
fundus = "upstream:fundus"
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of different patients and the study file, in one folder."""
    folder = tmp_path_factory.mktemp("study")
    for name, seed in (("upstream", 21), ("eyes", 22)):
        write_dataset(folder / f"{name}_photos", 18, seed=seed, poor_share=0.0, long_sides=(320,), workers=1)
        photos = folder / f"{name}_photos"
        listing = list_photos(photos, labels=photos / "labels.csv")
        build_cache(listing.photos, folder / name, PreprocessSpec(size=64), source=listing.root)
    (folder / "study.toml").write_text(TEXT)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _every_core() -> Iterator[None]:
    """Use all cores, as a cluster does: bit-exact results depend on the number of threads."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(cores))
        torch.set_num_threads(cores)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(caches: Path) -> Path:
    """The output of the study, run once."""
    output = caches / "done"
    result = run("study", caches / "study.toml", "--output", output)
    assert result.exit_code == 1
    assert "12 of 24 runs failed; the first error is: " in result.output
    assert "no_such_column" in result.output
    return output


def test_the_grid_is_complete_and_failures_are_named(done: Path) -> None:
    cells = pl.read_csv(done / "cells.csv")
    good = cells.filter(pl.col("task") == "eyes")
    assert len(good) == 12
    assert good["value"].null_count() == good.height - good["value"].count()
    broken = cells.filter(pl.col("task") == "broken")
    assert broken["error"].str.contains("no_such_column").all()
    for path in (done / "cells" / "eyes").rglob("splits.parquet"):
        splits = pl.read_parquet(path)
        assert splits.group_by("patient").agg(pl.col("split").n_unique())["split"].max() == 1
    table = pl.read_csv(done / "table.csv")
    assert table.filter(pl.col("task") == "eyes").select("init", "fraction", "cells", "failed").rows() == [
        ("scratch", 0.5, 3, 0), ("fundus", 0.5, 3, 0), ("scratch", 1.0, 3, 0), ("fundus", 1.0, 3, 0),
    ]  # fmt: skip
    page = (done / "study.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("of the labels") == 2
    assert "no_such_column" in page
    assert (done / "table.md").read_text().count("| eyes |") == 4
    assert "\\toprule" in (done / "table.tex").read_text()
    assert "50\\%" in (done / "table.tex").read_text()


def test_comparisons_use_the_same_photos(done: Path) -> None:
    def pooled(init: str) -> pl.DataFrame:
        files = sorted((done / "cells" / "eyes" / init / "1").rglob("predictions.parquet"))
        tables = [pl.read_parquet(file).with_columns(fold=fold) for fold, file in enumerate(files)]
        return pl.concat([table.filter(pl.col("split") == "test") for table in tables]).sort("path")

    first, second = pooled("fundus"), pooled("scratch")
    assert first["path"].to_list() == second["path"].to_list()
    assert first["path"].n_unique() == 36
    found = compare_areas(
        first["p_abnormal"].to_numpy(), second["p_abnormal"].to_numpy(), first["label_abnormal"].to_numpy(),
        first["patient"].to_list(), first["fold"].to_numpy(),
    )  # fmt: skip
    row = pl.read_csv(done / "table.csv").row(
        by_predicate=(pl.col("init") == "fundus") & (pl.col("fraction") == 1.0) & (pl.col("task") == "eyes"), named=True
    )
    assert row["difference"] == pytest.approx(found.difference)
    cells = pl.read_csv(done / "cells.csv").filter((pl.col("task") == "eyes") & (pl.col("fraction") == 1.0))
    means = dict(cells.group_by("init").agg(pl.col("value").mean()).iter_rows())
    assert row["difference"] == pytest.approx(means["fundus"] - means["scratch"]), "within folds"
    assert row["low"] < row["value"] == pytest.approx(means["fundus"])
    assert row["p"] == pytest.approx(found.p)
    assert row["p_holm"] >= row["p"]
    assert row["photos"] == 36


@pytest.mark.long
def test_resume_gives_the_same_weights(done: Path, caches: Path, tmp_path: Path) -> None:
    output = tmp_path / "torn"
    shutil.copytree(done, output)
    cell = output / "cells" / "eyes" / "fundus" / "1" / "seed0" / "fold1"
    before = load_file(cell / "best.safetensors")
    shutil.rmtree(cell)
    shutil.rmtree(output / "cells" / "broken")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "broken/scratch/1/seed0/fold0" in text and "failed" not in text:
            # As the kernel does when memory runs out.
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid or 0, signal.SIGKILL)

    study, results = run_study(caches / "study.toml", output, say=say)
    (killed,) = [result for result in results if "SIGKILL" in result.error]
    assert killed.cell.folder == "cells/broken/scratch/1/seed0/fold0"
    assert killed.error.startswith("its process ended by SIGKILL; if memory ran out, lower loop.batch_size")
    assert len([result for result in results if "no_such_column" in result.error]) == 11, "all other cells complete"
    after = load_file(cell / "best.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len([line for line in said if "eyes" in line]) == 1
    write_tables(study, results, output)
    for name in ("table.csv", "table.md", "table.tex"):
        assert (output / name).read_bytes() == (done / name).read_bytes(), name


@pytest.mark.long
def test_a_killed_study_leaves_no_process_behind(done: Path, caches: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    shutil.copytree(done, output)
    cells = output / "cells" / "eyes" / "fundus" / "1" / "seed0"
    before = [load_file(cell / "best.safetensors") for cell in sorted(cells.iterdir())]
    shutil.rmtree(cells)
    command = [sys.executable, "-m", "fastfundus", "study", caches / "study.toml", "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cells / "fold0" / "config.toml").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while study_processes(output):
        assert time.monotonic() < deadline, "a run continues without its study"
        time.sleep(0.05)
    run_study(caches / "study.toml", output)
    for cell, weights in zip(sorted(cells.iterdir()), before, strict=True):
        after = load_file(cell / "best.safetensors")
        assert all(torch.equal(after[name], value) for name, value in weights.items())


def study_processes(output: Path) -> list[int]:
    """Return the processes that have a file in a folder open or name it on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes()
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        if int(process.name) != os.getpid() and (
            str(output).encode() in said or any(file.startswith(str(output)) for file in files)
        ):
            found.append(int(process.name))
    return found


@pytest.mark.long
def test_interruption_prints_how_to_continue(done: Path, caches: Path, tmp_path: Path) -> None:
    output = tmp_path / "interrupted"
    shutil.copytree(done, output)
    shutil.rmtree(output / "cells" / "eyes" / "fundus" / "1")
    command = [sys.executable, "-m", "fastfundus", "study", caches / "study.toml", "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "10 of 24: eyes/fundus/1/seed0/fold0" in line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; continue with: fastfundus study" in errors
    assert "Traceback" not in errors


@pytest.mark.long
def test_vessels_with_two_jobs(vessel_cache: PhotoCache, tmp_path: Path) -> None:
    free = tmp_path / "free"
    shutil.copytree(vessel_cache.path, free)
    manifest = pl.read_parquet(free / "manifest.parquet")
    manifest.with_columns(split=pl.lit(None, pl.String)).write_parquet(free / "manifest.parquet")
    (tmp_path / "study.toml").write_text("""
[study]
folds = 3

[tasks.vessels]
caches = ["free"]
config.task = "vessels"
config.model.backbone = "test_resnet"
config.loop.epochs = 1
config.loop.tile = 96
config.loop.tiles = 1

[inits]
scratch = "scratch"
""")
    result = run("study", tmp_path / "study.toml", "--output", tmp_path / "study", "--jobs", "2")
    assert result.exit_code == 0, result.output
    (first,) = pl.read_csv(tmp_path / "study" / "table.csv").rows(named=True)
    assert (first["output"], first["figure"], first["photos"], first["cells"]) == ("vessel", "dice", 9, 3)
    assert first["mean"] > 0
    assert "Dice" in (tmp_path / "study" / "table.md").read_text()


@pytest.mark.long
def test_ray_gives_the_same_weights(done: Path, caches: Path, tmp_path: Path) -> None:
    """Use a separate process, because Ray starts many."""
    output = tmp_path / "cluster"
    shutil.copytree(done, output)
    cell = output / "cells" / "eyes" / "fundus" / "1" / "seed0" / "fold1"
    before = load_file(cell / "best.safetensors")
    shutil.rmtree(cell)
    command = [sys.executable, "-m", "fastfundus", "study", caches / "study.toml", "--output", output, "--ray", "local"]
    done_again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "12 of 24 runs failed; the first error is: " in done_again.stderr
    after = load_file(cell / "best.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (output / "table.csv").read_bytes() == (done / "table.csv").read_bytes()


def test_upstream_photos_are_excluded_from_external_tests(done: Path, caches: Path, tmp_path: Path) -> None:
    cell = done / "cells" / "eyes" / "fundus" / "1" / "seed0" / "fold0"
    result = run("evaluate", cell, caches / "upstream", "--output", tmp_path / "external")
    splits = pl.read_parquet(done / "upstream" / "fundus" / "splits.parquet")
    learned = int(splits["split"].is_in(["train", "val"]).sum())
    assert f"external photos ({learned} left out: the run learned from them)" in result.output
    # A run trained on the patients of its upstream run: warned about at the start and with every result.
    again = ("--init", done / "upstream" / "fundus", "--backbone", "test_resnet", "--epochs", "1")
    result = run("train", caches / "upstream", "--output", tmp_path / "run", "--fold", "1", *again)
    assert result.exit_code == 0, result.output
    assert "test photos were learned by" in result.output
    result = run("evaluate", tmp_path / "run", caches / "upstream", "--output", tmp_path / "own")
    assert "overestimates performance" in result.output


def test_folder_of_another_study_is_refused(done: Path, caches: Path) -> None:
    other = caches / "other.toml"
    other.write_text(TEXT.replace("folds = 3", "folds = 4"))
    with pytest.raises(ConfigError, match="already contains another study"):
        run_study(other, done)


def test_upstream_leakage_is_refused(done: Path, caches: Path, tmp_path: Path) -> None:
    file = caches / "leak.toml"
    file.write_text(TEXT.replace('caches = ["eyes"]', 'caches = ["upstream"]', 1))
    shutil.copytree(done / "upstream", tmp_path / "leak" / "upstream")
    with pytest.raises(DataError, match="36 photos of the task eyes were used in the upstream run fundus"):
        run_study(file, tmp_path / "leak")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("folds = 3", "fold = 3"), r"study.fold is not a setting; did you mean 'folds'"),
        (('"upstream:fundus"', '"upstream:fundos"'), r"inits.fundus: unknown run 'upstream:fundos'; did you mean"),
        (('caches = ["eyes"]', "caches = []"), r"tasks.eyes.caches must be a list of folders"),
        (("config.loop.epochs = 1", "config.loop.epoch = 1"), r"loop.epoch is not a setting"),
        (("fractions = [0.5, 1.0]", "fractions = [0.0]"), r"data.label_fraction"),
        (("[tasks.eyes]", '[tasks."../eyes"]'), r"names a folder: use only letters, digits"),
        (('[tasks.eyes]', "[tasks.eyes]\nconfig.data.fold = 1"), r"tasks.eyes.config.data.fold is set by the study"),
        (("[study]", "[study"), r"is not TOML"),
    ],
)  # fmt: skip
def test_config_errors(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(TEXT.replace(*change))
    with pytest.raises(ConfigError, match=said):
        StudyConfig.from_toml(file)


@pytest.mark.parametrize(
    ("visible", "gpus", "number", "taken"),
    [(None, 4, 5, "1"), (None, 1, 3, None), (None, 0, 2, None), ("2,7", 2, 1, "7"), ("3", 1, 1, "3")],
)
def test_jobs_are_dealt_to_the_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, number: int, taken: str | None
) -> None:
    """Every run takes the first GPU that its process sees."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _take_gpu(number)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == taken
