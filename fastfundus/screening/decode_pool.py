"""A pool of threads that prefetches and prepares photos, and abandons threads that hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue, SimpleQueue

from fastfundus.errors import FastFundusError, PhotoError
from fastfundus.machine import usable_cores
from fastfundus.photo.file import read_photo, unpacked
from fastfundus.photo.prepare import PreparedPhoto, prepare_bytes
from fastfundus.records import SourcePhoto, Status
from fastfundus.spec import PreprocessSpec

__all__ = ["HANG_S", "DecodePool", "PendingPhoto"]

HANG_S = 60.0
"""Seconds after which reading or decoding a photo is abandoned. The slowest intact photos take two seconds."""
_MAX_HUNG = 8
_POLL_S = 0.2


class PendingPhoto:
    """A pending photo, from its request until its result is available."""

    def __init__(self, source: SourcePhoto, data: bytes | None, on_done: Callable[[], None]) -> None:
        self.source, self.data, self._on_done = source, data, on_done
        self.done = threading.Event()
        self.stage = "read"
        self.began: float | None = None
        """Monotonic time at which the current stage began; None while the photo waits for a stage."""
        self._lock = threading.Lock()
        self._prepared: PreparedPhoto | None = None

    def settle(self, prepared: PreparedPhoto) -> bool:
        """Set the result; return False if there already is one, because the photo was abandoned."""
        with self._lock:
            if self._prepared is not None:
                return False
            self._prepared = prepared
        self.done.set()
        self._on_done()
        return True

    @property
    def prepared(self) -> PreparedPhoto:
        """The result; `done` must be set."""
        assert self._prepared is not None
        return self._prepared


class DecodePool:
    """A pool of reader and decoder threads.

    Python cannot stop a thread that hangs inside a decoder or a network file system. Such a thread is abandoned: its
    photo gets a result row with the reason, and a new thread replaces it. Abandoned threads do not prevent the process
    from exiting.

    Args:
        spec: preprocessing to apply to photos.
        decoders: number of decoding threads; None starts one per usable core.
        readers: number of threads that read from storage.
        hang_s: timeout in seconds after which a photo is abandoned.
    """

    def __init__(
        self, spec: PreprocessSpec, *, decoders: int | None = None, readers: int = 4, hang_s: float = HANG_S
    ) -> None:
        self.spec, self.hang_s = spec, hang_s
        self.decoders, self.readers = decoders or usable_cores(), readers
        self.read_s = self.decode_s = 0.0
        """Seconds of work so far, summed over threads."""
        self._hung = 0
        self._seconds = threading.Lock()
        self._to_read: SimpleQueue[PendingPhoto | None] = SimpleQueue()
        # Bounded, because entire files wait in this queue.
        self._to_decode: Queue[tuple[PendingPhoto, bytes] | None] = Queue(2 * self.decoders)
        self._closed = False
        for _ in range(self.readers):
            self._start("read")
        for _ in range(self.decoders):
            self._start("decode")

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
            FastFundusError: too many photos hang; the storage or the decoder is at fault.
        """
        while not pending.done.wait(_POLL_S):
            self.poll(pending)
        return pending.prepared

    def poll(self, pending: PendingPhoto) -> None:
        """Abandon a photo whose reading or decoding hangs; waiting callers poll this.

        Raises:
            FastFundusError: see `take`.
        """
        stage, began = pending.stage, pending.began
        # A monotonic clock, because the system clock may be set during the run.
        if began is not None and time.monotonic() - began > self.hang_s:
            self._give_up(pending, stage)

    def close(self) -> None:
        """Let the threads end. Photos that were not taken are dropped."""
        self._closed = True
        for _ in range(self.readers):
            self._to_read.put(None)
        with contextlib.suppress(Empty):
            while True:
                self._to_decode.get_nowait()
        # If a reader has refilled the queue in the meantime, its entries wake the decoders as well.
        with contextlib.suppress(Full):
            for _ in range(self.decoders):
                self._to_decode.put_nowait(None)

    def _start(self, stage: str) -> None:
        target = self._read if stage == "read" else self._decode
        threading.Thread(target=target, name=stage, daemon=True).start()

    def _give_up(self, pending: PendingPhoto, stage: str) -> None:
        words = {"read": "reading it from storage", "decode": "decoding"}[stage]
        reason = f"{words} took longer than {self.hang_s:g} s and was abandoned; open it in another program, or retry"
        if not pending.settle(PreparedPhoto(Status.UNREADABLE, reason)):
            return
        self._hung += 1
        if self._hung > _MAX_HUNG:
            raise FastFundusError(
                f"{pending.source.name}: {self._hung} photos took longer than {self.hang_s:g} s ({words}); check that "
                "the storage responds, then resume"
            )
        self._start(stage)

    def _read(self) -> None:
        while (pending := self._to_read.get()) is not None and not self._closed:
            pending.began = began = time.monotonic()
            try:
                data = read_photo(pending.source.path) if pending.data is None else unpacked(pending.data)
            except PhotoError as error:
                if not pending.settle(PreparedPhoto(error.status, error.reason)):
                    return
                continue
            finally:
                self._count(read_s=time.monotonic() - began)
            pending.began = None
            if pending.done.is_set():
                return
            pending.stage = "decode"
            while not self._closed:
                with contextlib.suppress(Full):
                    self._to_decode.put((pending, data), timeout=_POLL_S)
                    break

    def _decode(self) -> None:
        while (job := self._to_decode.get()) is not None and not self._closed:
            pending, data = job
            pending.began = began = time.monotonic()
            try:
                prepared = prepare_bytes(data, self.spec)
            except Exception as error:
                # A bug here or in a decoder must fail one photo, not the run.
                prepared = PreparedPhoto(
                    Status.UNREADABLE, f"decoding failed ({type(error).__name__}: {error}); please report this file"
                )
            self._count(decode_s=time.monotonic() - began)
            if not pending.settle(prepared):
                return

    def _count(self, read_s: float = 0.0, decode_s: float = 0.0) -> None:
        with self._seconds:
            self.read_s += read_s
            self.decode_s += decode_s
