"""Tests of the command line as users see it: texts, exit codes, and the separation of stdout and stderr."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result

from fastfundus.cli import main
from tests.conftest import Trained


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], *[[name] for name in main.commands]], ids=lambda c: c[0] if c else "group")
def test_help_says_what_and_gives_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    if command:
        assert "\\b" not in result.output
        # The example is a separate paragraph that keeps its line breaks.
        example = result.output.split("Example:\n")[1].splitlines()[0]
        assert example.strip().startswith(f"fastfundus {command[0]}")


def test_the_commands_of_the_design_are_there() -> None:
    assert {"demo", "prepare", "train", "evaluate", "build-engine", "screen", "doctor"} <= set(main.commands)


def test_prepare_and_its_summary(broken_photos: Path, tmp_path: Path) -> None:
    result = run("prepare", broken_photos, "--output", tmp_path / "cache", "--size", 64)
    assert result.exit_code == 0, result.output
    assert "10 photos at 64 px: 2 ok, 1 ungradable, 3 unreadable, 4 unsupported" in result.stdout
    assert "unreadable: zero.jpg: the file is empty; copy it again" in result.stderr
    assert "unsupported: cmyk.jpg: CMYK" in result.stderr
    again = run("prepare", broken_photos, "--output", tmp_path / "cache", "--size", 64, "--json")
    assert json.loads(again.stdout)["status"]["ok"] == 2


def test_label_faults_are_reported_and_the_run_continues(photo_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = ["file,patient,split,abnormal", "p00000_left.jpg,a,train,1", "p00000_right.jpg,a,test,0"]
    rows += ["p00001_left.jpg,b,train,NaN", "p00001_left.jpg,b,train,NaN", "gone.jpg,c,val,0"]
    labels.write_text("\n".join(rows) + "\n")
    result = run("prepare", photo_folder, "--labels", labels, "--output", tmp_path / "cache", "--size", 64)
    assert result.exit_code == 0, result.output
    for text in [
        "patient a is in test and train",
        "line 5: p00001_left.jpg is already listed in line 4; duplicate row ignored",
        "label 'abnormal' is unknown for p00001_left.jpg (line 4)",
        "unreadable: gone.jpg: named in labels.csv, line 6, but missing",
    ]:
        assert text in result.stderr
    manifest = pl.read_parquet(tmp_path / "cache" / "manifest.parquet")
    assert len(manifest) == 49
    wrong = run("train", tmp_path / "cache", "--output", tmp_path / "run", "--label", "abnrmal")
    assert wrong.exit_code == 1
    assert "no label column 'abnrmal'; did you mean 'abnormal'" in wrong.stderr


def test_the_whole_way(photo_folder: Path, broken_photos: Path, tmp_path: Path) -> None:
    cache, run_folder, bundle, out = (tmp_path / name for name in ("cache", "run", "bundle", "out"))
    steps: list[tuple[object, ...]] = [
        ("prepare", photo_folder, "--labels", photo_folder / "labels.csv", "--output", cache, "--size", 64),
        ("train", cache, "--output", run_folder, "--backbone", "test_resnet", "--epochs", 1, "--batch-size", 8),
        ("evaluate", run_folder, cache, "--output", tmp_path / "evaluation"),
        # After one epoch all photos have similar scores: bfloat16 may flip a decision, and the gate would refuse it.
        ("build-engine", run_folder, "--output", bundle, "--precision", "fp32"),
        ("screen", bundle, broken_photos, photo_folder, "--output", out),
    ]
    results = []
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output)
        results.append(result)
    assert "test: AUROC" in results[1].stdout
    assert "val AUROC" in results[1].stderr
    assert results[2].stdout.startswith("test patients: AUROC")
    assert "passes: |dp|" in results[3].stdout
    assert "58 inputs" in results[4].stdout
    assert (out / "report.html").is_file()
    assert len(pl.read_csv(out / "results.csv")) == 58


def test_errors_are_one_line_and_exit_1(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("prepare", tmp_path / "gone", "--output", tmp_path / "c"), "does not exist"),
        (("prepare", broken_photos, "--output", tmp_path / "c", "--size", 5), "spec.size must be 32"),
        (
            ("train", broken_photos, "--output", tmp_path / "r"),
            "is not a photo cache; write one with fastfundus prepare",
        ),
        (("build-engine", tmp_path, "--output", tmp_path / "b"), "run fastfundus train first"),
        (("screen", tmp_path, broken_photos, "--output", tmp_path / "o"), "not an engine bundle"),
        (("screen", trained.bundle.path, tmp_path / "gone", "--output", tmp_path / "o"), "does not exist"),
        (("train", tmp_path, "--output", trained.run, "--resume", "--epochs", 3), "loop.epochs cannot change"),
        (
            ("demo", "--output", broken_photos, "--overwrite"),
            "is not empty; add --overwrite if it is the output of a demo",
        ),
    ]
    for arguments, text in cases:
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        assert text in result.stderr
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
    assert run("screen").exit_code == 2
    assert (broken_photos / "good.jpg").exists()


@pytest.mark.usefixtures("shut_folders")
def test_a_lost_folder_fails_the_run_after_all_rows(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    (broken_photos / "shut").mkdir()
    result = run("screen", trained.bundle.path, broken_photos, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "shut: cannot be searched" in result.stderr
    assert len(pl.read_csv(tmp_path / "out" / "results.csv")) == 10


def test_doctor_knows_what_is_missing() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["parts"]["screening"]["ready"]
    assert found["parts"]["training"]["versions"]["torch"]
    assert found["engine"]["precision"] in ("fp32", "bf16")
    text = run("doctor").stdout
    for name, part in found["parts"].items():
        assert (f"missing  {name}" in text) == (not part["ready"])


def test_synthesize(tmp_path: Path) -> None:
    result = run("synthesize", "--output", tmp_path / "photos", "--patients", 1, "--masks")
    assert result.exit_code == 0
    assert "2 photos of 1 patients" in result.stdout
    assert len(list((tmp_path / "photos" / "masks" / "vessels").iterdir())) == 2


def test_training_without_torch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("train", tmp_path, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "torch is not installed; run: pip install 'fastfundus[train]'" in result.stderr


def test_errors_of_the_operating_system_are_one_line(tmp_path: Path) -> None:
    name = "x" * 300
    sources = run("prepare", name, "--output", tmp_path / "cache")
    assert (sources.exit_code, sources.output.count("\n")) == (1, 1)
    assert f"{name}: cannot be opened (" in sources.output
    # Nothing in the command expects this one.
    cache = run("cache", "info", name)
    assert (cache.exit_code, cache.output.count("\n")) == (1, 1)
    assert f"{name}/spec.json: File name too long; check the path" in cache.output


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastfundus", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT and pass this on to their children; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.long
def test_ctrl_c_leaves_a_run_that_resumes(trained: Trained, tmp_path: Path) -> None:
    metadata = json.loads((trained.bundle.path / "bundle.json").read_text())
    (cache,) = metadata["provenance"]["parity_photos"]
    output = tmp_path / "run"
    process = start("train", cache, "--output", output, "--backbone", "test_resnet", "--epochs", 12, "--batch-size", 4)
    deadline = time.monotonic() + 120
    while not (output / "metrics.csv").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert f"continue with: fastfundus train {cache} --output {output} --resume" in err
    done = pl.read_csv(output / "metrics.csv")["epoch"].max()
    assert done < 12
    resumed = run("train", cache, "--output", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after epoch" in resumed.stderr
    assert pl.read_csv(output / "metrics.csv")["epoch"].to_list() == list(range(1, 13))


def test_ctrl_c_while_preparing_goes_on_later(photo_folder: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for path in (photo_folder / "images").iterdir():
        for copy in range(30):
            shutil.copy(path, many / f"{copy}_{path.name}")
    output = tmp_path / "cache"
    process = start("prepare", many, "--output", output, "--size", 64)
    journal = tmp_path / "cache.partial" / "rows.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 5000) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; run the same command again" in err
    assert "Traceback" not in err
    assert not output.exists()
    kept = len(journal.read_text().splitlines())
    assert 0 < kept < 48 * 30
    result = run("prepare", many, "--output", output, "--size", 64)
    assert result.exit_code == 0
    assert len(pl.read_parquet(output / "manifest.parquet")) == 48 * 30


def test_names_cannot_command_the_terminal(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    (broken_photos / "a\x1b[2J\x07b\u202e.jpg").write_bytes(b"no picture")
    result = run("prepare", broken_photos, "--output", tmp_path / "cache", "--size", 64)
    assert "unreadable: a\\x1b[2J\\x07b\\u202e.jpg" in result.stderr
    result = run("train", tmp_path / "a\x1bb", "--output", tmp_path / "run")
    assert "a\\x1bb: does not exist" in result.stderr


def test_a_full_disk_behind_standard_output_is_an_error_in_words(trained: Trained) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastfundus", "audit", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr
