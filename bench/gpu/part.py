"""Shared code of the parts of `gpu_suite.sh`: command line, description of the machine, results of a case, output."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.harness.machine import environment

__all__ = ["measured", "started", "tests_of", "write_part"]


def started(*paths: str) -> tuple[argparse.Namespace, torch.device, dict[str, Any]]:
    """Parse the command line: `--dry-run`, `--output`, and one required option for each of `paths`.

    Returns:
        The options, the device, and the description of the machine and the run for the result.

    Raises:
        SystemExit: no GPU is visible, and `--dry-run` was not given.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    for name in ("output", *paths):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: run on a machine with a GPU, or add --dry-run")
    metadata = {"dry_run": options.dry_run, **environment(()), **_gpu_environment()}
    return options, torch.device("cpu" if options.dry_run else "cuda"), metadata


def measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the results of a case, or its name and the error, so that the other cases can continue.

    Raises:
        ImportError: a package that the case needs is not installed.
    """
    try:
        return measure()
    except ImportError:
        raise
    except Exception as error:
        # A failing compiler or third-party library, lack of memory or a wrong result must not affect other cases.
        return {"case": {"name": name}, "failed": str(error)[:400]}


def tests_of(path: Path) -> dict[str, int]:
    """Return the counts of a JUnit file; a crashed run leaves no file and gives `crashed`."""
    if not path.is_file():
        return {"crashed": 1}
    suite = next(iter(ElementTree.parse(path).getroot()))
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def _gpu_environment() -> dict[str, Any]:
    """Describe the GPU and the compilers; the versions are those that the modules report."""
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


def write_part(folder: Path, theme: str, metadata: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Write the results so far of one part of the suite.

    This is called after each case, because the suite stops parts that exceed their time.

    Args:
        folder: output folder.
        theme: kernels, train or engine.
        metadata: description of the machine and the run.
        cases: results as returned by `compare`.
    """
    chip = "dry_run" if metadata["dry_run"] else torch.cuda.get_device_name().split()[-1].lower()
    target = folder / f"{theme}_{chip}_{time.strftime('%Y%m')}.json"
    target.write_text(json.dumps({**metadata, "cases": cases}, indent=1) + "\n")
