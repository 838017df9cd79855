"""What every engine can do, and how one is loaded. No torch."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import BundleError

__all__ = ["BACKENDS", "Engine", "check_photos", "load_backend", "processor"]

BACKENDS = ("openvino", "onnxruntime", "aoti")
"""Names of the backends that can be built and run; each is a module `<name>_backend`."""


class Engine(Protocol):
    """A loaded engine. One thread at a time may call `infer`; it may use every core itself."""

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities [N, L], 0 to 1, of photos uint8 [N, S, S, 3] RGB; N at least 1."""
        ...

    def close(self) -> None:
        """Free what it holds; `infer` fails afterwards."""
        ...


def check_photos(photos: NDArray[np.uint8], size: int, loaded: object) -> None:
    """Refuse what an engine cannot take.

    Args:
        photos: what it was given.
        size: side of the photos that it takes.
        loaded: what it has loaded; None when it was closed.

    Raises:
        BundleError: the engine was closed.
        ValueError: not uint8 [N, size, size, 3] with N at least 1.
    """
    if loaded is None:
        raise BundleError("the engine was closed; load the bundle again")
    if photos.dtype != np.uint8 or photos.ndim != 4 or photos.shape[1:] != (size, size, 3) or not len(photos):
        raise ValueError(f"photos must be uint8 [N, {size}, {size}, 3] with N >= 1, got {photos.dtype} {photos.shape}")


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def load_backend(name: str, folder: Path, about: dict[str, Any]) -> Engine:
    """Load the engine of an opened bundle.

    Args:
        name: one of `BACKENDS`.
        folder: the bundle.
        about: its `bundle.json`.

    Raises:
        BundleError: this FastFundus knows no such backend, or the machine lacks what the engine needs.
    """
    if name not in BACKENDS:
        raise BundleError(f"{folder}: was built for the backend {name!r}; this FastFundus runs {', '.join(BACKENDS)}")
    engine: Engine = importlib.import_module(f"fastfundus.engines.{name}_backend").load(folder, about)
    return engine
