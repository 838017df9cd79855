"""Build a bundle from a trained run and verify it against the model.

Building needs torch; running the bundle does not, except with the `aoti` backend.
"""

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
from fastfundus.engines.runtime import BACKENDS, GRAPH, backend_module, processor
from fastfundus.engines.select_precision import EIGHT_BITS, ParityData, PrecisionSearch
from fastfundus.engines.trust import note_built_here
from fastfundus.errors import BundleError, ConfigError, GateRefused, close_matches
from fastfundus.files import refuse_mount_point, sync, sync_folder
from fastfundus.models.flops import count_flops
from fastfundus.spec import PreprocessSpec

__all__ = ["MAX_PARITY_MAPS", "MAX_PARITY_PHOTOS", "build_bundle"]

MAX_PARITY_PHOTOS = 256
"""Maximum number of held-out photos on which engine and model are compared."""
MAX_PARITY_MAPS = 16
"""Maximum number for models that output maps, where each photo contributes a quarter of a million decisions."""


def build_bundle(
    model: ScreeningModel,
    spec: PreprocessSpec,
    labels: dict[str, dict[str, Any]],
    data: ParityData,
    output: Path,
    *,
    provenance: dict[str, Any],
    reference: dict[str, Any] | None = None,
    backend: str = "openvino",
    precision: str = "auto",
    options: dict[str, Any] | None = None,
) -> tuple[Bundle, ParityReport]:
    """Export the model, build an engine, verify it against the model and write the bundle.

    Args:
        model: model in evaluation mode, on the CPU.
        spec: preprocessing of its photos.
        labels: metadata of each output by name, in order: `temperature`, `threshold`, `finding` (whether it makes a
            photo positive), and anything else to store.
        data: photos for the parity check and for calibration.
        output: path of the bundle: a folder, or a single file if the name ends in ".zip". It must not exist, or must
            be a bundle, which is replaced once the new one passes.
        provenance: source run and configuration; stored unchanged.
        reference: distributions of scores and quality over the run's photos, the baseline for drift; see
            `screening.drift`.
        backend: one of `BACKENDS`.
        precision: one of the backend's precisions, or "auto" to build and benchmark every precision that this machine
            computes in and keep the fastest one that passes.
        options: backend options by name.

    Returns:
        The bundle and its parity report.

    Raises:
        GateRefused: if the engine's outputs differ too much from the model's, or an 8-bit engine is not fast enough to
            be worthwhile. No bundle is written, and the message names the precisions that would pass.
        ConfigError: if the backend or precision is unknown, or there are no photos to calibrate an 8-bit engine with.
        BundleError: if `output` exists and is not a bundle.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} cannot be built{close_matches(backend, BACKENDS)}")
    module = backend_module(backend)
    available = _available_precisions(module.precisions(), precision, calibrated=len(data.calibration) > 0)
    _require_free(output)
    partial, refused = (output.with_name(f"{output.name}.{end}") for end in ("partial", "refused.json"))
    shutil.rmtree(partial, ignore_errors=True)
    refused.unlink(missing_ok=True)
    partial.mkdir(parents=True)
    try:
        export_onnx(model, partial / GRAPH, list(labels))
        search = PrecisionSearch(backend, module, model, spec, labels, data, partial, options or {})
        tried = search.attempt(search.worthwhile(available) if precision == "auto" else (precision,))
        passed = [report for report in tried if report.passed]
        if not passed:
            # Try the precisions that were not requested; 8-bit engines are never closer to the model than wider ones.
            others = [name for name in available if name not in {*EIGHT_BITS, *(report.precision for report in tried)}]
            tried += search.attempt(tuple(others))
            refused.write_text(json.dumps([report.to_dict() for report in tried], indent=1) + "\n")
            raise GateRefused(_refusal(tried, refused))
        photo = torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8)
        best = max(passed, key=lambda report: (report.precision in EIGHT_BITS, report.images_per_s))
        bundle_metadata = search.take(best.precision) | {
            "heatmap": export_heatmap(model, partial),
            "reference": reference,
            "parity": best.to_dict(),
            "tried": [report.to_dict() for report in tried],
            "graph_difference": search.graph_difference,
            "gflop": count_flops(model, photo)[1] / 1e9,
            "built_on": _machine(module.PACKAGE),
            "provenance": provenance,
        }
        write_bundle_json(partial, bundle_metadata)
        _publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    bundle = Bundle.open(output)
    note_built_here(bundle.fingerprint)
    return bundle, best


def _available_precisions(native: tuple[str, ...], precision: str, *, calibrated: bool) -> tuple[str, ...]:
    """Return the precisions that can be built: 8-bit ones need calibration photos.

    Raises:
        ConfigError: `precision` is not "auto" and not among them.
    """
    if precision not in ("auto", *native):
        raise ConfigError(f"precision {precision!r} cannot be built here{close_matches(precision, [*native, 'auto'])}")
    if calibrated:
        return native
    if precision in EIGHT_BITS:
        raise ConfigError(
            f"precision {precision!r} needs calibration photos, and the run's training photos are not available; "
            "give a cache with --calibration"
        )
    return tuple(name for name in native if name not in EIGHT_BITS)


def _require_free(output: Path) -> None:
    """Raise if `output` exists and is neither a bundle nor an empty folder, or cannot be replaced."""
    refuse_mount_point(output)
    if is_archive(output):
        mine = not output.exists() or output.is_file()
    else:
        mine = (
            not output.exists() or (output / "bundle.json").is_file() or (output.is_dir() and not any(output.iterdir()))
        )
    if not mine:
        raise BundleError(f"{output}: already exists and is not a bundle; choose another --output")


def _publish(folder: Path, output: Path) -> None:
    if is_archive(output):
        pack(folder, output)
        return
    sync_folder(folder)
    # The old bundle is moved aside rather than deleted first, so that a crash in between loses neither.
    before = output.with_name(f"{output.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if output.exists():
        output.rename(before)
    folder.rename(output)
    sync(output.parent)
    shutil.rmtree(before, ignore_errors=True)


def _refusal(tried: list[ParityReport], file: Path) -> str:
    """Return a message that states what failed and which other precisions pass."""
    lines = [f"the engine was refused: {tried[0]}"]
    for report in tried[1:]:
        hint = f"; build with --precision {report.precision}" if report.passed else ""
        lines.append(f"also tried: {report}{hint}")
    return "\n".join([*lines, f"all results are in {file}"])


def _machine(package: str) -> dict[str, str]:
    return {
        # Taken from the module because the distribution may have another name, such as tensorrt-cu13.
        "backend_version": importlib.import_module(package).__version__,
        "device": processor(),
        "platform": platform.platform(),
        "fastfundus": metadata.version("fastfundus"),
        "torch": metadata.version("torch"),
    }
