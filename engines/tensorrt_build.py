"""TensorRT plans from ONNX graphs, built as strongly typed networks. Supports TensorRT 10.12 and later, and 11.

Precision is determined by the types of the graph and not by builder flags, which TensorRT 11 removed. Needs a GPU, but
not torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfundus.errors import BundleError, ConfigError
from fastfundus.kernels.building import cache_folder

__all__ = [
    "Plan",
    "PlanOptions",
    "Progress",
    "build_plan",
    "keep_cached",
    "message_logger",
    "profile_ranges",
    "read_graph",
    "serialize",
    "timing_cache_file",
]

Progress = Callable[[str, int, int], None]
"""Progress callback, called with the phase, the number of completed steps and the total number of steps."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Build options of a plan."""

    batches: tuple[int, ...] = (1, 8, 64)
    """Batch sizes in ascending order. Each gets an optimization profile that is tuned for it and covers the sizes above
    the previous one. The last is the largest batch of one launch; `infer` splits larger ones."""
    portable: bool = False
    """Build a plan that also runs on later GPUs (A100 and newer) and in other TensorRT versions. It is slower, and
    loading it executes code contained in the plan."""
    weightless: bool = False
    """Build a plan without weights, which are read from the graph when the engine is loaded."""

    def __post_init__(self) -> None:
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] < 1:
            raise ConfigError(f"batches must be ascending and at least 1, got {list(self.batches)}; e.g. 1, 8, 64")


@dataclass(frozen=True, slots=True)
class Plan:
    """Built engine."""

    data: bytes
    """Serialised engine."""
    layers: str
    """Information on every layer from the engine inspector, as JSON."""


def profile_ranges(batches: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return the smallest, optimal and largest batch size of each profile."""
    return [(1 + before, batch, batch) for before, batch in zip((0, *batches), batches, strict=False)]


def message_logger(trt: Any) -> Any:
    """Return a TensorRT logger that collects errors; its `last()` returns the most recent one as a single line."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

        def last(self) -> str:
            return self.errors[-1] if self.errors else "TensorRT gave no reason"

    return Logger()


def timing_cache_file(version: str, device: str) -> Path:
    """Return the path of the timing cache, which holds kernel timings of one TensorRT version on one device."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{version} {device}")
    return cache_folder() / "tensorrt" / f"{name}.timing"


def build_plan(
    trt: Any, graph: bytes, tensor: str, options: PlanOptions, *, exact: bool, device: str, progress: Progress
) -> Plan:
    """Build a plan from an ONNX graph.

    Args:
        trt: the module `tensorrt`.
        graph: serialised ONNX graph, whose tensor types determine the precision.
        tensor: name of its input, uint8 [N, S, S, 3].
        options: build options.
        exact: do not round float32 to TF32.
        device: name of the GPU, for the timing cache.
        progress: receives progress callbacks.

    Raises:
        BundleError: if the parser or the builder fails; the message contains TensorRT's error.
        KeyboardInterrupt: if the user interrupted the build, once the builder has stopped.
    """
    logger = message_logger(trt)
    builder, network, config = read_graph(trt, graph, tensor, options.batches, logger, exact=exact)
    if options.portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.weightless:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    kept = timing_cache_file(trt.__version__, device)
    _use_timings(config, kept)
    plan = serialize(trt, builder, network, config, logger, progress)
    keep_cached(kept, bytes(config.get_timing_cache().serialize()))
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = options.portable
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(f"TensorRT {trt.__version__} cannot load the engine it built ({logger.last()})")
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return Plan(plan, layers)


def read_graph(
    trt: Any, graph: bytes, tensor: str, batches: tuple[int, ...], logger: Any, *, exact: bool
) -> tuple[Any, Any, Any]:
    """Parse a graph; return the builder, the strongly typed network, and a configuration with its profiles.

    The arguments are those of `build_plan`; `trt` may also be the module `tensorrt_rtx`.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        first = parser.get_error(0).desc() if parser.num_errors else logger.last()
        raise BundleError(f"TensorRT {trt.__version__} cannot read the graph ({first}); use --backend aoti")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    photo = tuple(network.get_input(0).shape)[1:]
    for smallest, tuned, largest in profile_ranges(batches):
        profile = builder.create_optimization_profile()
        profile.set_shape(tensor, (smallest, *photo), (tuned, *photo), (largest, *photo))
        if config.add_optimization_profile(profile) < 0:
            raise BundleError(f"TensorRT rejected a profile of {smallest} to {largest} photos ({logger.last()})")
    return builder, network, config


def serialize(trt: Any, builder: Any, network: Any, config: Any, logger: Any, progress: Progress) -> bytes:
    """Build the engine of a network; see `build_plan`."""
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    if data is None:
        raise BundleError(
            f"TensorRT {trt.__version__} cannot build the engine ({logger.last()}); try --max-batch 8, or "
            "--backend aoti"
        )
    return bytes(data)


def _use_timings(config: Any, file: Path) -> None:
    """Load the timing cache of earlier builds, or start with an empty one if it is damaged or of another device."""
    try:
        known = file.read_bytes()
    except OSError:
        known = b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_cached(file: Path, data: bytes) -> None:
    """Write a file of the cache folder as a whole; other processes may write it at the same time."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(file)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the progress of the builder, and stops it when Ctrl-C arrives in one of these calls."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 0))
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.stopped

        def _tell(self, phase: str, step: int) -> None:
            try:
                progress(phase, step, self.steps.get(phase, 0))
            except KeyboardInterrupt:
                # An exception must not propagate through the builder's native code.
                self.stopped = True

    return Monitor()
