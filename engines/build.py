"""From a trained run to a bundle that has earned its place. Needs torch; what it writes does not."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.engines.archive import is_archive, pack
from fastfundus.engines.bundle import Bundle, write_bundle_json
from fastfundus.engines.export import ScreeningModel, check_graph, export_onnx
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import BACKENDS, GRAPH, Blueprint, Engine, load_backend, processor
from fastfundus.errors import BundleError, ConfigError, GateRefused, close_matches
from fastfundus.spec import PreprocessSpec

__all__ = ["MOST_PARITY_MAPS", "MOST_PARITY_PHOTOS", "Evidence", "build_bundle"]

MOST_PARITY_PHOTOS = 256
"""Held-out photos that engine and model are compared on."""
MOST_PARITY_MAPS = 16
"""The same where every photo is a quarter of a million decisions."""
_GRAPH_PHOTOS = 8
"""Of those, the ones that the graph is checked on in another runtime."""
_EIGHT_BITS = ("int8", "fp8")
"""Learned on calibration photos, and kept only if they are worth it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Photos that an engine is proven with."""

    photos: NDArray[np.uint8]
    """[N, S, S, 3], N at least 1, that the run did not learn from."""
    truth: NDArray[np.float64] | None
    """[N, L] or [N, L, S, S] what is known of them: 0, 1 or NaN; with it the loss of AUROC is measured too."""
    calibration: NDArray[np.uint8]
    """[M, S, S, 3] others, for engines of eight bits to learn their ranges on; may be empty, there are then none."""


def build_bundle(
    model: ScreeningModel,
    spec: PreprocessSpec,
    labels: dict[str, dict[str, Any]],
    evidence: Evidence,
    output: Path,
    *,
    provenance: dict[str, Any],
    backend: str = "openvino",
    precision: str = "auto",
    options: dict[str, Any] | None = None,
) -> tuple[Bundle, ParityReport]:
    """Export, build, prove and write.

    Args:
        model: in evaluation mode, on the CPU.
        spec: what its photos were prepared with.
        labels: by name of each output, in order: `temperature`, `threshold`, `finding` (whether it makes a photo
            positive), and whatever else should be stored.
        evidence: photos to prove the engine on, and to calibrate it with.
        output: the bundle: a folder, or one file where the name ends in ".zip"; must not exist, or be a bundle, which
            is replaced when the new one passes.
        provenance: stored as it is: which run, which configuration.
        backend: one of `BACKENDS`.
        precision: one of the backend's, or "auto": every one that this machine computes in is built and measured, and
            the fastest that passes is kept.
        options: of the backend, by name.

    Returns:
        The bundle, and how the engine compared.

    Raises:
        GateRefused: the engine's answers differ too much, or eight bits are not worth it; no bundle is written, and the
            message says what would pass.
        ConfigError: backend or precision are unknown, or there are no photos to calibrate eight bits with.
        BundleError: `output` is something else.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} cannot be built{close_matches(backend, BACKENDS)}")
    module = importlib.import_module(f"fastfundus.engines.{backend}_backend")
    here = module.precisions()
    if precision not in ("auto", *here):
        raise ConfigError(f"precision {precision!r} cannot be built here{close_matches(precision, [*here, 'auto'])}")
    if not len(evidence.calibration):
        if precision in _EIGHT_BITS:
            raise ConfigError(
                f"precision {precision!r} needs photos to learn its ranges on, and the run's training photos are not "
                "at hand; give a cache with --calibration"
            )
        here = tuple(name for name in here if name not in _EIGHT_BITS)
    _require_free(output)
    partial, refused = (output.with_name(f"{output.name}.{end}") for end in ("partial", "refused.json"))
    shutil.rmtree(partial, ignore_errors=True)
    refused.unlink(missing_ok=True)
    partial.mkdir(parents=True)
    try:
        export_onnx(model, partial / GRAPH, list(labels))
        job = _Job(backend, module, model, spec, labels, evidence, partial, options or {})
        tried = job.attempt(here if precision == "auto" else (precision,))
        passed = [report for report in tried if report.passed and precision in ("auto", report.precision)]
        if not passed:
            # Of those that were not asked for, say which would do; eight bits are never closer than more.
            others = [name for name in here if name not in {*_EIGHT_BITS, *(report.precision for report in tried)}]
            tried += job.attempt(tuple(others))
            refused.write_text(json.dumps([report.to_dict() for report in tried], indent=1) + "\n")
            raise GateRefused(_refusal(tried, refused))
        best = max(passed, key=lambda report: (report.precision in _EIGHT_BITS, report.images_per_s))
        about = job.take(best.precision) | {
            "parity": best.to_dict(),
            "tried": [report.to_dict() for report in tried],
            "graph_difference": job.graph_difference,
            "built_on": _machine(module.PACKAGE),
            "provenance": provenance,
        }
        write_bundle_json(partial, about)
        _publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(output), best


def _require_free(output: Path) -> None:
    """Raise where something stands that is no bundle."""
    if is_archive(output):
        mine = not output.exists() or output.is_file()
    else:
        mine = (
            not output.exists() or (output / "bundle.json").is_file() or (output.is_dir() and not any(output.iterdir()))
        )
    if not mine:
        raise BundleError(f"{output}: is there already and is no bundle; choose another --output")


