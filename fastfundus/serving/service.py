"""The screening service: a decode pool feeds one engine, which batches all photos that are waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.errors import ConfigError, FastFundusError
from fastfundus.identifiers import read_eye_name
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.pictures import thumbnail, with_heat
from fastfundus.records import SourcePhoto, Status, identity
from fastfundus.screening.decode_pool import DecodePool
from fastfundus.screening.pipeline import ScreenedPhoto, make_result
from fastfundus.screening.policy import NEGATIVE, ScreenPolicy
from fastfundus.screening.results import makes_maps
from fastfundus.screening.scorer import Answer, Scorer

__all__ = ["MAX_AT_ONCE", "Busy", "Service"]

MAX_AT_ONCE = 32
"""Maximum number of photos per engine call."""
_THUMB_PX = 384


class Busy(FastFundusError):
    """The maximum number of photos in progress is reached; retry shortly."""


@dataclass(slots=True)
class _Waiting:
    image: NDArray[np.uint8]
    answer: asyncio.Future[Answer]


class Service:
    """A loaded bundle that screens single photos. Bound to one event loop; `close` ends its threads.

    Args:
        bundle: the bundle to screen with; must produce probabilities.
        policy: the decision policy.
        max_waiting: maximum number of photos in progress; more raise `Busy`.
        hang_s: CPU time in seconds that decoding a photo may take.
        on_batch: called with the number of photos of each engine call, in the engine's thread.

    Raises:
        ConfigError: the bundle produces maps.
        BundleError: the engine cannot be loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        policy: ScreenPolicy,
        *,
        max_waiting: int,
        hang_s: float,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        if makes_maps(bundle):
            raise ConfigError(
                f"{bundle.path}: makes maps, but serve returns probabilities; use the screen command instead"
            )
        keep_memory()
        cv2.setNumThreads(1)  # there is already one decoding thread per core
        self.bundle, self.policy, self.max_waiting = bundle, policy, max_waiting
        self.under_way = 0
        self.fault = ""
        """Reason why the service no longer works; empty while it does."""
        self._on_batch = on_batch
        self._engine = bundle.load()
        self._scorer = Scorer.of(self._engine)
        self._decode_pool = DecodePool(bundle.spec, readers=1, hang_s=hang_s, serving=True)
        self._mapper: Heatmapper | None = None
        self._mapping = threading.Lock()
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def screen(self, name: str, data: bytes) -> ScreenedPhoto:
        """Screen one photo.

        Args:
            name: file name given by the client; never used to open a file.
            data: contents of the image file.

        Raises:
            Busy: too many photos are in progress.
            FastFundusError: the engine no longer works; see `fault`.
        """
        if self.fault:
            raise FastFundusError(self.fault)
        if self.under_way >= self.max_waiting:
            raise Busy(f"{self.under_way} photos are in progress, at most {self.max_waiting} allowed; retry shortly")
        self.under_way += 1
        try:
            source = SourcePhoto(Path("/dev/null"), name, name, eye=read_eye_name(name).eye, eye_by_name=True)
            prepared = await self._prepared(source, data)
            answer = None
            if prepared.status is Status.OK and prepared.image is not None:
                waiting = _Waiting(prepared.image, self._loop.create_future())
                self._queue.put(waiting)
                answer = await waiting.answer
            return make_result(source, prepared, answer, self.bundle, self.policy)
        finally:
            self.under_way -= 1

    async def _prepared(self, source: SourcePhoto, data: bytes) -> PreparedPhoto:
        done = asyncio.Event()
        pending = self._decode_pool.begin(source, data, on_done=lambda: self._tell(done.set))
        try:
            await done.wait()
        finally:
            # If the client has left or its time is over, nobody waits for the photo.
            pending.cancel()
        return pending.prepared

    async def pictures(self, photo: ScreenedPhoto) -> dict[str, str | None]:
        """Return the crop and the heatmap of a photo as data URLs; None where there is none."""
        image = photo.prepared.image
        if image is None:
            return {"crop": None, "heatmap": None}
        shown: dict[str, str | None] = {"crop": await asyncio.to_thread(thumbnail, image, _THUMB_PX), "heatmap": None}
        # A heatmap of a negative photo would only mislead.
        if photo.answer is not None and photo.decision != NEGATIVE and Heatmapper.available(self.bundle):
            shown["heatmap"] = await asyncio.to_thread(self._heatmap, image, photo.answer)
        return shown

    def _heatmap(self, image: NDArray[np.uint8], answer: NDArray[np.float32]) -> str:
        names = self.bundle.findings or self.bundle.labels
        numbers = [self.bundle.labels.index(name) for name in names]
        above = [float(answer[number]) - self.bundle.thresholds[number] for number in numbers]
        with self._mapping:
            self._mapper = self._mapper or Heatmapper(self.bundle)
            heat = self._mapper.heat(image)[numbers[int(np.argmax(above))]]
        return thumbnail(with_heat(image, heat), _THUMB_PX)

    def row(self, photo: ScreenedPhoto) -> dict[str, Any]:
        """Return a result as JSON data, with the values of `results.csv`."""
        answer = photo.answer
        return {
            "file": photo.source.name,
            "sha256": photo.prepared.sha256 or None,
            "status": photo.status.value,
            "reason": photo.reason or None,
            "eye": identity(photo.source, photo.prepared.facts)[2],
            "camera": photo.prepared.facts.camera,
            "quality": photo.prepared.quality,
            "probabilities": {}
            if answer is None
            else {name: float(value) for name, value in zip(self.bundle.labels, answer, strict=True)},
            "decision": photo.decision,
        }

    def close(self) -> None:
        """Stop the threads and free the engine. Waiting photos are not answered."""
        self._queue.put(None)
        self._thread.join()
        self._decode_pool.close()
        self._engine.close()

    def _tell(self, what: Any, *arguments: Any) -> None:
        """Schedule a call on the event loop, unless the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, *arguments)

    def _work(self) -> None:
        """Repeatedly score all waiting photos as one batch; batches grow with the load."""
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < MAX_AT_ONCE:
                try:
                    more = self._queue.get_nowait()
                except Empty:
                    break
                if more is None:
                    self._queue.put(None)
                    break
                batch.append(more)
            self._on_batch(len(batch))
            try:
                answers: list[Answer] = self._scorer.score([waiting.image for waiting in batch])
            except FastFundusError as error:
                self.fault = str(error)
                answers = [self.fault] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                self._tell(_set, waiting.answer, answer)


def _set(future: asyncio.Future[Answer], answer: Answer) -> None:
    # The client may have disconnected.
    if not future.done():
        future.set_result(answer)
