"""The screening pipeline: concurrent reading, decoding, batching and inference, with exactly one result per input.

    readers ─▶ decoders ─▶ batches ─▶ engine (own thread) ─▶ rows, in input order

The number of photos in flight is bounded, so memory does not grow with the number of inputs. Batches never cross the
boundary of a block of inputs, so a resumed run forms the same batches, and produces the same bits, as an uninterrupted
one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.photo.isolation import decoders_cpu_s
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import GUARD_LIMIT, SourcePhoto, Status
from fastfundus.screening.decode_pool import HANG_S, DecodePool, PendingPhoto
from fastfundus.screening.policy import RETAKE, ScreenPolicy
from fastfundus.screening.scorer import Answer, Scorer

__all__ = ["BATCH", "BLOCK", "ScreenedPhoto", "Timing", "cpu_s", "make_result", "screen_photos"]

BATCH = 16
BLOCK = 512
"""Inputs whose rows are stored together: a crash loses at most one block, and no batch crosses its boundary."""


_UNFAMILIAR = "unlike the photos that the model learned from: look at it"


@dataclass(frozen=True, slots=True)
class ScreenedPhoto:
    """The result of one input."""

    source: SourcePhoto
    prepared: PreparedPhoto
    status: Status
    """The status from preparation, `unfamiliar` by the engine's guard, or `failed` if the engine could not score the
    photo."""
    reason: str
    answer: NDArray[np.float32] | None
    """Probabilities [L] or maps [L, S, S], by label of the bundle; None unless the status is `ok`."""
    decision: str | None
    """The policy's decision for `ok`, "retake" for `ungradable`, otherwise None."""


@dataclass(slots=True)
class Timing:
    """Time spent in each stage, in seconds."""

    wall: float = 0.0
    """Wall time of the whole run, from the first photo."""
    read: float = 0.0
    """Time waiting for storage, summed over threads."""
    decode: float = 0.0
    """Time decoding and cropping, summed over threads."""
    engine: float = 0.0
    """Time in the engine."""
    cpu: float = 0.0
    """CPU time of this process and of its decoders during the run."""
    photos: int = 0
    workers: int = 0
    """Number of decoding threads."""
    readers: int = 0
    engines: int = 1

    @property
    def images_per_s(self) -> float:
        """Photos per second, end to end."""
        return self.photos / self.wall if self.wall else 0.0

    @property
    def cores_busy(self) -> float:
        """Average number of busy cores."""
        return self.cpu / self.wall if self.wall else 0.0

    @property
    def busy(self) -> dict[str, float]:
        """Utilisation of each stage, 0 to 1."""
        wall = self.wall or 1.0
        return {
            "reading": self.read / wall / max(self.readers, 1),
            "decoding": self.decode / wall / max(self.workers, 1),
            "engine": self.engine / wall / self.engines,
        }

    @property
    def limit(self) -> str:
        """The busiest stage, which limits the throughput of the run."""
        return max(self.busy.items(), key=lambda entry: entry[1])[0]


def cpu_s() -> float:
    """Return the CPU time in seconds that this process and its decoders have used."""
    return time.process_time() + decoders_cpu_s()


