"""Results that the harness reports, and results that it refuses to report."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from bench.harness.comparison import Case, Clock, Limit, Variant, WrongResult, compare, ratio
from bench.harness.own_process import OwnProcess

WANT = np.arange(6.0)


def after(seconds: float, result: np.ndarray = WANT, order: list[str] | None = None, name: str = "") -> Variant:
    def job() -> np.ndarray:
        if order is not None:
            order.append(name)
        time.sleep(seconds)
        return result

    return Variant(name or str(seconds), job, reference=seconds == 0.01)


def test_rates_ratios_and_shares() -> None:
    case = Case("sleeping", "nothing", units=5, bytes=10**6, flops=2e6, limit=Limit("the clock", 5.0))
    found = compare(case, [after(0.005), after(0.01)], rounds=5)
    fast, slow = found["variants"]["0.005"], found["variants"]["0.01"]
    # Sleeping takes at least the requested time, and longer on a busy machine.
    assert fast["ms"] >= 5
    assert slow["ms"] >= 10
    assert fast["photos_per_s"] == pytest.approx(5000 / fast["ms"])
    assert fast["gb_per_s"] == pytest.approx(1 / fast["ms"])
    assert fast["gflop_per_s"] == pytest.approx(2 / fast["ms"])
    assert fast["share_of_limit"] == pytest.approx(5 / fast["ms"])
    assert ratio(found, "0.01", "0.01") == {"median": 1, "least": 1, "most": 1}
    speed = ratio(found, "0.01", "0.005")
    each = [one / other for one, other in zip(slow["times_ms"], fast["times_ms"], strict=True)]
    assert speed == {"median": sorted(each)[2], "least": min(each), "most": max(each)}
    assert fast["ms_q1"] <= fast["ms"] <= fast["ms_q3"]
    assert found["rounds"] == 5


def test_variants_are_interleaved_and_the_first_round_is_warm_up() -> None:
    order: list[str] = []
    variants = [after(0.01, order=order, name="a"), after(0.0, order=order, name="b")]
    found = compare(Case("turns", "", 1), variants, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["rounds"] == 3


def test_wrong_results_have_no_figures() -> None:
    wrong = WANT.copy()
    wrong[3] += 0.1
    with pytest.raises(WrongResult, match=r"job: fast differs from 0\.01 by 0\.1, but at most 0 is allowed"):
        compare(Case("job", "", 1), [after(0.01), after(0.0, wrong, name="fast")], rounds=2)
    not_a_number = np.full(6, np.nan)
    with pytest.raises(WrongResult):
        compare(Case("job", "", 1), [after(0.01), after(0.0, not_a_number, name="fast")], rounds=2)


def test_peak_memory_is_measured_per_variant() -> None:
    clock = Clock()
    clock.forget_peak()
    before = clock.peak_mib()
    # More than the C library keeps after freeing, so these pages are new.
    np.ones(400 << 20, np.uint8)
    assert clock.peak_mib() > before + 350
    clock.forget_peak()
    assert clock.peak_mib() < before + 50


def test_limits_by_a_variant_and_per_variant() -> None:
    variants = [after(0.01), after(0.002, name="the step alone"), replace(after(0.004), limit=Limit("another", 1.0))]
    found = compare(Case("job", "", 1, limit="the step alone"), variants, rounds=3)
    rows = found["variants"]
    assert found["case"]["limit"] == {"what": "the step alone", "ms": rows["the step alone"]["ms"]}
    assert rows["the step alone"]["share_of_limit"] == 1
    assert rows["0.01"]["share_of_limit"] == pytest.approx(rows["the step alone"]["ms"] / rows["0.01"]["ms"])
    assert rows["0.004"]["share_of_limit"] == pytest.approx(1 / rows["0.004"]["ms"])


def test_the_context_of_a_call_is_not_timed() -> None:
    order: list[str] = []

    @contextmanager
    def loading() -> Iterator[None]:
        order.append("in")
        time.sleep(0.1)
        yield
        order.append("out")

    slow_to_load = replace(after(0.0, order=order, name="job"), within=loading)
    found = compare(Case("job", "", 1), [after(0.01), slow_to_load], rounds=1)
    assert order == ["in", "job", "out"] * 2
    assert found["variants"]["job"]["ms"] < 100


def test_the_reference_can_have_a_distance_too() -> None:
    wrong = Variant("only", lambda: WANT, True, distance=lambda got, _: float(np.abs(got - WANT - 1).max()))
    with pytest.raises(WrongResult, match="only differs from only by 1"):
        compare(Case("job", "", 1), [wrong], rounds=1)


class Counting:
    """Job that counts its calls and records calls of `begin` and `end`, and the process it runs in."""

    def __init__(self, first: int) -> None:
        self.count = first
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self) -> None:
        self.calls.append("end")

    def __call__(self) -> tuple[int, int, list[str]]:
        self.count += 1
        time.sleep(0.02)
        return os.getpid(), self.count, list(self.calls)


@pytest.mark.parametrize("here", [True, False])
def test_own_process(here: bool) -> None:
    job = OwnProcess(Counting, 5, here=here)
    for count in (6, 7):
        with job.within():
            timed = job()
        process, counted, calls = timed.result
        assert (process == os.getpid()) is here
        assert counted == count, "built once"
        assert calls == ["begin", *["end", "begin"] * (count - 6)]
        assert timed.ms >= 20
    other = Variant("other", lambda: 7, True, distance=lambda *_: 0.0)
    found = compare(
        Case("job", "", 1),
        [other, Variant("own", job, tolerance=9, distance=lambda got, want: got[1] - want)],
        rounds=1,
    )
    # The time is taken where the job ran, and its result is compared.
    assert found["variants"]["own"]["distance"] == 2
    assert found["variants"]["own"]["ms"] >= 20
    if not here:
        # The process has ended when the figures are returned, so the next measurement has all cores.
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_unpicklable_jobs_fail_in_the_same_process_too() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        OwnProcess(lambda: None, here=True)
