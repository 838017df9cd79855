"""Cases, variants, and a clock that knows of devices: everything measured here is checked in the same run.

    case = Case("augment", "16 photos of 512 px, uint8 to float32", units=16, bytes=..., bytes_how="...", limit=...)
    found = compare(case, [Variant("ours", ours), Variant("reference", theirs, reference=True)], rounds=9)

Variants run in turns, A/B/A/B, so that a noisy neighbour hits all of them alike; ratios are of the same round. What
each gives is compared with what the reference gave; one that differs by more than it may ends the run without a figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Case", "Clock", "Limit", "Timed", "Variant", "WrongResult", "compare", "quartiles", "ratio"]

_FLUSH_BYTES = 256 << 20
"""More than any GPU's second cache holds."""


class WrongResult(Exception):
    """A variant gave something else than the reference."""


@dataclass(frozen=True)
class Limit:
    """What nothing can be faster than."""

    what: str
    """Such as "copy bandwidth", "the decoder alone"."""
    ms: float
    """Milliseconds that one call takes at least, measured in the same run."""


@dataclass(frozen=True)
class Case:
    """One job, however it is done."""

    name: str
    what: str
    """Shapes and types, in words."""
    units: int
    """Photos of one call."""
    bytes: int = 0
    """That cannot but be moved, of one call."""
    bytes_how: str = ""
    """The arithmetic of it, in words."""
    flops: float = 0.0
    """Of one call; a product and a sum are two."""
    flops_how: str = ""
    limit: Limit | str | None = None
    """Or the name of the variant that sets it."""


@dataclass(frozen=True)
class Variant:
    """One way to do it."""

    name: str
    job: Callable[[], Any]
    """One that has `close` is closed behind the last round."""
    reference: bool = False
    settings: str = ""
    """In words, where it is a peer: its best ones."""
    tolerance: float = 0.0
    """How far its result may be from the reference's."""
    distance: Callable[[Any, Any], float] = field(default=lambda got, want: float(np.abs(got - want).max()))
    """From its result and the reference's; the reference's own is asked for too."""
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around each call, untimed: fills queues, loads, and puts away again."""
    limit: Limit | None = None
    """Where it is not the case's."""


@dataclass(frozen=True)
class Timed:
    """What a job gave that was timed where it ran."""

    ms: float
    result: Any
    peak_mib: float
    """Memory at its highest, beyond what was taken before."""


class Clock:
    """Times calls on a device: on a GPU by events behind what is queued, with the second cache flushed before each."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            import torch

            self._torch = torch
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, job: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of one call, and what it gave."""
        if not self._cuda:
            began = time.perf_counter()
            result = job()
            return 1000 * (time.perf_counter() - began), result
        self._flush.zero_()
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = job()
        end.record()
        self._torch.cuda.synchronize()
        return begin.elapsed_time(end), result

    def forget_peak(self) -> None:
        """Begin to watch memory anew."""
        if self._cuda:
            self._torch.cuda.reset_peak_memory_stats()
        else:
            # The kernel's own way to reset the highest size of a process.
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Highest memory since then: of the GPU, or of the process."""
        if self._cuda:
            return float(self._torch.cuda.max_memory_allocated() / 2**20)
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare(
    case: Case, variants: Sequence[Variant], *, rounds: int, device: str = "cpu", benchmark: Any = None
) -> dict[str, Any]:
    """Time variants in turns; the first round warms up and does not count.

    Args:
        case: what they do.
        variants: one of them the reference.
        rounds: that are timed.
        device: whose clock counts.
        benchmark: pytest-benchmark's fixture, which then drives the rounds and keeps the result.

    Returns:
        The case, and by variant: ms (median, quartiles, each round), photos/s, GB/s, GFLOP/s, share of the limit,
        memory at its highest beyond what was taken before, and distance from the reference. `ratio` has the rest.

    Raises:
        WrongResult: a variant is too far from the reference; nothing is reported then.
    """
    (reference,) = [variant for variant in variants if variant.reference]
    clock = Clock(device)
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    peaks, far = dict.fromkeys(times, 0.0), dict.fromkeys(times, 0.0)

    def one_round() -> None:
        results = {}
        for variant in variants:
            with variant.within():
                clock.forget_peak()
                there = clock.peak_mib()
                milliseconds, result = clock.time(variant.job)
                peak = clock.peak_mib() - there
            if isinstance(result, Timed):
                milliseconds, result, peak = result.ms, result.result, result.peak_mib
            results[variant.name] = result
            times[variant.name].append(milliseconds)
            peaks[variant.name] = max(peaks[variant.name], peak)
        for variant in variants:
            distance = variant.distance(results[variant.name], results[reference.name])
            far[variant.name] = max(far[variant.name], distance)
            if not distance <= variant.tolerance:
                raise WrongResult(
                    f"{case.name}: {variant.name} is {distance:.3g} away from {reference.name}, "
                    f"{variant.tolerance:g} are allowed: no figure is worth anything"
                )

    try:
        if benchmark is None:
            for _ in range(rounds + 1):
                one_round()
        else:
            benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1, iterations=1)
    finally:
        for variant in variants:
            if hasattr(variant.job, "close"):
                variant.job.close()
    # Without timing, pytest-benchmark calls once: that round is then all there is.
    counted = {name: values[1:] or values for name, values in times.items()}
    limit = case.limit
    if isinstance(limit, str):
        limit = Limit(limit, statistics.median(counted[limit]))
    found = {
        "case": {"name": case.name, "what": case.what, "units": case.units, "bytes": case.bytes,
                 "bytes_how": case.bytes_how, "flops": case.flops, "flops_how": case.flops_how,
                 "limit": limit and asdict(limit)},
        "rounds": len(counted[reference.name]),
        "variants": {
            variant.name: _described(case, variant, counted[variant.name], variant.limit or limit)
            | {"peak_mib": peaks[variant.name], "distance": far[variant.name]}
            for variant in variants
        },
    }  # fmt: skip
    if benchmark is not None:
        benchmark.extra_info.update(found)
    return found


def _described(case: Case, variant: Variant, times: Sequence[float], limit: Limit | None) -> dict[str, Any]:
    spread = quartiles(times)
    middle = spread["ms"]
    return {
        "settings": variant.settings,
        "reference": variant.reference,
        **spread,
        "times_ms": list(times),
        "photos_per_s": 1000 * case.units / middle,
        "gb_per_s": case.bytes / middle / 1e6 if case.bytes else None,
        "gflop_per_s": case.flops / middle / 1e6 if case.flops else None,
        "limit": variant.limit and asdict(variant.limit),
        "share_of_limit": limit.ms / middle if limit else None,
    }


def ratio(found: Mapping[str, Any], slow: str, fast: str) -> dict[str, float]:
    """How many times as long one variant takes as another: median, least and most over the rounds.

    Args:
        found: what `compare` gave.
        slow: a variant's name.
        fast: another's.
    """
    times = (found["variants"][name]["times_ms"] for name in (slow, fast))
    values = [one / other for one, other in zip(*times, strict=True)]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of milliseconds; of a single one, itself."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return {"ms": middle, "ms_q1": low, "ms_q3": high}
