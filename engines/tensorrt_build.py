"""A strongly typed TensorRT network from ONNX, and its plan: for TensorRT 10.12 and later, and 11.

Types are those of the graph: there are no builder flags for precision, which TensorRT 11 no longer has. Needs a GPU, no
torch.
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

__all__ = ["Plan", "PlanOptions", "Progress", "build_plan", "message_logger", "profile_ranges", "timing_cache_file"]

Progress = Callable[[str, int, int], None]
"""Called with the phase, the steps that are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan is built for."""

    batches: tuple[int, ...] = (1, 8, 64)
    """Ascending; each gets a profile that is tuned for it and reaches down to the one before. The last is the most that
    the engine takes at once; `infer` deals larger batches out."""
    portable: bool = False
    """Runs on later GPUs too (A100 and newer) and in other versions of TensorRT; slower, and loading it runs code that
    it brings."""
    weightless: bool = False
    """Leaves the weights out; they are put in from the graph when it is loaded."""

    def __post_init__(self) -> None:
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] < 1:
            raise ConfigError(f"batches must be ascending and at least 1, got {list(self.batches)}; take 1, 8, 64")


@dataclass(frozen=True, slots=True)
class Plan:
    """A built engine."""

    data: bytes
    """To be deserialised."""
    layers: str
    """What the inspector says of every layer, JSON."""


def profile_ranges(batches: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Smallest, tuned-for and largest batch of each profile."""
    return [(1 + before, batch, batch) for before, batch in zip((0, *batches), batches, strict=False)]


def message_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps what went wrong, for messages; `last()` gives it in one line."""

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
    """Where measured kernels are kept between builds: by version of TensorRT and by device, for they are not alike."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{version} {device}")
    return cache_folder() / "tensorrt" / f"{name}.timing"


def build_plan(
    trt: Any, graph: bytes, tensor: str, options: PlanOptions, *, exact: bool, device: str, progress: Progress
) -> Plan:
    """Build.

    Args:
        trt: the module `tensorrt`.
        graph: ONNX, whose types say what is computed in.
        tensor: name of its input, uint8 [N, S, S, 3].
        options: what to build for.
        exact: do not round float32 to TF32.
        device: name of the GPU, for the cache of timings.
        progress: called as the builder goes on.

    Raises:
        BundleError: the parser or the builder refuses; their words are in the message.
        KeyboardInterrupt: the user stopped it; the builder was told.
    """
    logger = message_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        first = parser.get_error(0).desc() if parser.num_errors else logger.last()
        raise BundleError(f"TensorRT {trt.__version__} cannot read the graph ({first}); take --backend aoti")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.weightless:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    photo = tuple(network.get_input(0).shape)[1:]
    for smallest, tuned, largest in profile_ranges(options.batches):
        profile = builder.create_optimization_profile()
        profile.set_shape(tensor, (smallest, *photo), (tuned, *photo), (largest, *photo))
        if config.add_optimization_profile(profile) < 0:
            raise BundleError(f"TensorRT refuses a profile of {smallest} to {largest} photos ({logger.last()})")
    kept = timing_cache_file(trt.__version__, device)
    _use_timings(config, kept)
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
    _keep_timings(config, kept)
    plan = bytes(data)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = options.portable
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(f"TensorRT {trt.__version__} cannot load what it built ({logger.last()})")
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return Plan(plan, layers)


def _use_timings(config: Any, file: Path) -> None:
    """Start from timings of earlier builds; damaged ones, or those of another device, are left and written anew."""
    try:
        known = file.read_bytes()
    except OSError:
        known = b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_bytes(bytes(config.get_timing_cache().serialize()))
    partial.replace(file)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells how far the builder is. Ctrl-C arrives in one of these calls, which stops the builder."""

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
                # An exception must not cross the builder's own code.
                self.stopped = True

    return Monitor()
