"""TensorRT for RTX backend: engines for NVIDIA's GPUs of workstations, built on any machine, with or without a GPU.

Whatever differs from `tensorrt_backend` is here. Such an engine is compiled for its GPU when it is first loaded, which
takes seconds and is kept. It does not run on data-centre GPUs of compute capability 9.0 and 10.0 (H100, H200, B200),
for which TensorRT is. Building needs the extra `tensorrt-rtx`; running also needs pycuda (extra `cuda`), but not torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastfundus.engines.cuda_sample import current
from fastfundus.engines.proof import RoundedEngine, draw_photos, prove, write_proof
from fastfundus.engines.runtime import INPUT, Blueprint, Engine, complete_engine
from fastfundus.engines.tensorrt_backend import first_gpu, typed_graph
from fastfundus.engines.tensorrt_build import PlanOptions, keep_cached, message_logger, read_graph, serialize
from fastfundus.engines.tensorrt_runtime import TensorRtEngine
from fastfundus.errors import BundleError, ConfigError, MissingDependency, close_matches, require
from fastfundus.kernels.building import cache_folder

__all__ = [
    "DEFAULT_TARGETS",
    "PACKAGE",
    "TARGETS",
    "build",
    "load",
    "precisions",
    "runs_here",
    "set_targets",
    "stand_in",
]

PACKAGE = "tensorrt_rtx_bindings"
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that an engine may be built for."""
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
"""A100; RTX 30 and A40; RTX 40, L4 and L40; RTX 50 and RTX PRO. NVIDIA's own default, spelled out."""
_PLAN, _TYPED = "engine.plan", "engine.onnx"


def precisions() -> tuple[str, ...]:
    """Return the precisions that can be built, 8-bit ones last; the GPU does not matter."""
    require(PACKAGE, extra="tensorrt-rtx")
    return ("fp16", "bf16", "fp32", "int8", "fp8")


def runs_here(options: dict[str, Any]) -> bool:
    """Return whether this machine has a GPU that an engine with these options is built for."""
    try:
        _, (major, minor) = first_gpu("cuda")
    except (BundleError, MissingDependency):
        return False
    return f"sm{major}{minor}" in options.get("targets", DEFAULT_TARGETS)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Build an engine; see `tensorrt_backend.build`.

    Args:
        blueprint: source of the engine. Its options are `batches`, `targets` and `progress`.
        folder: folder to write the engine, its graph and its proof to.
        precision: one of `precisions`.

    Returns:
        Entries for `bundle.json`.

    Raises:
        BundleError: if NVIDIA's parser or builder fails.
        ConfigError: if an option is unknown.
    """
    trt = require(PACKAGE, extra="tensorrt-rtx")
    named = dict(blueprint.options)
    progress = named.pop("progress", lambda phase, step, steps: None)
    targets = _checked_targets(named.pop("targets", DEFAULT_TARGETS))
    if unknown := sorted(named.keys() - {"batches"}):
        raise ConfigError(
            f"tensorrt-rtx has no option {unknown[0]!r}{close_matches(unknown[0], ['batches', 'targets'])}"
        )
    batches = PlanOptions(**named).batches
    typed = folder / _TYPED
    typed_graph(blueprint, typed, precision)
    logger = _logger(trt)
    builder, network, config = read_graph(trt, typed.read_bytes(), INPUT, batches, logger, exact=precision == "fp32")
    set_targets(trt, config, targets)
    (folder / _PLAN).write_bytes(serialize(trt, builder, network, config, logger, progress))
    photos = draw_photos(blueprint.size)
    write_proof(folder, photos, blueprint.model.answers(photos))
    return {
        "engine": _PLAN,
        "proven_graph": _TYPED,
        "needs": {},
        "tensorrt_rtx": trt.__version__,
        "targets": list(targets),
        "batches": list(batches),
        "not_run": not runs_here(blueprint.options),
    }


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Let a configuration build for some of `TARGETS`."""
    config.num_compute_capabilities = len(targets)
    for number, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), number)


def _checked_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(
                f"tensorrt-rtx cannot build for {target!r}; targets are {', '.join(TARGETS)}; for H100, H200 and B200 "
                "use --backend tensorrt"
            )
    if not targets or len(set(targets)) < len(targets):
        raise ConfigError(f"targets must be different ones of {', '.join(TARGETS)}, got {', '.join(targets) or 'none'}")
    return tuple(targets)


def stand_in(folder: Path, metadata: dict[str, Any]) -> Engine:
    """Return an engine that runs the graph of a plan on the processor, rounded as on a GPU."""
    return complete_engine(RoundedEngine(folder / metadata["proven_graph"], metadata["spec"]["size"]), metadata)


