"""Times variants of one job side by side: in turns within one run, so that a noisy neighbour hits all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["environment", "pinned_to", "quartiles", "run_in_turns"]


def run_in_turns(variants: Mapping[str, Callable[[], object]], units: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time each variant once a round, in turns; the first round warms up and does not count.

    Args:
        variants: jobs by name; each does `units` pieces of work.
        units: pieces of work of one call.
        rounds: timed rounds.

    Returns:
        For each variant milliseconds a piece: median over rounds, and the quartiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, job in variants.items():
            began = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - began)
    result = {}
    for name, values in seconds.items():
        result[name] = quartiles([1000 * value / units for value in values])
    return result


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of milliseconds; of a single one, itself."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return {"ms": middle, "ms_q1": low, "ms_q3": high}


@contextmanager
def pinned_to(cores: int) -> Iterator[None]:
    """Let this process and the threads it starts within use so many cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(packages: tuple[str, ...]) -> dict[str, Any]:
    """What a result must say about where it comes from; a copy of the tree without git has no commit."""
    root = Path(__file__).parents[1]

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
