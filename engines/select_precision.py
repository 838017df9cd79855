"""Precision search: build engines from one graph and compare each with the model on the same photos. Needs torch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.export import ScreeningModel, check_graph
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import GRAPH, Blueprint, Engine, load_backend
from fastfundus.errors import BundleError
from fastfundus.records import GUARD_LIMIT
from fastfundus.spec import PreprocessSpec

__all__ = ["EIGHT_BITS", "ParityData", "PrecisionSearch"]

EIGHT_BITS = ("int8", "fp8")
"""Precisions that are calibrated on photos, and kept only if they are fast enough to be worthwhile."""
_GRAPH_PHOTOS = 8
"""Number of photos on which the graph is checked in another runtime."""


@dataclass(frozen=True, slots=True)
class ParityData:
    """Parity data: the photos on which an engine is calibrated and compared with its model."""

    photos: NDArray[np.uint8]
    """Photos [N, S, S, 3] that the run was not trained on, N at least 1."""
    truth: NDArray[np.float64] | None
    """Ground truth [N, L] or [N, L, S, S]: 0, 1 or NaN. If given, the loss of AUROC is measured as well."""
    calibration: NDArray[np.uint8]
    """Other photos [M, S, S, 3] for calibrating 8-bit engines. If empty, no 8-bit engines are built."""


class PrecisionSearch:
    """Precision search over one graph, with each engine in its own folder."""

    def __init__(
        self,
        backend: str,
        module: Any,
        model: ScreeningModel,
        spec: PreprocessSpec,
        labels: dict[str, dict[str, Any]],
        data: ParityData,
        folder: Path,
        options: dict[str, Any],
    ) -> None:
        self.module, self.photos, self.truth, self.folder = module, data.photos, data.truth, folder
        self.blueprint = Blueprint(model, folder / GRAPH, spec.size, data.calibration, options)
        runs_here: Callable[[dict[str, Any]], bool] = getattr(module, "runs_here", lambda options: True)
        self.measured = runs_here(options)
        """Whether this machine can run the engines; otherwise only their graphs are compared, and speed is unknown."""
        self.expected, self.torch_rate = _run_torch(model, self.photos)
        self.metadata: dict[str, Any] = {
            "backend": backend,
            "spec": spec.to_dict(),
            "spec_fingerprint": spec.fingerprint,
            "labels": labels,
            "output": "maps" if self.expected.ndim > 2 else "probabilities",
            "guard": None if model.guard is None else {"limit": model.guard.limit},
        }
        some = slice(0, _GRAPH_PHOTOS)
        self.graph_difference = check_graph(self.blueprint.graph, self.photos[some], self.expected[some])
        self.thresholds = np.array([float(entry["threshold"]) for entry in labels.values()])
        if model.guard is not None:
            # The engine must also agree on which photos are unfamiliar; there is no ground truth for that.
            self.thresholds = np.append(self.thresholds, GUARD_LIMIT)
            unknown = np.full((len(self.photos), 1), np.nan)
            self.truth = None if self.truth is None else np.concatenate([self.truth, unknown], axis=1)
        self.built: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, ParityReport] = {}

    def worthwhile(self, precisions: tuple[str, ...]) -> tuple[str, ...]:
        """Return the precisions to try: where speed is unknown, nothing justifies 8 bits."""
        return precisions if self.measured else tuple(name for name in precisions if name not in EIGHT_BITS)

    def attempt(self, precisions: tuple[str, ...]) -> list[ParityReport]:
        """Build engines and compare them with the model, and 8-bit engines also with the fastest passing other one."""
        reports = [self._compared(name) for name in precisions]
        if not set(precisions) & set(EIGHT_BITS) or not self.measured:
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
        if not self.measured:
            engine: Engine = self.module.stand_in(self._place(precision), self.built[precision])
            return engine
        return load_backend(self.metadata["backend"], self._place(precision), self.built[precision])

    def _compared(self, precision: str) -> ParityReport:
        if precision in self.reports:
            return self.reports[precision]
        self._place(precision).mkdir()
        error = None
        try:
            metadata = self.module.build(self.blueprint, self._place(precision), precision)
            self.built[precision] = {**self.metadata, "precision": precision, **metadata}
            with self._load(precision) as engine:
                got, rate = _run_engine(engine, self.photos)
        except BundleError as refusal:
            # The builder failed or an output is not a probability: report it, and continue with other precisions.
            got, rate, error = np.full_like(self.expected, np.nan), 0.0, str(refusal)
        if not self.measured:
            rate = 0.0
        report = compare(
            self.expected, got, self.thresholds, precision=precision, images_per_s=rate,
            torch_images_per_s=self.torch_rate, truth=self.truth,
        )  # fmt: skip
        self.reports[precision] = replace(report, error=error)
        return self.reports[precision]

    def take(self, precision: str) -> dict[str, Any]:
        """Keep one engine, delete the others, and return its entries for `bundle.json`."""
        for place in self.folder.glob("attempt_*"):
            if place.name == f"attempt_{precision}":
                for file in place.iterdir():
                    file.replace(self.folder / file.name)
            shutil.rmtree(place)
        metadata = self.built[precision]
        if graph := metadata.pop("proven_graph", None):
            (self.folder / graph).unlink()
        return metadata


def _run_torch(model: ScreeningModel, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    began = time.perf_counter()
    answers = model.answers(photos)
    return answers, len(photos) / (time.perf_counter() - began)


def _run_engine(engine: Engine, photos: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    engine.infer(photos[:4])  # the first call allocates
    began = time.perf_counter()
    got = np.concatenate([engine.infer(photos[start : start + 32], guard=True) for start in range(0, len(photos), 32)])
    return got, len(photos) / (time.perf_counter() - began)


def _ratio(challenger: Engine, reference: Engine, photos: NDArray[np.uint8]) -> float:
    """Return the speedup as the median of alternating rounds, so that noise affects both engines equally."""
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
