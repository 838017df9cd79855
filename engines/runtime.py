"""What every engine can do, and how one is loaded. No torch."""

from __future__ import annotations

import importlib
import os
import platform
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import BundleError

__all__ = [
    "BACKENDS",
    "FEATURES",
    "GRAPH",
    "INPUT",
    "OUTPUT",
    "Blueprint",
    "Engine",
    "load_backend",
    "processor",
    "require_needs",
]

BACKENDS = ("openvino", "onnxruntime", "aoti", "tensorrt")
"""Names of the backends that can be built and run; each is a module `<name>_backend` with `PACKAGE`, `precisions()`,
`build(blueprint, folder, precision)` and `load(folder, about)`."""
GRAPH = "model.onnx"
"""The graph that every bundle holds, whatever its engine."""
INPUT, OUTPUT = "photos", "probabilities"
"""Names of the graph's input and output."""
FEATURES = "features"
"""Name, inside the graph, of the last maps before they are pooled, where the network has such."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What backends build from; each takes what it needs."""

    model: Any
    """`export.ScreeningModel` on the CPU, in evaluation mode; builders leave it as it is."""
    graph: Path
    """The same in ONNX, float32."""
    size: int
    """Side of the photos in pixels."""
    calibration: NDArray[np.uint8]
    """[N, S, S, 3] photos that engines of eight bits learn their ranges on; never those that an engine is proven on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of one backend; it names those that it knows."""


class Engine(ABC):
    """A loaded engine. One thread at a time may call `infer`; it may use every core itself.

    Args:
        size: side of the photos that it takes, in pixels.
        name: of the bundle, for messages.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self.name = size, name
        self._process, self._open = os.getpid(), True

    def infer(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Score photos.

        Args:
            photos: uint8 [N, S, S, 3] RGB, prepared as the bundle's spec says; N at least 1, of any size.

        Returns:
            float32 [N, L] probabilities, 0 to 1; [N, L, S, S] for bundles that map.

        Raises:
            ValueError: the photos are something else.
            BundleError: the engine was closed, was loaded before this process was forked, or gave an answer that is no
                probability.
        """
        self._require_usable()
        size = self._size
        if photos.dtype != np.uint8 or photos.ndim != 4 or photos.shape[1:] != (size, size, 3) or not len(photos):
            raise ValueError(
                f"photos must be uint8 [N, {size}, {size}, 3] with N >= 1, got {photos.dtype} {photos.shape}"
            )
        return self._checked(self._run(photos))

    def infer_on_device(self, photos: Any) -> NDArray[np.float32]:
        """Score photos that lie on the engine's own device, and do not leave it.

        Args:
            photos: as for `infer`, contiguous: a torch tensor, or anything with `__cuda_array_interface__`. What wrote
                it must be done.

        Returns:
            As `infer`.

        Raises:
            ValueError: the photos are something else.
            BundleError: as `infer`, or the backend takes photos from the host only.
        """
        self._require_usable()
        shape, kind = tuple(photos.shape), str(photos.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) != 4 or shape[1:] != (self._size, self._size, 3) or not shape[0]:
            raise ValueError(f"photos must be uint8 [N, {self._size}, {self._size}, 3] with N >= 1, got {kind} {shape}")
        return self._checked(self._run_on_device(photos))

    def _require_usable(self) -> None:
        """Refuse calls after `close`, and in a fork of the process that loaded the engine."""
        if not self._open:
            raise BundleError(f"{self.name}: the engine was closed; load the bundle again")
        if os.getpid() != self._process:
            # Threads and device contexts do not survive a fork: the call would wait for ever, or worse.
            raise BundleError(
                f"{self.name}: the engine was loaded by process {self._process}, of which this is a fork; load the "
                "bundle in this process, or start it with the method 'spawn'"
            )

    def _checked(self, answers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Refuse answers that are no probabilities."""
        # Written so that NaN fails too. Smallest and largest: no copy of whole maps.
        if not (answers.min() >= 0 and answers.max() <= 1):
            parts = answers.reshape(len(answers), -1)
            bad = np.flatnonzero(~((parts >= 0) & (parts <= 1)).all(axis=1)).tolist()
            raise BundleError(
                f"{self.name}: the engine gave an answer that is no probability for photo {bad[0]} of {len(answers)}"
                f"{f' and {len(bad) - 1} others' if len(bad) > 1 else ''}; build it again on this machine with "
                "--precision fp32"
            )
        return answers

    def close(self) -> None:
        """Free what it holds; `infer` fails afterwards. Safe to call twice."""
        if self._open and os.getpid() == self._process:
            self._free()
        self._open = False

    @abstractmethod
    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Answer checked photos."""

    def _run_on_device(self, photos: Any) -> NDArray[np.float32]:
        """Answer checked photos on the device; backends that cannot leave this as it is."""
        raise BundleError(
            f"{self.name}: its backend takes photos from the host only; build it with --backend tensorrt or aoti"
        )

    @abstractmethod
    def _free(self) -> None:
        """Free what is held; called once."""

    def __enter__(self) -> Self:
        """Return the engine; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def require_needs(folder: Path, wanted: dict[str, str], here: dict[str, str]) -> None:
    """Refuse an engine that was built for something else.

    Args:
        folder: the bundle.
        wanted: what it needs, as `bundle.json` says.
        here: what this machine has, by the same names.

    Raises:
        BundleError: they differ.
    """
    for name, value in wanted.items():
        if here.get(name) != value:
            raise BundleError(
                f"{folder}: was compiled for {name} {value}, this is {here.get(name, 'unknown')}; build it here again "
                "from its run, or run the graph inside it in float32: --backend openvino or onnxruntime"
            )


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
        raise BundleError(
            f"{folder}: was built for the backend {name!r}; this FastFundus runs {', '.join(BACKENDS)}: upgrade it, or "
            "run the graph inside the bundle in float32: --backend openvino or onnxruntime"
        )
    engine: Engine = importlib.import_module(f"fastfundus.engines.{name}_backend").load(folder, about)
    return engine