def load(folder: Path, metadata: dict[str, Any]) -> Engine:
    """Load the engine of a bundle, and check its answers if it was never loaded on this GPU.

    Raises:
        BundleError: if there is no GPU, the engine was built for other GPUs or another version, or its answers are not
            those of the model.
        MissingDependency: if TensorRT for RTX or pycuda is not installed.
    """
    trt = require(PACKAGE, extra="tensorrt-rtx")
    name, (major, minor) = first_gpu("cuda")
    device = f"{name} (compute capability {major}.{minor})"
    key = f"{metadata.get('fingerprint', 'new')[:16]} {metadata['precision']} {trt.__version__} {device}"
    kept = cache_folder() / "tensorrt-rtx" / re.sub(r"[^A-Za-z0-9.]+", "_", key)
    engine = TensorRtRtxEngine(
        trt, (folder / metadata["engine"]).read_bytes(), metadata["spec"]["size"], str(folder),
        compiled=kept.with_name(f"{kept.name}.cache"),
        built=f"for {', '.join(metadata['targets'])} by TensorRT for RTX {metadata['tensorrt_rtx']}",
        device=device,
    )  # fmt: skip
    if "fingerprint" in metadata:
        try:
            prove(
                complete_engine(engine, metadata), folder, metadata["precision"],
                kept.with_name(f"{kept.name}.json"), device,
            )  # fmt: skip
        except BaseException:
            engine.close()
            raise
    return engine


_loggers: dict[str, Any] = {}


def _logger(trt: Any) -> Any:
    """Return the logger of this process: NVIDIA's library ignores a second one, with a warning."""
    if trt.__version__ not in _loggers:
        _loggers[trt.__version__] = message_logger(trt)
    return _loggers[trt.__version__]


class TensorRtRtxEngine(TensorRtEngine):
    """Engine that runs on the first GPU; see `TensorRtEngine`.

    Args:
        trt: the module `tensorrt_rtx_bindings`.
        plan: the engine.
        size: side of the photos in pixels.
        name: name of the bundle, for messages.
        compiled: file that keeps what was compiled for this GPU.
        built: what the engine was built for and by, for messages.
        device: name of the GPU, for messages.

    Raises:
        BundleError: if the engine cannot run here; the message says why and what to do.
    """

    # TensorRT for RTX records graphs itself, for every batch size.
    _records = False

    def __init__(self, trt: Any, plan: bytes, size: int, name: str, *, compiled: Path, built: str, device: str) -> None:
        self._compiled, self._built, self._device = compiled, built, device
        self._cache: Any = None
        super().__init__(trt, plan, size, name)
        self._keep_compiled()

    def _new_logger(self, trt: Any) -> Any:
        return _logger(trt)

    def _check(self, trt: Any, runtime: Any, plan: bytes, name: str) -> None:
        validity, found = runtime.get_engine_validity(plan)
        if validity != trt.EngineValidity.INVALID:
            return
        reasons = trt.EngineInvalidityDiagnostics
        rebuild = "rebuild it from its run, or run the float32 graph in the bundle: --backend openvino or onnxruntime"
        causes = {
            reasons.MALFORMED_ENGINE: f"the engine is damaged; {rebuild}",
            reasons.VERSION_MISMATCH: f"here is TensorRT for RTX {trt.__version__}; install the other, or {rebuild}",
            reasons.UNSUPPORTED_CC: f"here is {self._device}; build it with --targets for this GPU, or {rebuild}",
            reasons.OLD_CUDA_DRIVER: "the driver of the GPU is too old; install a newer one",
            reasons.OLD_CUDA_RUNTIME: "the CUDA runtime is too old; install a newer one",
            reasons.INSUFFICIENT_GPU_MEMORY: "the GPU has too little free memory; build with a smaller --max-batch",
            reasons.CUDA_ERROR: f"CUDA failed on {self._device} ({self._logger.last()}); see nvidia-smi",
        }
        cause = next((text for reason, text in causes.items() if found & int(reason)), self._logger.last())
        raise BundleError(f"{name}: built {self._built}, but cannot run here: {cause}")

    def _new_context(self, trt: Any, engine: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._compiled.is_file():
                # One of another driver is refused, and written anew.
                self._cache.deserialize(self._compiled.read_bytes())
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(runtime_config=config)

    def _keep_compiled(self) -> None:
        with current(self._context, cuda=self._cuda):
            data = bytes(self._cache.serialize())
        # Without it, such as on a full disk, the next start takes seconds longer.
        with contextlib.suppress(OSError):
            keep_cached(self._compiled, data)

    def _free(self) -> None:
        # Batches of other sizes have been compiled since.
        if self._cache is not None and self._contexts:
            self._keep_compiled()
        self._cache = None
        super()._free()
