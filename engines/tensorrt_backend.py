"""TensorRT backend for NVIDIA GPUs. Needs the extra `tensorrt`; running an engine does not need torch."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastfundus.engines.runtime import INPUT, Blueprint, Engine, require_needs
from fastfundus.errors import BundleError, ConfigError, close_matches, require

__all__ = ["PACKAGE", "build", "first_gpu", "load", "needs", "precisions", "typed_graph"]

PACKAGE = "tensorrt"
_PLAN, _TYPED, _LAYERS = "engine.plan", "engine.onnx", "layers.json"
_BFLOAT16_FROM = (8, 0)
"""Minimum compute capability for bfloat16: A100 and later."""
_FLOAT8_FROM = (8, 9)
"""Minimum compute capability for float8: L4, H100 and later."""


def first_gpu(extra: str = PACKAGE) -> tuple[str, tuple[int, int]]:
    """Return the name and compute capability of the first GPU.

    Args:
        extra: extra of FastFundus that installs pycuda.

    Raises:
        BundleError: if there is no GPU.
        MissingDependency: if pycuda is not installed.
    """
    require("pycuda", extra=extra)
    import pycuda.driver as cuda

    try:
        cuda.init()
        device = cuda.Device(0)
    except cuda.Error as error:
        raise BundleError(
            f"TensorRT needs an NVIDIA GPU, but none was found ({error}); use --backend openvino"
        ) from None
    return device.name(), tuple(device.compute_capability())


def needs() -> dict[str, str]:
    """Return what a machine needs to run a plan that is not portable: the same GPU model and TensorRT version."""
    trt = require("tensorrt", extra="tensorrt")
    name, (major, minor) = first_gpu()
    return {"device": f"{name} (compute capability {major}.{minor})", "tensorrt": trt.__version__}


def precisions() -> tuple[str, ...]:
    """Return the precisions this GPU computes in, 8-bit ones last."""
    require("tensorrt", extra="tensorrt")
    _, capability = first_gpu()
    bf16 = ("bf16",) if capability >= _BFLOAT16_FROM else ()
    fp8 = ("fp8",) if capability >= _FLOAT8_FROM else ()
    return ("fp16", *bf16, "fp32", "int8", *fp8)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Build a plan for this GPU.

    The tensor types of the graph determine the precision: for "fp16" and "bf16" the model is exported again in that
    type, for "int8" and "fp8" the graph is quantised explicitly. Preprocessing and probabilities stay float32.

    Args:
        blueprint: source of the engine: its model, its graph and, for 8-bit precisions, its calibration photos. Its
            options are the fields of `PlanOptions` and `progress`.
        folder: folder to write the plan and the inspector's layer information to.
        precision: one of `precisions`.

    Returns:
        Entries for `bundle.json`.

    Raises:
        BundleError: if TensorRT cannot build the plan.
        ConfigError: if an option is unknown.
    """
    from fastfundus.engines.tensorrt_build import PlanOptions, build_plan

    trt = require("tensorrt", extra="tensorrt")
    named = dict(blueprint.options)
    progress = named.pop("progress", lambda phase, step, steps: None)
    known = {field.name for field in fields(PlanOptions)}
    if unknown := sorted(named.keys() - known):
        raise ConfigError(f"tensorrt has no option {unknown[0]!r}{close_matches(unknown[0], known)}")
    options = PlanOptions(**named)
    typed = folder / _TYPED
    typed_graph(blueprint, typed, precision)
    here = needs()
    plan = build_plan(
        trt, typed.read_bytes(), INPUT, options, exact=precision == "fp32", device=here["device"], progress=progress
    )
    (folder / _PLAN).write_bytes(plan.data)
    (folder / _LAYERS).write_text(plan.layers)
    if not options.weightless:
        typed.unlink()
    return {
        "engine": _PLAN,
        "needs": {} if options.portable else here,
        "portable": options.portable,
        "batches": list(options.batches),
        "weights": typed.name if options.weightless else None,
    }


def typed_graph(blueprint: Blueprint, output: Path, precision: str) -> None:
    """Write the graph of an engine, whose tensor types are its precision; see `build`."""
    from fastfundus.engines.export import export_onnx
    from fastfundus.engines.quantize import quantize_graph

    if precision in ("int8", "fp8"):
        quantize_graph(blueprint.graph, blueprint.calibration, output, precision=precision)
    elif precision == "fp32":
        shutil.copy(blueprint.graph, output)
    else:
        export_onnx(blueprint.model, output, [], precision=precision)


def load(folder: Path, metadata: dict[str, Any]) -> Engine:
    """Load the engine of a bundle.

    Raises:
        BundleError: if the engine was built for another GPU or TensorRT version, or cannot be loaded.
    """
    from fastfundus.engines.tensorrt_runtime import TensorRtEngine

    trt = require("tensorrt", extra="tensorrt")
    require_needs(folder, metadata["needs"], needs())
    weights = metadata["weights"] and (folder / metadata["weights"]).read_bytes()
    return TensorRtEngine(
        trt, (folder / metadata["engine"]).read_bytes(), metadata["spec"]["size"], str(folder),
        portable=metadata["portable"], weights=weights,
    )  # fmt: skip
