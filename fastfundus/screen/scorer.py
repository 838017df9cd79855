"""An engine that must not fail a batch for the sake of one photo."""

from __future__ import annotations

import time
from collections.abc import Sequence

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
        engine: loaded, and closed by its owner.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._failures = engine, 0
        self.seconds = 0.0
        """The engine at work so far."""

    def score(self, images: Sequence[NDArray[np.uint8]]) -> list[Answer]:
        """Answer each of some photos [S, S, 3].

        Raises:
            BundleError: so many failed one after the other that the engine must be at fault.
        """
        began = time.perf_counter()
        try:
            answers: list[Answer] = list(self._engine.infer(np.stack(images)))
            self._failures = 0
            return answers
        except Exception as error:
            # Whatever the maker's library raises. One photo may be at fault, or the moment: each gets its own call.
            return [self._again(image, error) for image in images]
        finally:
            self.seconds += time.perf_counter() - began

    def _again(self, image: NDArray[np.uint8], first: Exception) -> Answer:
        try:
            answer: NDArray[np.float32] = self._engine.infer(image[None])[0]
        except Exception as error:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise BundleError(
                    f"{self._engine.name}: the engine failed on {self._failures} photos in a row ({first}); what is "
                    "done is kept: see to the engine, then go on"
                ) from error
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        self._failures = 0
        return answer
