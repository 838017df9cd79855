"""Engines that are tried for one graph: built, run on the same photos, compared with the model. Needs torch."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.engines.export import ScreeningModel, check_graph
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import GRAPH, Blueprint, Engine, load_backend
from fastfundus.errors import BundleError
from fastfundus.spec import PreprocessSpec

__all__ = ["EIGHT_BITS", "Evidence", "Trials"]

EIGHT_BITS = ("int8", "fp8")
"""Learned on calibration photos, and kept only if they are worth it."""
_GRAPH_PHOTOS = 8
"""Photos that the graph is checked on in another runtime."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Photos that an engine is proven with."""

    photos: NDArray[np.uint8]
    """[N, S, S, 3], N at least 1, that the run did not learn from."""
    truth: NDArray[np.float64] | None
    """[N, L] or [N, L, S, S] what is known of them: 0, 1 or NaN; with it the loss of AUROC is measured too."""
    calibration: NDArray[np.uint8]
    """[M, S, S, 3] others, for engines of eight bits to learn their ranges on; may be empty, there are then none."""


class Trials:
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
        if not set(precisions) & set(EIGHT_BITS):
            return reports
        rivals = [report for report in reports if report.precision not in EIGHT_BITS]
        if not rivals:
            rivals = [self._compared(name) for name in self.module.precisions() if name not in EIGHT_BITS]
        rivals = [rival for rival in rivals if rival.passed]
        if not rivals:
            return reports
        fastest = max(rivals, key=lambda rival: rival.images_per_s).precision
        return [
            report.against(_ratio(self._load(report.precision), self._load(fastest), self.photos))
            if report.precision in EIGHT_BITS and report.passed
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
        error = None
        try:
            about = self.module.build(self.blueprint, self._place(precision), precision)
            self.built[precision] = {**self.about, "precision": precision, **about}
            with self._load(precision) as engine:
                got, rate = _run_engine(engine, self.photos)
        except BundleError as refusal:
            # A builder that refuses, an answer that is no probability: to be reported, and no reason not to try others.
            got, rate, error = np.full_like(self.expected, np.nan), 0.0, str(refusal)
        report = compare(
            self.expected, got, self.thresholds, precision=precision, images_per_s=rate,
            torch_images_per_s=self.torch_rate, truth=self.truth,
        )  # fmt: skip
        self.reports[precision] = replace(report, error=error)
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


def _run_engine(engine: Engine, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    engine.infer(photos[:4])  # the first call allocates
    began = time.perf_counter()
    got = np.concatenate([engine.infer(photos[start : start + 32]) for start in range(0, len(photos), 32)])
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
