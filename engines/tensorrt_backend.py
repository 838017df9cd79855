"""TensorRT on an NVIDIA GPU: built here, run without torch. Needs extra `tensorrt`."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastfundus.engines.runtime import INPUT, Blueprint, Engine, require_needs
from fastfundus.errors import BundleError, ConfigError, close_matches, require

__all__ = ["PACKAGE", "build", "load", "needs", "precisions"]

PACKAGE = "tensorrt"
_PLAN, _TYPED, _LAYERS = "engine.plan", "engine.onnx", "layers.json"
_BFLOAT16_FROM = (8, 0)
"""Compute capability: A100 and later."""
_FLOAT8_FROM = (8, 9)
"""L4, H100 and later."""


def _device() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the first GPU.

    Raises:
        BundleError: there is none.
    """
    require("pycuda", extra="tensorrt")
    import pycuda.driver as cuda

    try:
        cuda.init()
        device = cuda.Device(0)
    except cuda.Error as error:
        raise BundleError(
            f"TensorRT needs an NVIDIA GPU, and there is none ({error}); take --backend openvino"
        ) from None
    return device.name(), tuple(device.compute_capability())


def needs() -> dict[str, str]:
    """What a machine must have to run a plan that is not portable: this very GPU and TensorRT."""
    trt = require("tensorrt", extra="tensorrt")
    name, (major, minor) = _device()
    return {"device": f"{name} (compute capability {major}.{minor})", "tensorrt": trt.__version__}


def precisions() -> tuple[str, ...]:
    """Precisions that this GPU computes in, eight bits last."""
    require("tensorrt", extra="tensorrt")
    _, capability = _device()
    bf16 = ("bf16",) if capability >= _BFLOAT16_FROM else ()
    fp8 = ("fp8",) if capability >= _FLOAT8_FROM else ()
    return ("fp16", *bf16, "fp32", "int8", *fp8)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Build a plan for this GPU.

    The types of the graph say what is computed in: for "fp16" and "bf16" the model is exported anew in them, for "int8"
    and "fp8" the graph is quantised explicitly. Preprocessing and probabilities stay float32.

    Args:
        blueprint: its model, its graph, for eight bits its calibration photos; options are those of `PlanOptions`, and
            `progress`.
        folder: where the plan goes, and what the inspector says of its layers.
        precision: one of `precisions`.

    Returns:
        What `bundle.json` says of the engine.

    Raises:
        BundleError: TensorRT refuses.
        ConfigError: there is no such option.
    """
    from fastfundus.engines.export import export_onnx
    from fastfundus.engines.quantize import quantize_graph
    from fastfundus.engines.tensorrt_build import PlanOptions, build_plan

    trt = require("tensorrt", extra="tensorrt")
    named = dict(blueprint.options)
    progress = named.pop("progress", lambda phase, step, steps: None)
    known = {field.name for field in fields(PlanOptions)}
    if unknown := sorted(named.keys() - known):
        raise ConfigError(f"tensorrt has no option {unknown[0]!r}{close_matches(unknown[0], known)}")
    options = PlanOptions(**named)
    typed = folder / _TYPED
    if precision in ("int8", "fp8"):
        quantize_graph(blueprint.graph, blueprint.calibration, typed, precision=precision)
    elif precision == "fp32":
        shutil.copy(blueprint.graph, typed)
    else:
        export_onnx(blueprint.model, typed, [], precision=precision)
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


def load(folder: Path, about: dict[str, Any]) -> Engine:
    """Load the engine of a bundle.

    Raises:
        BundleError: it was built for another GPU or TensorRT, or cannot be loaded.
    """
    from fastfundus.engines.tensorrt_runtime import TensorRtEngine

    trt = require("tensorrt", extra="tensorrt")
    require_needs(folder, about["needs"], needs())
    weights = about["weights"] and (folder / about["weights"]).read_bytes()
    return TensorRtEngine(
        trt, (folder / about["engine"]).read_bytes(), about["spec"]["size"], str(folder),
        portable=about["portable"], weights=weights,
    )  # fmt: skip
