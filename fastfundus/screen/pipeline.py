"""Decode, crop and infer at once: decoding threads run ahead while the engine works on a batch.

The window of photos under way is bounded, so memory does not grow with the number of inputs; rows come out in the order
of the inputs, exactly one each.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import PreparedPhoto, prepare_photo
from fastfundus.records import SourcePhoto, Status

__all__ = ["ScreenedPhoto", "Timing", "screen_photos"]

BATCH = 16


@dataclass(frozen=True, slots=True)
class ScreenedPhoto:
    """One input's result."""

    source: SourcePhoto
    prepared: PreparedPhoto
    probabilities: tuple[float, ...] | None
    """By label of the bundle; None unless the status is `ok`."""
    score: float | None
    """The largest probability of a finding."""
    decision: str | None
    """"positive" or "negative" at the bundle's thresholds for `ok`, "retake" for `ungradable`, else None."""


@dataclass(slots=True)
class Timing:
    """Where the time went, in seconds."""

    wall: float = 0.0
    """Of the whole run, from the first photo."""
    decode: float = 0.0
    """Reading, decoding and cropping, summed over threads."""
    engine: float = 0.0
    """Waiting for the engine."""
    cpu: float = 0.0
    """Processor time of this process during the run."""
    photos: int = 0
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    @property
    def images_per_s(self) -> float:
        """Photos per second, end to end."""
        return self.photos / self.wall if self.wall else 0.0

    @property
    def cores_busy(self) -> float:
        """Cores kept busy on average."""
        return self.cpu / self.wall if self.wall else 0.0


def screen_photos(
    photos: Sequence[SourcePhoto], bundle: Bundle, timing: Timing, *, batch_size: int = BATCH
) -> Iterator[ScreenedPhoto]:
    """Screen photos, in order.

    Args:
        photos: the inputs.
        bundle: what to screen them with.
        timing: filled while the rows are taken.
        batch_size: photos an engine call.

    Raises:
        BundleError: the engine gave an answer that is no probability.
    """
    engine = bundle.load()
    keep_memory()
    cv2.setNumThreads(1)  # one decoding thread a core already
    began, began_cpu = time.perf_counter(), time.process_time()
    window = 3 * batch_size + 2 * timing.workers
    pool = ThreadPoolExecutor(timing.workers, "decode")
    try:
        pending: deque[tuple[SourcePhoto, Future[tuple[PreparedPhoto, float]]]] = deque()
        inputs = iter(photos)

        def refill() -> None:
            while len(pending) < window and (source := next(inputs, None)) is not None:
                pending.append((source, pool.submit(_prepare, source, bundle)))

        refill()
        while pending:
            group: list[tuple[SourcePhoto, PreparedPhoto]] = []
            ready = 0
            while pending and ready < batch_size:
                source, future = pending.popleft()
                prepared, seconds = future.result()
                timing.decode += seconds
                ready += prepared.status is Status.OK
                group.append((source, prepared))
            # Decoding goes on while the engine works: refill the window first.
            refill()
            waited = time.perf_counter()
            scores = _score(engine, group)
            timing.engine += time.perf_counter() - waited
            timing.photos += len(group)
            timing.wall, timing.cpu = time.perf_counter() - began, time.process_time() - began_cpu
            yield from _rows(group, scores, bundle)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        engine.close()


def _prepare(source: SourcePhoto, bundle: Bundle) -> tuple[PreparedPhoto, float]:
    began = time.perf_counter()
    if source.issue is not None:
        prepared = PreparedPhoto(Status.UNREADABLE, source.issue)
    else:
        prepared = prepare_photo(source.path, bundle.spec)
    return prepared, time.perf_counter() - began


def _score(engine: Engine, group: list[tuple[SourcePhoto, PreparedPhoto]]) -> Iterator[NDArray[np.float32]]:
    """Probabilities of the `ok` photos of a group, in order."""
    images = [prepared.image for _, prepared in group if prepared.status is Status.OK and prepared.image is not None]
    if not images:
        return iter(())
    return iter(engine.infer(np.stack(images)))


def _rows(
    group: list[tuple[SourcePhoto, PreparedPhoto]], scores: Iterator[NDArray[np.float32]], bundle: Bundle
) -> Iterator[ScreenedPhoto]:
    for source, prepared in group:
        if prepared.status is Status.OK:
            values = tuple(float(value) for value in next(scores))
            found = {name: value for name, value in zip(bundle.labels, values, strict=True) if name in bundle.findings}
            positive = any(value >= bundle.threshold_of(name) for name, value in found.items())
            yield ScreenedPhoto(source, prepared, values, max(found.values()), "positive" if positive else "negative")
        else:
            yield ScreenedPhoto(
                source, prepared, None, None, "retake" if prepared.status is Status.UNGRADABLE else None
            )
