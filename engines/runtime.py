"""Common interface of all engines, and loading of engines. Does not need torch."""

from __future__ import annotations

import importlib
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    "backend_module",
    "complete_engine",
    "load_backend",
    "processor",
    "require_needs",
    "require_size",
]

BACKENDS = ("openvino", "onnxruntime", "aoti", "tensorrt", "tensorrt-rtx")
"""Names of the available backends. Each is a module `<name>_backend` (with _ for -) with `PACKAGE`, `precisions()`,
`build(blueprint, folder, precision)` and `load(folder, metadata)`; and `stand_in(folder, metadata)` if an engine may be
built where it cannot run, which `runs_here(options)` tells: it runs the graph that `build` names as `proven_graph`."""
GRAPH = "model.onnx"
"""File name of the ONNX graph in every bundle, whatever its backend."""
INPUT, OUTPUT = "photos", "probabilities"
"""Names of the input and output of the graph."""
FEATURES = "features"
"""Name inside the graph of the final feature maps before pooling, if the network has any."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Inputs from which backends build an engine; each backend uses what it needs."""

    model: Any
    """`export.ScreeningModel` on the CPU, in evaluation mode; builders do not modify it."""
    graph: Path
    """Path of the same model as a float32 ONNX graph."""
    size: int
    """Side of the photos in pixels."""
    calibration: NDArray[np.uint8]
    """Photos [N, S, S, 3] for calibrating the ranges of 8-bit engines, disjoint from those of the parity check."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backend, which documents the names it accepts."""


class Engine(ABC):
    """Base class of loaded engines.

    Only one thread at a time may call `infer`, which may use all cores itself.

    Args:
        size: side of its input photos in pixels.
        name: name of the bundle, for messages.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self.name = size, name
        self._process, self._open = os.getpid(), True
        self.guarded = False
        """True if the engine has a guard; set by `load_backend`."""
        self.outputs: int | None = None
        """Number of columns that it must return, with that of the guard; set by `load_backend`."""

    def infer(self, photos: NDArray[np.uint8], *, guard: bool = False) -> NDArray[np.float32]:
        """Score photos.

        Args:
            photos: uint8 [N, S, S, 3] RGB, prepared according to the bundle's spec; N is at least 1, without an upper
                limit.
            guard: also return the last column of an engine with a guard: how unfamiliar each photo is, 0 to 1, above
                one half beyond the locked limit.

        Returns:
            float32 probabilities from 0 to 1, [N, L], or [N, L, S, S] for bundles that output maps.

        Raises:
            ValueError: if the photos have another dtype or shape.
            BundleError: if the engine was closed, was loaded before this process was forked, or returned an invalid
                probability.
        """
        self._require_usable()
        size = self._size
        if photos.dtype != np.uint8 or photos.ndim != 4 or photos.shape[1:] != (size, size, 3) or not len(photos):
            raise ValueError(
                f"photos must be uint8 [N, {size}, {size}, 3] with N >= 1, got {photos.dtype} {photos.shape}"
            )
        return self._answers(self._run(photos), guard)

    def infer_on_device(self, photos: Any, *, guard: bool = False) -> NDArray[np.float32]:
        """Score photos that are already on the engine's device, without copying them to the host.

        Args:
            photos: same as for `infer`, contiguous, as a torch tensor or any object with `__cuda_array_interface__`.
                All work that writes to it must have completed.
            guard: as for `infer`.

        Returns:
            Probabilities on the host; see `infer`.

        Raises:
            ValueError: if the photos have another dtype or shape.
            BundleError: see `infer`; also if the backend only accepts photos in host memory.
        """
        self._require_usable()
        shape, kind = tuple(photos.shape), str(photos.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) != 4 or shape[1:] != (self._size, self._size, 3) or not shape[0]:
            raise ValueError(f"photos must be uint8 [N, {self._size}, {self._size}, 3] with N >= 1, got {kind} {shape}")
        return self._answers(self._run_on_device(photos), guard)

    def _require_usable(self) -> None:
        """Raise if the engine was closed, or if this process is a fork of the one that loaded it."""
        if not self._open:
            raise BundleError(f"{self.name}: the engine was closed; load the bundle again")
        if os.getpid() != self._process:
            # Threads and device contexts do not survive a fork: the call would hang, or worse.
            raise BundleError(
                f"{self.name}: the engine was loaded by process {self._process}, and this process is a fork of it; "
                "load the bundle in this process, or start the process with the 'spawn' method"
            )

    def _answers(self, raw: NDArray[np.float32], guard: bool) -> NDArray[np.float32]:
        checked = self._checked(raw)
        return checked if guard or not self.guarded else np.ascontiguousarray(checked[:, :-1])

    def _checked(self, answers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the answers, or raise if any is not a probability, or belongs to no label."""
        if self.outputs is not None and answers.shape[1] != self.outputs:
            raise BundleError(
                f"{self.name}: the engine returned {answers.shape[1]} values per photo, but its bundle names "
                f"{self.outputs}; do not use it, rebuild it from its run"
            )
        # Written so that NaN fails too; min and max avoid a copy of whole maps.
        if not (answers.min() >= 0 and answers.max() <= 1):
            parts = answers.reshape(len(answers), -1)
            bad = np.flatnonzero(~((parts >= 0) & (parts <= 1)).all(axis=1)).tolist()
            raise BundleError(
                f"{self.name}: the engine returned an invalid probability for photo {bad[0]} of {len(answers)}"
                f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; rebuild it on this machine with "
                "--precision fp32"
            )
        return answers

    def close(self) -> None:
        """Free the resources of the engine; `infer` raises afterwards. Safe to call twice."""
        if self._open and os.getpid() == self._process:
            self._free()
        self._open = False

    @abstractmethod
    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Score validated photos."""

    def _run_on_device(self, photos: Any) -> NDArray[np.float32]:
        """Score validated photos on the device; overridden by backends that support it."""
        raise BundleError(
            f"{self.name}: its backend only accepts photos in host memory; build it with --backend tensorrt or aoti"
        )

    @abstractmethod
    def _free(self) -> None:
        """Free the resources; called once."""

    def __enter__(self) -> Self:
        """Return the engine, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        self.close()


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def require_needs(folder: Path, wanted: dict[str, str], here: dict[str, str]) -> None:
    """Raise if this machine does not meet the requirements of an engine.

    Args:
        folder: folder of the bundle.
        wanted: requirements of the engine from `bundle.json`.
        here: properties of this machine under the same names.

    Raises:
        BundleError: if they differ.
    """
    for name, value in wanted.items():
        if here.get(name) != value:
            raise BundleError(
                f"{folder}: compiled for {name} {value}, but this machine has {here.get(name, 'unknown')}; rebuild it "
                "here from its run, or run the float32 graph in the bundle: --backend openvino or onnxruntime"
            )


