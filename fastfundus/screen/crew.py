"""Threads that read and prepare photos ahead of who takes them; one that hangs is left behind."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue, SimpleQueue

from fastfundus.errors import FastFundusError, PhotoError
from fastfundus.photo.file import read_photo
from fastfundus.photo.prepare import PreparedPhoto, prepare_bytes
from fastfundus.records import SourcePhoto, Status
from fastfundus.spec import PreprocessSpec

__all__ = ["HANG_S", "Crew", "Slot"]

HANG_S = 60.0
"""A photo that takes longer to be read, or to be decoded, is given up. The slowest sound ones take two seconds."""
_MOST_HUNG = 8
_LOOK_S = 0.2


class Slot:
    """The place of one photo, from when it is asked for to when it is done."""

    def __init__(self, source: SourcePhoto, data: bytes | None, on_done: Callable[[], None]) -> None:
        self.source, self.data, self._on_done = source, data, on_done
        self.done = threading.Event()
        self.stage = "read"
        self.began: float | None = None
        """When the present stage began to work on it; None while it waits for one."""
        self._lock = threading.Lock()
        self._prepared: PreparedPhoto | None = None

    def settle(self, prepared: PreparedPhoto) -> bool:
        """Set the result; False where there is one already: the photo was given up meanwhile."""
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


class Crew:
    """Readers and decoders.

    Python cannot stop a thread that hangs inside a decoder or a network file system. It is left behind, its photo gets
    a row that says so, and a new thread takes its place; none of them keeps the process from ending.

    Args:
        spec: what to make of photos.
        decoders: threads that decode; one a core.
        readers: threads that wait for storage.
        hang_s: seconds after which a photo is given up.
    """

    def __init__(
        self, spec: PreprocessSpec, *, decoders: int | None = None, readers: int = 4, hang_s: float = HANG_S
    ) -> None:
        self.spec, self.hang_s = spec, hang_s
        self.decoders, self.readers = decoders or os.cpu_count() or 1, readers
        self.read_s = self.decode_s = 0.0
        """Work done so far, summed over threads."""
        self._hung = 0
        self._seconds = threading.Lock()
        self._to_read: SimpleQueue[Slot | None] = SimpleQueue()
        # Bounded: files wait here whole.
        self._to_decode: Queue[tuple[Slot, bytes] | None] = Queue(2 * self.decoders)
        self._closed = False
        for _ in range(self.readers):
            self._start("read")
        for _ in range(self.decoders):
            self._start("decode")

    def begin(self, source: SourcePhoto, data: bytes | None = None, on_done: Callable[[], None] = lambda: None) -> Slot:
        """Ask for a photo; returns at once.

        Args:
            source: where it is.
            data: its bytes, if they are here already.
            on_done: called when it is done, in whatever thread that was.
        """
        slot = Slot(source, data, on_done)
        if source.issue is not None:
            slot.settle(PreparedPhoto(Status.UNREADABLE, source.issue))
        else:
            self._to_read.put(slot)
        return slot

    def take(self, slot: Slot) -> PreparedPhoto:
        """Wait for a photo.

        Raises:
            FastFundusError: so many photos hang that storage, or the decoder, must be at fault.
        """
        while not slot.done.wait(_LOOK_S):
            self.watch(slot)
        return slot.prepared

    def watch(self, slot: Slot) -> None:
        """Give a photo up that hangs; whoever waits for one calls this now and then.

        Raises:
            FastFundusError: as `take`.
        """
        stage, began = slot.stage, slot.began
        # A monotonic clock: the machine's own may be set while this runs.
        if began is not None and time.monotonic() - began > self.hang_s:
            self._give_up(slot, stage)

    def close(self) -> None:
        """Let the threads end; photos that were not taken are dropped."""
        self._closed = True
        for _ in range(self.readers):
            self._to_read.put(None)
        with contextlib.suppress(Empty):
            while True:
                self._to_decode.get_nowait()
        # A queue that a reader has filled meanwhile wakes the decoders as well.
        with contextlib.suppress(Full):
            for _ in range(self.decoders):
                self._to_decode.put_nowait(None)

    def _start(self, stage: str) -> None:
        target = self._read if stage == "read" else self._decode
        threading.Thread(target=target, name=stage, daemon=True).start()

    def _give_up(self, slot: Slot, stage: str) -> None:
        words = {"read": "reading it from its storage", "decode": "decoding"}[stage]
        reason = f"{words} took longer than {self.hang_s:g} s and was given up; open it in another program, or retry"
        if not slot.settle(PreparedPhoto(Status.UNREADABLE, reason)):
            return
        self._hung += 1
        if self._hung > _MOST_HUNG:
            raise FastFundusError(
                f"{slot.source.name}: {self._hung} photos took longer than {self.hang_s:g} s ({words}); see whether "
                "the storage answers, then go on"
            )
        self._start(stage)

    def _read(self) -> None:
        while (slot := self._to_read.get()) is not None and not self._closed:
            slot.began = began = time.monotonic()
            try:
                data = slot.data if slot.data is not None else read_photo(slot.source.path)
            except PhotoError as error:
                if not slot.settle(PreparedPhoto(error.status, error.reason)):
                    return
                continue
            finally:
                self._count(read_s=time.monotonic() - began)
            slot.began = None
            if slot.done.is_set():
                return
            slot.stage = "decode"
            while not self._closed:
                with contextlib.suppress(Full):
                    self._to_decode.put((slot, data), timeout=_LOOK_S)
                    break

    def _decode(self) -> None:
        while (job := self._to_decode.get()) is not None and not self._closed:
            slot, data = job
            slot.began = began = time.monotonic()
            try:
                prepared = prepare_bytes(data, self.spec)
            except Exception as error:
                # A defect of ours or of a decoder must cost one row, not the run.
                prepared = PreparedPhoto(
                    Status.UNREADABLE, f"decoding failed ({type(error).__name__}: {error}); please report this file"
                )
            self._count(decode_s=time.monotonic() - began)
            if not slot.settle(prepared):
                return

    def _count(self, read_s: float = 0.0, decode_s: float = 0.0) -> None:
        with self._seconds:
            self.read_s += read_s
            self.decode_s += decode_s
