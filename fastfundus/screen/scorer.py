"""An engine that must not fail a batch for the sake of one photo."""

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
"""Probabilities [L] or maps [L, S, S] of a photo; or, in words, why there are none."""
_MOST_FAILURES = 16


class Scorer:
    """Scores batches, photo by photo where a batch fails. One thread at a time may call it.

    Args:
        name: of the engine, for messages.
        infer: scores a batch of photos, as they are given to `score`, to [N, L] or [N, L, S, S].
    """

    def __init__(self, name: str, infer: Callable[[Sequence[Any]], NDArray[np.float32]]) -> None:
        self._name, self._infer, self._failures = name, infer, 0
        self.seconds = 0.0
        """The engine at work so far."""

    @classmethod
    def of(cls, engine: Engine) -> Scorer:
        """Make one of an engine, for photos in the host's memory; its owner closes it."""
        return cls(engine.name, lambda images: engine.infer(np.stack(images)))

    def score(self, images: Sequence[Any]) -> list[Answer]:
        """Answer each of some photos uint8 [S, S, 3].

        Raises:
            BundleError: so many failed one after the other that the engine must be at fault.
        """
        began = time.perf_counter()
        try:
            answers: list[Answer] = list(self._infer(images))
            self._failures = 0
            return answers
        except Exception as error:
            # Whatever the maker's library raises. One photo may be at fault, or the moment: each gets its own call.
            return [self._again(image, error) for image in images]
        finally:
            self.seconds += time.perf_counter() - began

    def _again(self, image: Any, first: Exception) -> Answer:
        try:
            answer: NDArray[np.float32] = self._infer([image])[0]
        except Exception as error:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise BundleError(
                    f"{self._name}: the engine failed on {self._failures} photos in a row ({first}); what is "
                    "done is kept: see to the engine, then go on"
                ) from error
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        self._failures = 0
        return answer