def require_size(file: Path, shape: Sequence[Any], size: int) -> None:
    """Raise if a graph was made for photos of another size; runtimes would change it silently.

    Args:
        file: file of the graph.
        shape: shape of its input, [N, S, S, 3]; dimensions that are free are not integers.
        size: side of the photos in pixels.

    Raises:
        BundleError: they differ.
    """
    if len(shape) != 4 or any(type(side) is int and side != size for side in shape[1:3]):
        raise BundleError(f"{file}: was made for photos of shape {list(shape)}, not of {size} pixels; do not use it")


def load_backend(name: str, folder: Path, metadata: dict[str, Any]) -> Engine:
    """Load the engine of an opened bundle.

    Args:
        name: one of `BACKENDS`.
        folder: folder of the bundle.
        metadata: content of its `bundle.json`.

    Raises:
        BundleError: if this FastFundus does not support the backend, or the machine does not meet the requirements of
            the engine.
    """
    if name not in BACKENDS:
        raise BundleError(
            f"{folder}: built for the backend {name!r}, but this FastFundus supports {', '.join(BACKENDS)}; upgrade "
            "FastFundus, or run the float32 graph in the bundle: --backend openvino or onnxruntime"
        )
    engine: Engine = backend_module(name).load(folder, metadata)
    return complete_engine(engine, metadata)


def backend_module(name: str) -> Any:
    """Return the module of one of `BACKENDS`."""
    return importlib.import_module(f"fastfundus.engines.{name.replace('-', '_')}_backend")


def complete_engine(engine: Engine, metadata: dict[str, Any]) -> Engine:
    """Set what the engine of a bundle must return, from its `bundle.json`."""
    engine.guarded = metadata.get("guard") is not None
    engine.outputs = len(metadata["labels"]) + engine.guarded
    return engine
