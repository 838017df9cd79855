"""The queue between readers and decoders of a pool."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from fastfundus.photo.cost import estimate_decode_s

__all__ = ["DecodeQueue"]

T = TypeVar("T")
_LARGE_S = 0.5
"""Estimated decoding time from which a photo must leave a decoder for the others. A photo of 150 megapixels from a
fundus camera's JPEG is below."""


class DecodeQueue(Generic[T]):
    """Photos that were read, each decoded in its turn; large ones leave at least one decoder for the others.

    Args:
        max_waiting: maximum number of waiting photos, because entire files wait here; None does not limit it.
        max_large: maximum number of large photos that are decoded at once; None does not tell them apart.
    """

    def __init__(self, max_waiting: int | None, max_large: int | None) -> None:
        self._max_waiting, self._max_large = max_waiting, max_large
        self._changed = threading.Condition()
        self._usual: deque[tuple[T, bytes]] = deque()
        self._large: deque[tuple[T, bytes]] = deque()
        self._decoding_large = 0
        self._closed = False

    def put(self, photo: T, data: bytes) -> None:
        """Add a photo, waiting for room; dropped if the queue is closed."""
        large = self._max_large is not None and estimate_decode_s(data) > _LARGE_S
        with self._changed:
            while self._max_waiting is not None and len(self._usual) >= self._max_waiting and not self._closed:
                self._changed.wait()
            if not self._closed:
                (self._large if large else self._usual).append((photo, data))
                self._changed.notify_all()

    def get(self) -> tuple[T, bytes, bool] | None:
        """Wait for a photo; return it, its data, and whether it is large; None once the queue is closed."""
        with self._changed:
            while not self._closed:
                if self._usual:
                    self._changed.notify_all()
                    return *self._usual.popleft(), False
                if self._large and self._decoding_large < (self._max_large or 0):
                    self._decoding_large += 1
                    return *self._large.popleft(), True
                self._changed.wait()
            return None

    def done(self, large: bool) -> None:
        """Tell that a photo from `get` was decoded."""
        if large:
            with self._changed:
                self._decoding_large -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Drop all photos and wake every thread."""
        with self._changed:
            self._closed = True
            self._usual.clear()
            self._large.clear()
            self._changed.notify_all()