def screen_photos(
    photos: Sequence[SourcePhoto],
    bundle: Bundle,
    timing: Timing,
    *,
    policy: ScreenPolicy | None = None,
    engine: Engine | None = None,
    batch_size: int = BATCH,
    hang_s: float = HANG_S,
) -> Iterator[ScreenedPhoto]:
    """Screen photos, in order.

    Args:
        photos: the inputs; a batch ends after every `BLOCK` of them.
        bundle: the bundle to screen them with.
        timing: updated as the results are consumed.
        policy: the decision policy; None uses the default policy.
        engine: the bundle's engine, already loaded; it is left open. None loads it.
        batch_size: photos per engine call.
        hang_s: seconds after which reading a photo is abandoned, and CPU time that decoding it may take.

    Raises:
        BundleError: the engine fails on every photo.
        FastFundusError: the storage does not respond.
    """
    policy = policy or ScreenPolicy()
    keep_memory()
    cv2.setNumThreads(1)  # there is already one decoding thread per core
    # The engine runs in its own thread while this one collects the next batch. It is loaded there, too, while the first
    # photos are decoded.
    thread = ThreadPoolExecutor(1, "engine")
    loading = thread.submit(lambda: engine or bundle.load())
    decode_pool = DecodePool(bundle.spec, hang_s=hang_s)
    timing.workers, timing.readers = decode_pool.decoders, decode_pool.readers
    began, began_cpu = time.perf_counter(), cpu_s()
    scorer = Scorer(str(bundle.path), lambda images: loading.result().infer(np.stack(images), guard=True))

    def begin_scoring(group: list[tuple[SourcePhoto, PreparedPhoto]]) -> Future[list[Answer]] | None:
        images = [photo.image for _, photo in group if photo.status is Status.OK and photo.image is not None]
        # An engine that cannot be loaded ends the run; it is not the photos' fault.
        loading.result()
        return thread.submit(scorer.score, images) if images else None

    try:
        under_way: deque[_Group] = deque()

        def give() -> Iterator[ScreenedPhoto]:
            group = under_way.popleft()
            answers = group.answers.result() if group.answers else iter(())
            timing.photos += len(group.photos)
            timing.read, timing.decode, timing.engine = decode_pool.read_s, decode_pool.decode_s, scorer.seconds
            timing.wall, timing.cpu = time.perf_counter() - began, cpu_s() - began_cpu
            yield from _rows(group, iter(answers), bundle, policy)

        for group in _prepared_groups(photos, decode_pool, batch_size):
            under_way.append(_Group(group, begin_scoring(group)))
            # One batch is in the engine while the next is collected.
            if len(under_way) > 1:
                yield from give()
        while under_way:
            yield from give()
    finally:
        decode_pool.close()
        thread.shutdown(wait=True, cancel_futures=True)
        if engine is None and not loading.cancelled() and not loading.exception():
            loading.result().close()


def _prepared_groups(
    photos: Sequence[SourcePhoto], decode_pool: DecodePool, batch_size: int
) -> Iterator[list[tuple[SourcePhoto, PreparedPhoto]]]:
    """Yield the photos in groups with at most `batch_size` usable ones each, while the pool prepares those ahead."""
    waiting: deque[PendingPhoto] = deque()
    inputs = iter(photos)
    window, taken = 3 * batch_size + 2 * decode_pool.decoders, 0
    while True:
        while len(waiting) < window and (source := next(inputs, None)) is not None:
            waiting.append(decode_pool.begin(source))
        if not waiting:
            return
        group: list[tuple[SourcePhoto, PreparedPhoto]] = []
        ready = 0
        while waiting and ready < batch_size:
            pending = waiting.popleft()
            prepared = decode_pool.take(pending)
            ready += prepared.status is Status.OK
            group.append((pending.source, prepared))
            taken += 1
            # The end of a block ends every group, so that a series of unusable files does not grow without bound.
            if taken % BLOCK == 0:
                break
            if (source := next(inputs, None)) is not None:
                waiting.append(decode_pool.begin(source))
        yield group


@dataclass(frozen=True, slots=True)
class _Group:
    photos: list[tuple[SourcePhoto, PreparedPhoto]]
    answers: Future[list[Answer]] | None


def _rows(group: _Group, answers: Iterator[Answer], bundle: Bundle, policy: ScreenPolicy) -> Iterator[ScreenedPhoto]:
    for source, prepared in group.photos:
        answer = next(answers) if prepared.status is Status.OK else None
        yield make_result(source, prepared, answer, bundle, policy)


def make_result(
    source: SourcePhoto,
    prepared: PreparedPhoto,
    answer: Answer | None,
    bundle: Bundle,
    policy: ScreenPolicy,
) -> ScreenedPhoto:
    """Make the result of a photo from its preparation and the engine's answer.

    Args:
        source: the input.
        prepared: the prepared photo.
        answer: the engine's answer, or the reason why there is none; None if the photo was not given to the engine.
        bundle: provides labels and thresholds.
        policy: makes the decision.
    """
    if isinstance(answer, str):
        reason = f"the engine failed on this photo ({answer}); screen it again"
        return ScreenedPhoto(source, prepared, Status.FAILED, reason, None, None)
    if answer is not None and bundle.guarded:
        answer, unfamiliar = answer[:-1], float(answer[-1])
        if unfamiliar > GUARD_LIMIT:
            return ScreenedPhoto(source, prepared, Status.UNFAMILIAR, _UNFAMILIAR, None, None)
    decision = RETAKE if prepared.status is Status.UNGRADABLE else None
    if answer is not None and answer.ndim == 1:
        thresholds = {name: bundle.threshold_of(name) for name in bundle.findings}
        found = {
            name: float(value) for name, value in zip(bundle.labels, answer, strict=True) if name in bundle.findings
        }
        decision = policy.decide(found, thresholds)
    return ScreenedPhoto(source, prepared, prepared.status, prepared.reason, answer, decision)
