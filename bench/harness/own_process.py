"""Peers in their own process, as their users run them, without the process-wide settings of FastFundus.

FastFundus makes the C library keep freed memory (`fastfundus.photo.memory`). In the same process its peers would also
benefit, and be up to 1.7 times as fast as in their users' programs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from bench.harness.comparison import Clock, Timed

__all__ = ["OwnProcess"]

_job: Any = None


class OwnProcess:
    """A job that is built, run and timed in a fresh process.

    Args:
        build: builds the job in that process: a callable, which may have `begin` and `end` for the work around a call.
            `build` and its arguments must be picklable.
        arguments: arguments of `build`.
        here: build and run the job in this process, which is faster when the figures do not matter.
    """

    def __init__(self, build: Callable[..., Any], *arguments: Any, here: bool = False) -> None:
        given = pickle.dumps((build, arguments))
        self._pool: ProcessPoolExecutor | None = None
        if here:
            build, arguments = pickle.loads(given)
            self._job = build(*arguments)
        else:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self._pool.submit(_build, given).result()

    def __call__(self) -> Timed:
        """Run the job once."""
        return _run(self._job) if self._pool is None else self._pool.submit(_run_there).result()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Call the job's `begin` before the body and its `end` after it."""
        self._tell("begin")
        yield
        self._tell("end")

    def close(self) -> None:
        """End the process and wait for its exit; while exiting, it would take a core from the next measurement."""
        if self._pool is not None:
            self._pool.shutdown()

    def _tell(self, method: str) -> None:
        if self._pool is None:
            getattr(self._job, method)()
        else:
            self._pool.submit(_tell_there, method).result()


def _build(given: bytes) -> None:
    global _job
    build, arguments = pickle.loads(given)
    _job = build(*arguments)


def _run(job: Callable[[], Any]) -> Timed:
    clock = Clock()
    clock.forget_peak()
    before = clock.peak_mib()
    milliseconds, result = clock.time(job)
    return Timed(milliseconds, result, clock.peak_mib() - before)


def _run_there() -> Timed:
    return _run(_job)


def _tell_there(method: str) -> None:
    getattr(_job, method)()
