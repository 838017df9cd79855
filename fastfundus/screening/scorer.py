"""Scoring that isolates failures: one bad photo does not fail its batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import Engine
from fastfundus.errors import BundleError

__all__ = ["Answer", "Scorer"]

Answer = NDArray[np.float32] | str
"""Probabilities [L], with the guard's value if there is one, or maps [L, S, S] of a photo, or the reason why there are
none."""
_MAX_FAILURES = 16


class Scorer:
    """Scores batches, and falls back to single photos if a batch fails. Only one thread may call it at a time.

    Args:
        name: name of the engine, for messages.
        infer: scores a batch of photos in the form given to `score`, and returns [N, L], with the guard's column if
            there is one, or [N, L, S, S].
    """

    def __init__(self, name: str, infer: Callable[[Sequence[Any]], NDArray[np.float32]]) -> None:
        self._name, self._infer, self._failures = name, infer, 0
        self.seconds = 0.0
        """Seconds spent in the engine so far."""

    @classmethod
    def of(cls, engine: Engine) -> Scorer:
        """Create a scorer for an engine and photos in host memory. The caller keeps ownership of the engine."""
        return cls(engine.name, lambda images: engine.infer(np.stack(images), guard=True))

    def score(self, images: Sequence[Any]) -> list[Answer]:
        """Return the answer for each photo, uint8 [S, S, 3].

        Raises:
            BundleError: too many photos fail in a row; the engine is at fault.
        """
        began = time.perf_counter()
        try:
            answers: list[Answer] = list(self._infer(images))
            self._failures = 0
            return answers
        except Exception as error:
            # Vendor libraries raise any error. One photo may be the cause, or it was transient: retry one by one.
            return [self._again(image, error) for image in images]
        finally:
            self.seconds += time.perf_counter() - began

    def _again(self, image: Any, first: Exception) -> Answer:
        try:
            answer: NDArray[np.float32] = self._infer([image])[0]
        except Exception as error:
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise BundleError(
                    f"{self._name}: the engine failed on {self._failures} photos in a row ({first}); finished "
                    "rows are kept: fix the engine, then resume"
                ) from error
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        self._failures = 0
        return answer
