"""Description of the environment of a result, and limits on the cores that a run uses."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import ROOT

__all__ = ["environment", "pinned_to"]


@contextmanager
def pinned_to(cores: int) -> Iterator[None]:
    """Restrict this process, and the threads it starts within the context, to `cores` cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(packages: tuple[str, ...]) -> dict[str, Any]:
    """Return date, commit, machine and package versions of a result; without git the commit is empty."""
    root = ROOT

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else ""),
        "machine": {"cpu": model, "cores": len(os.sched_getaffinity(0))},
        "versions": {name: metadata.version(name) for name in packages},
    }
