"""Tests of the host library of csrc: sanitizers on all cases, caching, and the reasons reported when it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfundus.kernels import host, reference
from fastfundus.kernels.building import build
from tests.kernels.cases import CASES, Batch, affine, case, ragged
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT16_RELATIVE

pytestmark = pytest.mark.kernel

SANITIZE = ("-std=c++17", "-O1", "-g", "-march=native", "-fPIC", "-shared")
SANITIZE += ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Wconversion", "-Werror")
ROOT = Path(__file__).parents[2]


def batches() -> dict[str, Batch]:
    found = {name: case(name, copies=1) for name in CASES}
    return found | {"many-sizes": ragged([((9, 7), affine(0.8)), ((40, 33), affine(3.2, 5, (-2, 0)))], 10)}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The library built with sanitizers, and the file of cases."""
    folder = tmp_path_factory.mktemp("sanitized")
    library = build("g++", SANITIZE, host.SOURCE, folder / "library.so")
    arrays = {}
    for name, batch in batches().items():
        for part, value in zip("posgcn", batch.arguments, strict=True):
            arrays[f"{name}/{part}"] = np.asarray(value)
    np.savez(folder / "cases.npz", **arrays)
    return library, folder / "cases.npz"


def run_watched(watched: tuple[Path, Path], results: Path, missing: int = 0) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    # Leak detection is disabled, because Python does not free all memory on exit.
    surroundings = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.kernels.sanitized", *map(str, watched), str(results), str(missing)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings, timeout=120)


def test_sanitizers_find_nothing_and_values_are_right(watched: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_watched(watched, tmp_path / "results.npz")
    assert done.returncode == 0, done.stderr
    results = np.load(tmp_path / "results.npz")
    for name, batch in batches().items():
        want = reference.sample(*batch.arguments, torch.float32)
        for out_type, relative in enumerate((0.0, FLOAT16_RELATIVE, BFLOAT16_RELATIVE)):
            got = torch.from_numpy(results[f"{name}/False/{out_type}"])
            got = (got.view(torch.bfloat16) if out_type == 2 else got).float().permute(0, 3, 1, 2)
            assert ((got - want).abs() <= batch.grey_levels + relative * want.abs()).all(), name
        assert np.isfinite(results[f"{name}/True/0"]).all()


def test_the_sanitizer_would_notice_one_byte(watched: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_watched(watched, tmp_path / "results.npz", missing=1)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    host.load.cache_clear()
    yield tmp_path / "cache" / "fastfundus"
    host.load.cache_clear()


def test_compiled_once_and_kept(fresh_cache: Path) -> None:
    assert host.load().library is not None
    (kept,) = fresh_cache.iterdir()
    before = kept.stat().st_mtime_ns
    host.load.cache_clear()
    assert host.load().library.path == kept
    assert kept.stat().st_mtime_ns == before


def test_a_missing_compiler_is_reported(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert host.load() == host._Loaded(None, "no C++ compiler: install g++")


def test_a_compiler_that_fails_is_quoted(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such option" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    loaded = host.load()
    assert loaded.library is None
    assert loaded.reason == f"{compiler} cannot compile sample_host.cpp: no such option"
    assert not list(fresh_cache.iterdir())


def test_a_cache_that_others_may_write_is_not_trusted(fresh_cache: Path) -> None:
    fresh_cache.mkdir(parents=True)
    fresh_cache.chmod(0o777)
    loaded = host.load()
    assert loaded.library is None
    assert f"{fresh_cache} is owned or writable by others: run chmod go-w on it" in loaded.reason


def test_an_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    host.load.cache_clear()
    assert "Not a directory" in host.load().reason
    host.load.cache_clear()
