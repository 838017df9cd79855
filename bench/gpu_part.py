"""What the parts of `gpu_suite.sh` share: command line, what is said of the machine, a case's figures, the file."""

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

from bench.machine import environment

__all__ = ["measured", "started", "tests_of", "write_part"]


def started(*paths: str) -> tuple[argparse.Namespace, torch.device, dict[str, Any]]:
    """Read the command line: `--dry-run`, `--output`, and `paths`, which must be given, too.

    Returns:
        The options, the device, and what a result must say of the machine and the run.

    Raises:
        SystemExit: there is no GPU, and it is to be no dry run.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    for name in ("output", *paths):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: run on a machine that has one, or with --dry-run")
    about = {"dry_run": options.dry_run, **environment(()), **_gpu_environment()}
    return options, torch.device("cpu" if options.dry_run else "cuda"), about


def measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A case's figures, or its name and why it has none: the others go on.

    Raises:
        ImportError: what it needs is not installed.
    """
    try:
        return measure()
    except ImportError:
        raise
    except Exception as error:
        # Compilers, libraries of other makers, memory, a difference: none of theirs may cost the others.
        return {"case": {"name": name}, "failed": str(error)[:400]}


def tests_of(path: Path) -> dict[str, int]:
    """Counts of a JUnit file; a run that crashed leaves none."""
    if not path.is_file():
        return {"crashed": 1}
    suite = next(iter(ElementTree.parse(path).getroot()))
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def _gpu_environment() -> dict[str, Any]:
    """The GPU and the compilers; versions as the modules tell them."""
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
