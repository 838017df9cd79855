"""A pool of threads that reads photos ahead and has them prepared by decoder processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from fastfundus.errors import FastFundusError, PhotoError, TransientError
from fastfundus.machine import usable_cores
from fastfundus.photo.file import PAUSES_S, read_patiently
from fastfundus.photo.isolation import LIMIT_S, prepare_isolated, start_decoders
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import SourcePhoto, Status
from fastfundus.screening.decode_queue import DecodeQueue
from fastfundus.spec import PreprocessSpec

__all__ = ["HANG_S", "DecodePool", "PendingPhoto"]

HANG_S = LIMIT_S
"""Seconds after which reading a photo is abandoned, and CPU time that decoding it may take."""
_MAX_HUNG = 8
_POLL_S = 0.2


class PendingPhoto:
    """A pending photo, from its request until its result is available."""

    def __init__(self, source: SourcePhoto, data: bytes | None, on_done: Callable[[], None]) -> None:
        self.source, self.data, self._on_done = source, data, on_done
        self.done = threading.Event()
        self.reading_s = 0.0
        """Seconds for which the file is being read."""
        self.abandoned = False
        """Whether its reader hangs and was replaced."""
        self._lock = threading.Lock()
        self._prepared: PreparedPhoto | None = None

    def settle(self, prepared: PreparedPhoto) -> None:
        """Set the result, unless there already is one."""
        with self._lock:
            if self._prepared is not None:
                return
            self._prepared, self.data = prepared, None
        self.done.set()
        self._on_done()

    def cancel(self) -> None:
        """Drop the photo, even if it is being decoded."""
        self.settle(PreparedPhoto(Status.FAILED, "cancelled"))

    @property
    def prepared(self) -> PreparedPhoto:
        """The result; `done` must be set. Its status is `failed` if the photo is not the cause."""
        assert self._prepared is not None
        return self._prepared


class DecodePool:
    """A pool of reader threads, and of threads that each wait for a decoder process.

    Python cannot stop a thread that hangs in a network file system. Such a reader is abandoned and replaced, and its
    photo gets the status `failed`. Abandoned threads do not prevent the process from exiting.

    Args:
        spec: preprocessing to apply to photos.
        decoders: number of decoder processes; None starts one per usable core.
        readers: number of threads that read from storage.
        hang_s: seconds after which reading a photo is abandoned, and CPU time that decoding it may take.
        serving: photos come from many clients, who hold them in memory: a large one must not hold up the others.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        *,
        decoders: int | None = None,
        readers: int = 4,
        hang_s: float = HANG_S,
        serving: bool = False,
    ) -> None:
        self.spec, self.hang_s = spec, hang_s
        self.decoders, self.readers = decoders or usable_cores(), readers
        self.read_s = self.decode_s = 0.0
        """Seconds of work so far, summed over threads."""
        self._hung = 0
        self._storage_works = True
        self._lock = threading.Lock()
        self._reading: dict[PendingPhoto, float] = {}
        """Photos that are being read, and the monotonic time when they were last looked at."""
        self._to_read: SimpleQueue[PendingPhoto | None] = SimpleQueue()
        self._to_decode: DecodeQueue[PendingPhoto] = (
            DecodeQueue(None, max(1, self.decoders - 1)) if serving else DecodeQueue(2 * self.decoders, None)
        )
        self._closed = False
        start_decoders()
        for _ in range(self.readers):
            self._start(self._read)
        for _ in range(self.decoders):
            self._start(self._decode)

    def begin(
        self, source: SourcePhoto, data: bytes | None = None, on_done: Callable[[], None] = lambda: None
    ) -> PendingPhoto:
        """Request a photo and return immediately.

        Args:
            source: the photo.
            data: contents of its file, if already in memory.
            on_done: called when the photo is done, in the thread that finished it.
        """
        pending = PendingPhoto(source, data, on_done)
        if source.issue is not None:
            pending.settle(PreparedPhoto(Status.UNREADABLE, source.issue))
        else:
            self._to_read.put(pending)
        return pending

    def take(self, pending: PendingPhoto) -> PreparedPhoto:
        """Wait for a photo and return it.

        Raises:
            FastFundusError: the storage does not respond.
        """
        while not pending.done.wait(_POLL_S):
            self._check_readers()
        return pending.prepared

    def close(self) -> None:
        """Let the threads end. Photos that were not taken are dropped."""
        self._closed = True
        for _ in range(self.readers):
            self._to_read.put(None)
        self._to_decode.close()

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def _check_readers(self) -> None:
        """Abandon readers that hang; waiting callers call this every `_POLL_S`."""
        now = time.monotonic()
        late: list[PendingPhoto] = []
        with self._lock:
            for pending, before in self._reading.items():
                # The time for which the machine was suspended or this process stopped does not count.
                pending.reading_s += min(now - before, 2 * _POLL_S)
                self._reading[pending] = now
                if pending.reading_s > self.hang_s and not pending.abandoned:
                    pending.abandoned = True
                    self._hung += 1
                    late.append(pending)
            hung = self._hung
        for pending in late:
            self._start(self._read)
            pending.settle(PreparedPhoto(Status.FAILED, f"reading it from storage took longer than {self.hang_s:g} s"))
        if hung > _MAX_HUNG:
            raise FastFundusError(
                f"{hung} files take longer than {self.hang_s:g} s to read; check that the storage responds, then resume"
            )

    def _read(self) -> None:
        while (pending := self._to_read.get()) is not None and not self._closed:
            if pending.done.is_set():
                continue
            began = time.monotonic()
            with self._lock:
                self._reading[pending] = began
            data = self._data_of(pending)
            with self._lock:
                del self._reading[pending]
                self._hung -= pending.abandoned
                self.read_s += time.monotonic() - began
            if pending.abandoned:
                return
            if data is not None:
                self._to_decode.put(pending, data)

    def _data_of(self, pending: PendingPhoto) -> bytes | None:
        """Return the content of a file, or settle the photo and return None."""
        try:
            if (given := pending.data) is not None:
                # The decoder unpacks it: nothing of what a client sends may grow in this process.
                return given
            # After a failure for good, the next files are tried only once, until the storage works again.
            pauses_s = PAUSES_S if self._storage_works else ()
            data = read_patiently(pending.source.path, listed=True, pauses_s=pauses_s)
        except MemoryError:
            pending.settle(PreparedPhoto(Status.FAILED, "there is not enough memory to read it"))
            return None
        except PhotoError as error:
            self._storage_works &= not isinstance(error, TransientError)
            pending.settle(PreparedPhoto(error.status, error.reason))
            return None
        self._storage_works = True
        return data

    def _decode(self) -> None:
        while (job := self._to_decode.get()) is not None:
            pending, data, large = job
            if pending.done.is_set():
                self._to_decode.done(large)
                continue
            began = time.monotonic()
            try:
                prepared = prepare_isolated(
                    data, self.spec, limit_s=self.hang_s, cancelled=pending.done.is_set, background=large
                )
            except TransientError as error:
                prepared = PreparedPhoto(error.status, error.reason)
            except Exception as error:
                # A bug here must fail one photo, not the run.
                prepared = PreparedPhoto(
                    Status.FAILED, f"decoding failed ({type(error).__name__}: {error}); please report this file"
                )
            self._to_decode.done(large)
            with self._lock:
                self.decode_s += time.monotonic() - began
            pending.settle(prepared)
