"""From a trained run to a bundle that has earned its place. Needs torch; what it writes does not."""

from __future__ import annotations

import functools
import platform
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle, write_bundle_json
from fastfundus.engines.export import ScreeningModel, export_onnx
from fastfundus.engines.openvino_backend import PRECISIONS, convert, fastest_precision, shared_core
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import BACKENDS, load_backend
from fastfundus.errors import BundleError, ConfigError, GateRefused, close_matches
from fastfundus.models.activation import Activation
from fastfundus.spec import PreprocessSpec

__all__ = ["MOST_PARITY_PHOTOS", "build_bundle"]

MOST_PARITY_PHOTOS = 256
"""Held-out photos that engine and model are compared on."""


def build_bundle(
    classifier: torch.nn.Module,
    spec: PreprocessSpec,
    labels: dict[str, dict[str, Any]],
    photos: NDArray[np.uint8],
    output: Path,
    *,
    provenance: dict[str, Any],
    activation: Activation = "sigmoid",
    backend: str = "openvino",
    precision: str = "auto",
) -> tuple[Bundle, ParityReport]:
    """Export, build, prove and write.

    Args:
        classifier: from normalised float [N, 3, S, S] to logits [N, L]; on the CPU.
        spec: what its photos were prepared with.
        labels: by name of each output, in order: `temperature`, `threshold`, `finding` (whether it makes a photo
            positive), and whatever else should be stored.
        photos: uint8 [N, S, S, 3] held-out photos to prove the engine on; at least one.
        output: the bundle's folder; must not exist, or be a bundle, which is replaced when the new one passes.
        provenance: stored as it is: which run, which configuration.
        activation: what makes probabilities of logits.
        backend: one of `BACKENDS`.
        precision: "fp32", "bf16", or "auto" for the fastest this machine computes in.

    Returns:
        The bundle, and how the engine compared.

    Raises:
        GateRefused: the engine's answers differ too much; nothing is written, and the message says what would pass.
        ConfigError: backend or precision are unknown.
        BundleError: `output` is something else.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} cannot be built{close_matches(backend, BACKENDS)}")
    if precision == "auto":
        precision = fastest_precision()
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown{close_matches(precision, [*PRECISIONS, 'auto'])}")
    if output.exists() and not (output / "bundle.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: is there already and is no bundle; choose another --output")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        temperatures = [float(entry["temperature"]) for entry in labels.values()]
        model = ScreeningModel(classifier, spec, temperatures, activation).eval()
        export_onnx(model, spec.size, partial / "model.onnx")
        engine_file = convert(partial / "model.onnx", partial)
        expected, torch_rate = _run_torch(model, photos)
        thresholds = np.array([float(entry["threshold"]) for entry in labels.values()])
        about = {
            "backend": backend,
            "engine": engine_file,
            "precision": precision,
            "spec": spec.to_dict(),
            "spec_fingerprint": spec.fingerprint,
            "labels": labels,
        }
        prove = functools.partial(
            _prove, partial, photos=photos, expected=expected, thresholds=thresholds, torch_rate=torch_rate
        )
        report = prove(about)
        if not report.passed:
            raise GateRefused(_refusal(prove, about, report))
        about |= {"parity": report.to_dict(), "built_on": _machine(backend), "provenance": provenance}
        write_bundle_json(partial, about)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(output), report


def _run_torch(model: ScreeningModel, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    parts = []
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(photos), 16):
            parts.append(model(torch.from_numpy(photos[start : start + 16])).numpy())
    return np.concatenate(parts), len(photos) / (time.perf_counter() - began)


def _prove(
    folder: Path,
    about: dict[str, Any],
    *,
    photos: NDArray[np.uint8],
    expected: NDArray[np.float32],
    thresholds: NDArray[np.float64],
    torch_rate: float,
) -> ParityReport:
    engine = load_backend(about["backend"], folder, about)
    engine.infer(photos[:4])  # the first call allocates
    began = time.perf_counter()
    got = np.concatenate([engine.infer(photos[start : start + 32]) for start in range(0, len(photos), 32)])
    rate = len(photos) / (time.perf_counter() - began)
    engine.close()
    return compare(
        expected, got, thresholds, precision=about["precision"], images_per_s=rate, torch_images_per_s=torch_rate
    )


def _refusal(prove: Callable[[dict[str, Any]], ParityReport], about: dict[str, Any], report: ParityReport) -> str:
    """Say what failed, and try the other precisions, to say which would pass."""
    lines = [f"the engine was refused: {report}"]
    for other in PRECISIONS:
        if other == report.precision or (other == "bf16" and fastest_precision() != "bf16"):
            continue
        tried = prove(about | {"precision": other})
        lines.append(f"tried instead: {tried}" + (f"; build with --precision {other}" if tried.passed else ""))
    return "\n".join(lines)


def _machine(backend: str) -> dict[str, str]:
    return {
        "backend_version": metadata.version(backend),
        "device": str(shared_core().get_property("CPU", "FULL_DEVICE_NAME")).strip(),
        "platform": platform.platform(),
        "fastfundus": metadata.version("fastfundus"),
        "torch": metadata.version("torch"),
    }
