"""From a trained run to a bundle that has earned its place. Needs torch; what it writes does not."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastfundus.engines.archive import is_archive, pack
from fastfundus.engines.bundle import Bundle, write_bundle_json
from fastfundus.engines.export import ScreeningModel, export_onnx
from fastfundus.engines.heatmap_export import export_heatmap
from fastfundus.engines.parity import ParityReport
from fastfundus.engines.runtime import BACKENDS, GRAPH, processor
from fastfundus.engines.trials import EIGHT_BITS, Evidence, Trials
from fastfundus.errors import BundleError, ConfigError, GateRefused, close_matches
from fastfundus.models.flops import count_flops
from fastfundus.spec import PreprocessSpec

__all__ = ["MOST_PARITY_MAPS", "MOST_PARITY_PHOTOS", "build_bundle"]

MOST_PARITY_PHOTOS = 256
"""Held-out photos that engine and model are compared on."""
MOST_PARITY_MAPS = 16
"""The same where every photo is a quarter of a million decisions."""


def build_bundle(
    model: ScreeningModel,
    spec: PreprocessSpec,
    labels: dict[str, dict[str, Any]],
    evidence: Evidence,
    output: Path,
    *,
    provenance: dict[str, Any],
    reference: dict[str, Any] | None = None,
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
        reference: what scores and quality the photos of the run had, that drift is measured from; see `screen.drift`.
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
        if precision in EIGHT_BITS:
            raise ConfigError(
                f"precision {precision!r} needs photos to learn its ranges on, and the run's training photos are not "
                "at hand; give a cache with --calibration"
            )
        here = tuple(name for name in here if name not in EIGHT_BITS)
    _require_free(output)
    partial, refused = (output.with_name(f"{output.name}.{end}") for end in ("partial", "refused.json"))
    shutil.rmtree(partial, ignore_errors=True)
    refused.unlink(missing_ok=True)
    partial.mkdir(parents=True)
    try:
        export_onnx(model, partial / GRAPH, list(labels))
        trials = Trials(backend, module, model, spec, labels, evidence, partial, options or {})
        tried = trials.attempt(here if precision == "auto" else (precision,))
        passed = [report for report in tried if report.passed]
        if not passed:
            # Of those that were not asked for, say which would do; eight bits are never closer than more.
            others = [name for name in here if name not in {*EIGHT_BITS, *(report.precision for report in tried)}]
            tried += trials.attempt(tuple(others))
            refused.write_text(json.dumps([report.to_dict() for report in tried], indent=1) + "\n")
            raise GateRefused(_refusal(tried, refused))
        photo = torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8)
        best = max(passed, key=lambda report: (report.precision in EIGHT_BITS, report.images_per_s))
        about = trials.take(best.precision) | {
            "heatmap": export_heatmap(model, partial),
            "reference": reference,
            "parity": best.to_dict(),
            "tried": [report.to_dict() for report in tried],
            "graph_difference": trials.graph_difference,
            "gflop": count_flops(model, photo)[1] / 1e9,
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
