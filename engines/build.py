"""From a trained run to a bundle that has earned its place. Needs torch; what it writes does not."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle, write_bundle_json
from fastfundus.engines.export import ScreeningModel, export_onnx
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import BACKENDS, Engine, load_backend, processor
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
    truth: NDArray[np.float64] | None = None,
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
        precision: "fp32", "bf16", or "auto": every one that this machine computes in is built and measured, and the
            fastest that passes is kept.
        truth: [N, L] what is known of the photos, 0, 1 or NaN; with it, the loss of AUROC is measured too.

    Returns:
        The bundle, and how the engine compared.

    Raises:
        GateRefused: the engine's answers differ too much; nothing is written, and the message says what would pass.
        ConfigError: backend or precision are unknown.
        BundleError: `output` is something else.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} cannot be built{close_matches(backend, BACKENDS)}")
    module = importlib.import_module(f"fastfundus.engines.{backend}_backend")
    here = module.precisions()
    if precision not in ("auto", *here):
        raise ConfigError(f"precision {precision!r} cannot be built here{close_matches(precision, [*here, 'auto'])}")
    if output.exists() and not (output / "bundle.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: is there already and is no bundle; choose another --output")
    partial, refused = (output.with_name(f"{output.name}.{end}") for end in ("partial", "refused.json"))
    shutil.rmtree(partial, ignore_errors=True)
    refused.unlink(missing_ok=True)
    partial.mkdir(parents=True)
    try:
        temperatures = [float(entry["temperature"]) for entry in labels.values()]
        model = ScreeningModel(classifier, spec, temperatures, activation).eval()
        export_onnx(model, spec.size, partial / "model.onnx")
        job = _Job(backend, module, model, spec, labels, photos, truth, partial)
        tried = [job.attempt(name) for name in (here if precision == "auto" else (precision,))]
        passed = [report for report in tried if report.passed]
        if not passed:
            # Of those that were not asked for, say which would do.
            tried += [job.attempt(name) for name in here if name not in {report.precision for report in tried}]
            refused.write_text(json.dumps([report.to_dict() for report in tried], indent=1) + "\n")
            raise GateRefused(_refusal(tried, refused))
        best = max(passed, key=lambda report: report.images_per_s)
        about = job.take(best.precision) | {
            "parity": best.to_dict(),
            "tried": [report.to_dict() for report in tried],
            "built_on": _machine(module.PACKAGE),
            "provenance": provenance,
        }
        write_bundle_json(partial, about)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(output), best


class _Job:
    """One graph, and the engines that are tried for it, each in a folder of its own."""

    def __init__(
        self,
        backend: str,
        module: Any,
        model: ScreeningModel,
        spec: PreprocessSpec,
        labels: dict[str, dict[str, Any]],
        photos: NDArray[np.uint8],
        truth: NDArray[np.float64] | None,
        folder: Path,
    ) -> None:
        self.module, self.model, self.photos, self.truth, self.folder = module, model, photos, truth, folder
        self.about: dict[str, Any] = {
            "backend": backend,
            "spec": spec.to_dict(),
            "spec_fingerprint": spec.fingerprint,
            "labels": labels,
        }
        self.expected, self.torch_rate = _run_torch(model, photos)
        self.thresholds = np.array([float(entry["threshold"]) for entry in labels.values()])
        self.built: dict[str, dict[str, Any]] = {}

    def attempt(self, precision: str) -> ParityReport:
        """Build an engine and compare it with the model."""
        place = self.folder / f"attempt_{precision}"
        place.mkdir()
        graph, size = self.folder / "model.onnx", self.about["spec"]["size"]
        engine = self.module.build(self.model, graph, size, place, precision)
        self.built[precision] = {**self.about, "precision": precision, "engine": engine, "needs": self.module.needs()}
        loaded = load_backend(self.about["backend"], place, self.built[precision])
        got, rate = _run_engine(loaded, self.photos)
        loaded.close()
        return compare(
            self.expected, got, self.thresholds, precision=precision, images_per_s=rate,
            torch_images_per_s=self.torch_rate, truth=self.truth,
        )  # fmt: skip

    def take(self, precision: str) -> dict[str, Any]:
        """Keep one of the engines, forget the others; what its `bundle.json` says of it."""
        for place in self.folder.glob("attempt_*"):
            if place.name == f"attempt_{precision}":
                for file in place.iterdir():
                    file.replace(self.folder / file.name)
            shutil.rmtree(place)
        return self.built[precision]


def _run_torch(model: ScreeningModel, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    parts = []
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(photos), 16):
            parts.append(model(torch.from_numpy(photos[start : start + 16])).numpy())
    return np.concatenate(parts), len(photos) / (time.perf_counter() - began)


def _run_engine(engine: Engine, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    engine.infer(photos[:4])  # the first call allocates
    began = time.perf_counter()
    got = np.concatenate([engine.infer(photos[start : start + 32]) for start in range(0, len(photos), 32)])
    return got, len(photos) / (time.perf_counter() - began)


def _refusal(tried: list[ParityReport], file: Path) -> str:
    """Say what failed, and which of the other precisions would pass."""
    lines = [f"the engine was refused: {tried[0]}"]
    for report in tried[1:]:
        hint = f"; build with --precision {report.precision}" if report.passed else ""
        lines.append(f"tried instead: {report}{hint}")
    return "\n".join([*lines, f"{file} has the figures"])


def _machine(package: str) -> dict[str, str]:
    return {
        "backend_version": metadata.version(package),
        "device": processor(),
        "platform": platform.platform(),
        "fastfundus": metadata.version("fastfundus"),
        "torch": metadata.version("torch"),
    }
