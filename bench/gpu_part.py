"""A part of what `gpu_suite.sh` measures: what is said of the machine, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

__all__ = ["gpu_environment", "tests_of", "write_part"]


def tests_of(path: Path) -> dict[str, int]:
    """Counts of a JUnit file; a run that crashed leaves none."""
    if not path.is_file():
        return {"crashed": 1}
    suite = next(iter(ElementTree.parse(path).getroot()))
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def gpu_environment() -> dict[str, Any]:
    """What a result must say about the GPU and the compilers; versions as the modules tell them."""
    import triton

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "nvidia_smi": said("nvidia-smi", query, "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1:],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__},
    }


def write_part(folder: Path, theme: str, about: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Write what there is of a part of the suite; after each case, as the suite stops what does not end in its time.

    Args:
        folder: where to.
        theme: kernels, train or engine.
        about: the machine and the run.
        cases: as `compare` gives them.
    """
    chip = "dry_run" if about["dry_run"] else torch.cuda.get_device_name().split()[-1].lower()
    target = folder / f"{theme}_{chip}_{time.strftime('%Y%m')}.json"
    target.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n")
