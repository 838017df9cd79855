"""Read, decode, batch and infer at once: bounded, in order, exactly one result an input.

    readers ─▶ decoders ─▶ batches ─▶ engine (a thread of its own) ─▶ rows, in the order of the inputs

The window of photos under way is bounded, so memory does not grow with the number of inputs. Batches never reach
beyond a block of inputs: a run that goes on after a kill makes the same batches, and so the same bits, as one that was
not killed.
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
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import SourcePhoto, Status
from fastfundus.screen.crew import HANG_S, Crew, Slot
from fastfundus.screen.policy import RETAKE, ScreenPolicy
from fastfundus.screen.scorer import Answer, Scorer

__all__ = ["BATCH", "BLOCK", "ScreenedPhoto", "Timing", "judged", "screen_photos"]

BATCH = 16
BLOCK = 512
"""Inputs whose rows are kept together: what a kill can cost, and what no batch reaches beyond."""


@dataclass(frozen=True, slots=True)
class ScreenedPhoto:
    """One input's result."""

    source: SourcePhoto
    prepared: PreparedPhoto
    status: Status
    """As prepared, or `failed`: the engine could not score it."""
    reason: str
    answer: NDArray[np.float32] | None
    """Probabilities [L] by label of the bundle, or maps [L, S, S]; None unless the status is `ok`."""
    decision: str | None
    """By the policy for `ok`, "retake" for `ungradable`, else None."""


@dataclass(slots=True)
class Timing:
    """Where the time went, in seconds."""

    wall: float = 0.0
    """Of the whole run, from the first photo."""
    read: float = 0.0
    """Waiting for storage, summed over threads."""
    decode: float = 0.0
    """Decoding and cropping, summed over threads."""
    engine: float = 0.0
    """The engine at work."""
    cpu: float = 0.0
    """Processor time of this process during the run."""
    photos: int = 0
    workers: int = 0
    """Decoding threads."""
    readers: int = 0
    engines: int = 1

    @property
    def images_per_s(self) -> float:
        """Photos per second, end to end."""
        return self.photos / self.wall if self.wall else 0.0

    @property
    def cores_busy(self) -> float:
        """Cores kept busy on average."""
        return self.cpu / self.wall if self.wall else 0.0

    @property
    def busy(self) -> dict[str, float]:
        """Share of the time, 0 to 1, that each stage was at work."""
        wall = self.wall or 1.0
        return {
            "reading": self.read / wall / max(self.readers, 1),
            "decoding": self.decode / wall / max(self.workers, 1),
            "engine": self.engine / wall / self.engines,
        }

    @property
    def limit(self) -> str:
        """The busiest stage: a faster one would make the run faster."""
        return max(self.busy.items(), key=lambda entry: entry[1])[0]


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
        photos: the inputs; batches end with every `BLOCK` of them.
        bundle: what to screen them with.
        timing: filled while the rows are taken.
        policy: how to decide; None takes the plain one.
        engine: the bundle's, loaded, and left open; None loads it.
        batch_size: photos an engine call.
        hang_s: seconds after which a photo that cannot be read or decoded is given up.

    Raises:
        BundleError: the engine cannot score anything any more.
        FastFundusError: storage hangs.
    """
    policy = policy or ScreenPolicy()
    keep_memory()
    cv2.setNumThreads(1)  # one decoding thread a core already
    loaded = engine or bundle.load()
    crew = Crew(bundle.spec, hang_s=hang_s)
    timing.workers, timing.readers = crew.decoders, crew.readers
    began, began_cpu = time.perf_counter(), time.process_time()
    scorer = Scorer.of(loaded)
    # The engine has a thread of its own: here the next batch is gathered meanwhile.
    thread = ThreadPoolExecutor(1, "engine")

    def begin_scoring(group: list[tuple[SourcePhoto, PreparedPhoto]]) -> Future[list[Answer]] | None:
        images = [photo.image for _, photo in group if photo.status is Status.OK and photo.image is not None]
        return thread.submit(scorer.score, images) if images else None

    try:
        waiting: deque[Slot] = deque()
        under_way: deque[_Group] = deque()
        inputs = iter(photos)
        window = 3 * batch_size + 2 * crew.decoders

        def give() -> Iterator[ScreenedPhoto]:
            group = under_way.popleft()
            answers = group.answers.result() if group.answers else iter(())
            timing.photos += len(group.photos)
            timing.read, timing.decode, timing.engine = crew.read_s, crew.decode_s, scorer.seconds
            timing.wall, timing.cpu = time.perf_counter() - began, time.process_time() - began_cpu
            yield from _rows(group, iter(answers), bundle, policy)

        taken = 0
        while True:
            while len(waiting) < window and (source := next(inputs, None)) is not None:
                waiting.append(crew.begin(source))
            if not waiting:
                break
            group, ready = [], 0
            while waiting and ready < batch_size:
                slot = waiting.popleft()
                prepared = crew.take(slot)
                ready += prepared.status is Status.OK
                group.append((slot.source, prepared))
                taken += 1
                # Nothing but faulty files must not grow without bound either: a block ends every group.
                if taken % BLOCK == 0:
                    break
                if (source := next(inputs, None)) is not None:
                    waiting.append(crew.begin(source))
            under_way.append(_Group(group, begin_scoring(group)))
            # One batch is at work while the next is gathered.
            if len(under_way) > 1:
                yield from give()
        while under_way:
            yield from give()
    finally:
        crew.close()
        thread.shutdown(wait=True, cancel_futures=True)
        if engine is None:
            loaded.close()


@dataclass(frozen=True, slots=True)
class _Group:
    photos: list[tuple[SourcePhoto, PreparedPhoto]]
    answers: Future[list[Answer]] | None


def _rows(group: _Group, answers: Iterator[Answer], bundle: Bundle, policy: ScreenPolicy) -> Iterator[ScreenedPhoto]:
    for source, prepared in group.photos:
        answer = next(answers) if prepared.status is Status.OK else None
        yield judged(source, prepared, answer, bundle, policy)


def judged(
    source: SourcePhoto,
    prepared: PreparedPhoto,
    answer: Answer | None,
    bundle: Bundle,
    policy: ScreenPolicy,
) -> ScreenedPhoto:
    """Make a result of what became of a photo and what the engine said of it.

    Args:
        source: the input.
        prepared: the photo.
        answer: the engine's, or why there is none; None where it was not asked.
        bundle: gives labels and thresholds.
        policy: decides.
    """
    if isinstance(answer, str):
        reason = f"the engine failed on it ({answer}); screen it again"
        return ScreenedPhoto(source, prepared, Status.FAILED, reason, None, None)
    decision = RETAKE if prepared.status is Status.UNGRADABLE else None
    if answer is not None and answer.ndim == 1:
        thresholds = {name: bundle.threshold_of(name) for name in bundle.findings}
        found = {
            name: float(value) for name, value in zip(bundle.labels, answer, strict=True) if name in bundle.findings
        }
        decision = policy.decide(found, thresholds)
    return ScreenedPhoto(source, prepared, prepared.status, prepared.reason, answer, decision)