def _publish(folder: Path, output: Path) -> None:
    if is_archive(output):
        pack(folder, output)
        return
    # The one before is moved aside and not removed first: a kill between leaves both.
    before = output.with_name(f"{output.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if output.exists():
        output.rename(before)
    folder.rename(output)
    shutil.rmtree(before, ignore_errors=True)


class _Job:
    """One graph, and the engines that are tried for it, each in a folder of its own."""

    def __init__(
        self,
        backend: str,
        module: Any,
        model: ScreeningModel,
        spec: PreprocessSpec,
        labels: dict[str, dict[str, Any]],
        evidence: Evidence,
        folder: Path,
        options: dict[str, Any],
    ) -> None:
        self.module, self.photos, self.truth, self.folder = module, evidence.photos, evidence.truth, folder
        self.blueprint = Blueprint(model, folder / GRAPH, spec.size, evidence.calibration, options)
        self.expected, self.torch_rate = _run_torch(model, self.photos)
        self.about: dict[str, Any] = {
            "backend": backend,
            "spec": spec.to_dict(),
            "spec_fingerprint": spec.fingerprint,
            "labels": labels,
            "output": "maps" if self.expected.ndim > 2 else "probabilities",
        }
        some = slice(0, _GRAPH_PHOTOS)
        self.graph_difference = check_graph(self.blueprint.graph, self.photos[some], self.expected[some])
        self.thresholds = np.array([float(entry["threshold"]) for entry in labels.values()])
        self.built: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, ParityReport] = {}

    def attempt(self, precisions: tuple[str, ...]) -> list[ParityReport]:
        """Build engines and compare them with the model; those of eight bits with the fastest of the others too."""
        reports = [self._compared(name) for name in precisions]
        if not set(precisions) & set(_EIGHT_BITS):
            return reports
        rivals = [report for report in reports if report.precision not in _EIGHT_BITS]
        if not rivals:
            rivals = [self._compared(name) for name in self.module.precisions() if name not in _EIGHT_BITS]
        rivals = [rival for rival in rivals if rival.passed]
        if not rivals:
            return reports
        fastest = max(rivals, key=lambda rival: rival.images_per_s).precision
        return [
            report.against(_ratio(self._load(report.precision), self._load(fastest), self.photos))
            if report.precision in _EIGHT_BITS and report.passed
            else report
            for report in reports
        ]

    def _place(self, precision: str) -> Path:
        return self.folder / f"attempt_{precision}"

    def _load(self, precision: str) -> Engine:
        return load_backend(self.about["backend"], self._place(precision), self.built[precision])

    def _compared(self, precision: str) -> ParityReport:
        if precision in self.reports:
            return self.reports[precision]
        self._place(precision).mkdir()
        about = self.module.build(self.blueprint, self._place(precision), precision)
        self.built[precision] = {**self.about, "precision": precision, **about}
        with self._load(precision) as engine:
            got, rate = _run_engine(engine, self.photos, self.expected.shape)
        self.reports[precision] = compare(
            self.expected, got, self.thresholds, precision=precision, images_per_s=rate,
            torch_images_per_s=self.torch_rate, truth=self.truth,
        )  # fmt: skip
        return self.reports[precision]

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


def _run_engine(engine: Engine, photos: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[NDArray[np.float32], float]:
    try:
        engine.infer(photos[:4])  # the first call allocates
        began = time.perf_counter()
        got = np.concatenate([engine.infer(photos[start : start + 32]) for start in range(0, len(photos), 32)])
    except BundleError:
        # It gave what is no probability: a result to report, and no reason to stop trying others.
        return np.full(shape, np.nan, np.float32), 0.0
    return got, len(photos) / (time.perf_counter() - began)


def _ratio(challenger: Engine, reference: Engine, photos: NDArray[np.uint8]) -> float:
    """How many times as fast: median of rounds in turns, so that a machine's moods hit both."""
    some = np.resize(photos, (32, *photos.shape[1:]))
    ratios = []
    with challenger, reference:
        for engine in (challenger, reference):
            engine.infer(some[:4])
        for _ in range(5):
            seconds = []
            for engine in (challenger, reference):
                began = time.perf_counter()
                engine.infer(some)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios))


def _refusal(tried: list[ParityReport], file: Path) -> str:
    """Say what failed, and which of the other precisions would pass."""
    lines = [f"the engine was refused: {tried[0]}"]
    for report in tried[1:]:
        hint = f"; build with --precision {report.precision}" if report.passed else ""
        lines.append(f"tried instead: {report}{hint}")
    return "\n".join([*lines, f"{file} has the figures"])


def _machine(package: str) -> dict[str, str]:
    return {
        # Of the module: a package may have come under another name, as tensorrt-cu13.
        "backend_version": importlib.import_module(package).__version__,
        "device": processor(),
        "platform": platform.platform(),
        "fastfundus": metadata.version("fastfundus"),
        "torch": metadata.version("torch"),
    }
