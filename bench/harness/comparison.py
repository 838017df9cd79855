"""Benchmark harness: cases, variants, and a device-aware clock; every result that is timed is checked in the same run.

    case = Case("augment", "16 photos of 512 px, uint8 to float32", units=16, bytes=..., bytes_how="...", limit=...)
    found = compare(case, [Variant("ours", ours), Variant("reference", theirs, reference=True)], rounds=9)

Variants are interleaved, A/B/A/B, so that noise affects all of them equally; ratios are taken within rounds. The result
of each variant is compared with the reference's; one that exceeds its tolerance ends the run without figures.
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
"""More than the L2 cache of any GPU."""


class WrongResult(Exception):
    """The result of a variant differs from the reference's by more than its tolerance."""


@dataclass(frozen=True)
class Limit:
    """A lower bound on the time of a call."""

    what: str
    """What sets the limit, such as "copy bandwidth" or "the decoder alone"."""
    ms: float
    """Minimum milliseconds of one call, measured in the same run."""


@dataclass(frozen=True)
class Case:
    """One job, independent of how it is done."""

    name: str
    what: str
    """Shapes and dtypes, in words."""
    units: int
    """Photos per call."""
    bytes: int = 0
    """Minimum bytes that one call must move."""
    bytes_how: str = ""
    """How `bytes` is calculated, in words."""
    flops: float = 0.0
    """FLOPs of one call; a multiplication with an addition counts as two."""
    flops_how: str = ""
    limit: Limit | str | None = None
    """Limit of the variants, or the name of the variant that sets it."""


@dataclass(frozen=True)
class Variant:
    """One way to do the job of a case."""

    name: str
    job: Callable[[], Any]
    """Function that is timed; its `close`, if it has one, is called after the last round."""
    reference: bool = False
    settings: str = ""
    """Settings in words; those of a peer are its best."""
    tolerance: float = 0.0
    """Largest allowed distance of its result from the reference's."""
    distance: Callable[[Any, Any], float] = field(default=lambda got, want: float(np.abs(got - want).max()))
    """Distance of its result from the reference's; also evaluated for the reference itself."""
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    """Untimed context around each call, to fill queues, load engines and clean up."""
    limit: Limit | None = None
    """Limit of this variant, if it differs from the case's."""


@dataclass(frozen=True)
class Timed:
    """Result of a job that was timed in the process where it ran."""

    ms: float
    result: Any
    peak_mib: float
    """Peak memory above the level before the call, in MiB."""


class Clock:
    """Timer for calls on a device.

    On a GPU, calls are timed by events behind the queued work, and the L2 cache is flushed before each call.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            import torch

            self._torch = torch
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, job: Callable[[], Any]) -> tuple[float, Any]:
        """Run one call; return its milliseconds and its result."""
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
        """Reset the peak memory."""
        if self._cuda:
            self._torch.cuda.reset_peak_memory_stats()
        else:
            # This makes Linux reset the peak resident size of the process.
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Return the peak memory of the GPU or the process since the last reset, in MiB."""
        if self._cuda:
            return float(self._torch.cuda.max_memory_allocated() / 2**20)
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare(
    case: Case, variants: Sequence[Variant], *, rounds: int, device: str = "cpu", benchmark: Any = None
) -> dict[str, Any]:
    """Time interleaved variants; the first round is a warm-up and does not count.

    Args:
        case: job that all variants do.
        variants: variants, exactly one of them the reference.
        rounds: number of timed rounds.
        device: device whose clock is used.
        benchmark: pytest-benchmark's fixture; if given, it drives the rounds and stores the result.

    Returns:
        The case, and for each variant: ms (median, quartiles, each round), photos/s, GB/s, GFLOP/s, share of the limit,
        peak memory above the level before the call, and distance from the reference. `ratio` compares two variants.

    Raises:
        WrongResult: a variant is too far from the reference; no figures are reported.
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
                    f"{case.name}: {variant.name} differs from {reference.name} by {distance:.3g}, "
                    f"but at most {variant.tolerance:g} is allowed; no figures are reported"
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
    # With timing disabled, pytest-benchmark makes a single call, and that round is the only one.
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
    """Return how many times as long one variant takes as another: median, minimum and maximum over the rounds.

    Args:
        found: result of `compare`.
        slow: name of the variant in the numerator.
        fast: name of the variant in the denominator.
    """
    times = (found["variants"][name]["times_ms"] for name in (slow, fast))
    values = [one / other for one, other in zip(*times, strict=True)]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of times in milliseconds; for a single time, all three equal it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return {"ms": middle, "ms_q1": low, "ms_q3": high}
