"""The test data of installed packages as inputs: one result for each file, no traceback, bounded time and memory.

None of these thousand pictures, DICOM files, archives and tables is a fundus photograph, except scikit-image's retina.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

MAX_BYTES = 12_000_000
MAX_SECONDS = 5.0
"""Files that take longer hang: the slowest takes half a second."""
MAX_GROWTH_MB = 1_500
"""Decoded, the largest of these pictures has 100 MB."""
PACKAGES = {
    "skimage": "data", "sklearn": "datasets", "pydicom": "data/test_files", "matplotlib": "mpl-data", "scipy": "",
    "torchvision": "", "networkx": "drawing/tests", "PIL": "", "imageio": "", "tensorboard": "",
}  # fmt: skip
_RUN = """
import json, resource, sys, time
from pathlib import Path
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
spec = PreprocessSpec(size=128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.stdin.read().splitlines():
    began = time.perf_counter()
    result = prepare_photo(Path(name), spec)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([name, result.status.value, result.reason, time.perf_counter() - began, grown]), flush=True)
"""


def corpus() -> dict[str, list[Path]]:
    """Return pictures and DICOM files of each package, and a sample of its other files."""
    files: dict[str, list[Path]] = {}
    for package, folder in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent / folder
        found = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size < MAX_BYTES]
        code = (".py", ".pyc", ".so", ".pyi", ".h")
        pictures = [path for path in found if path.suffix.lower() not in code]
        files[package] = pictures[:: max(1, len(pictures) // 300)] + [p for p in found if p.suffix == ".py"][:3]
    return files


@pytest.fixture(scope="module")
def results() -> list[tuple[str, str, str, str, float, float]]:
    owners = {str(path): package for package, paths in corpus().items() for path in paths}
    run = subprocess.run(
        [sys.executable, "-c", _RUN], input="\n".join(owners), capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == list(owners)
    return [(owners[line[0]], *line) for line in lines]


def test_every_file_has_a_status_and_one_sentence(results: list[tuple[str, str, str, str, float, float]]) -> None:
    assert len(results) > 150
    for _, name, status, reason, _, _ in results:
        assert "\n" not in reason, name
        assert "please report" not in reason, (name, reason)
        assert (status == "ok") == (reason == ""), name
    accepted = [Path(name).name for _, name, status, *_ in results if status == "ok"]
    assert set(accepted) <= {"retina.jpg"}, "only a retina may be accepted"


def test_time_and_memory_are_bounded(results: list[tuple[str, str, str, str, float, float]]) -> None:
    slowest = max(results, key=lambda row: row[4])
    assert slowest[4] < MAX_SECONDS, slowest
    assert results[-1][5] < MAX_GROWTH_MB


def test_the_corpus_has_many_kinds(results: list[tuple[str, str, str, str, float, float]]) -> None:
    table = Counter((package, status) for package, _, status, *_ in results)
    print("\n".join(f"{package:12} {status:12} {count}" for (package, status), count in sorted(table.items())))
    assert {status for _, status in table} >= {"not_fundus", "unreadable", "unsupported"}
