"""Export of a bundle as a model repository for NVIDIA Triton Inference Server.

<name>/            the ensemble of both steps: takes image files as bytes, returns probabilities named by label
<name>_prepare/    preprocessing in the Python backend: `triton_step`, the code of `fastfundus screen`
<name>_engine/     the engine in a native backend of the server, with dynamic batching and warm-up
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import GRAPH, INPUT, OUTPUT
from fastfundus.errors import BundleError, ConfigError

__all__ = ["export_repository"]

_MAX_AT_ONCE = 64
_DELAY_US = 2000
"""Maximum batching delay in microseconds; shorter than the preparation of a photo."""


@dataclass(frozen=True, slots=True)
class _Serving:
    """Settings with which the server runs a bundle."""

    backend: str
    files: dict[str, str]
    """Names of the files in the repository, by their names in the bundle."""
    kind: str
    batches: tuple[int, ...]
    parameters: dict[str, str]


def export_repository(bundle: Bundle, output: Path, *, name: str = "fundus") -> tuple[Path, ...]:
    """Write the three models of a bundle to a model repository.

    Args:
        bundle: a bundle for openvino, onnxruntime or tensorrt.
        output: the model repository; may contain other models.
        name: name of the ensemble.

    Returns:
        The folders of the models, the ensemble first.

    Raises:
        BundleError: the server has no backend for the bundle.
        ConfigError: the name is not a valid model name, or a model of this name already exists.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"name {name!r} is not a valid model name; use letters, digits, '_', '-' and '.'")
    serving = _serving(bundle)
    folders = tuple(output / part for part in (name, f"{name}_prepare", f"{name}_engine"))
    for folder in folders:
        if folder.exists():
            raise ConfigError(f"{folder} already exists; choose another --name, or remove it")
    ensemble, prepare, engine = (folder.with_name(f".{folder.name}.partial") for folder in folders)
    try:
        for folder in (ensemble, prepare, engine):
            (folder / "1").mkdir(parents=True)
        _write_prepare(prepare, f"{name}_prepare", bundle)
        _write_engine(engine, f"{name}_engine", bundle, serving)
        _write_ensemble(ensemble, name, bundle, serving)
        # Rename the ensemble last, so that a server polling the repository finds its steps.
        for partial, folder in reversed(list(zip((ensemble, prepare, engine), folders, strict=True))):
            partial.rename(folder)
    finally:
        for folder in (ensemble, prepare, engine):
            shutil.rmtree(folder, ignore_errors=True)
    return folders


def _serving(bundle: Bundle) -> _Serving:
    graph = _Serving("onnxruntime", {GRAPH: "model.onnx"}, "KIND_CPU", (1, 8, _MAX_AT_ONCE), {})
    if bundle.backend == "onnxruntime":
        return graph
    if bundle.backend == "openvino":
        if bundle.precision == "fp32":
            # The server's OpenVINO may round to bfloat16 and has no setting to prevent it; the graph is the same model.
            return graph
        parameters = {"PERFORMANCE_HINT": "THROUGHPUT"} | ({"HINT_BF16": "YES"} if bundle.precision == "bf16" else {})
        files = {"engine.xml": "model.xml", "engine.bin": "model.bin"}
        return _Serving("openvino", files, "KIND_CPU", (1, 8, _MAX_AT_ONCE), parameters)
    if bundle.backend == "tensorrt":
        if bundle.metadata["weights"] is not None:
            raise BundleError(
                f"{bundle.path}: its weights are inserted when it is loaded, which the server does not do; build it "
                "without --weightless"
            )
        batches = tuple(bundle.metadata["batches"])
        return _Serving("tensorrt", {bundle.metadata["engine"]: "model.plan"}, "KIND_GPU", batches, {})
    raise BundleError(
        f"{bundle.path}: Triton Inference Server runs openvino, onnxruntime and tensorrt, this is {bundle.backend}; "
        "build the bundle with one of these"
    )


def _write_prepare(folder: Path, name: str, bundle: Bundle) -> None:
    shutil.copy(Path(__file__).with_name("triton_step.py"), folder / "1" / "model.py")
    (folder / "1" / "spec.json").write_text(json.dumps(bundle.metadata["spec"], indent=1) + "\n")
    _write(
        folder,
        {
            "name": name,
            "backend": "python",
            "max_batch_size": _MAX_AT_ONCE,
            "input": [{"name": "picture", "data_type": _Word("TYPE_STRING"), "dims": [1]}],
            "output": [_photos(bundle)],
            # Decoding holds no lock and keeps one core busy per instance; small servers have four.
            "instance_group": [{"count": 4, "kind": _Word("KIND_CPU")}],
            "parameters": _parameters({"spec_fingerprint": bundle.spec.fingerprint}),
        },
    )


def _write_engine(folder: Path, name: str, bundle: Bundle, serving: _Serving) -> None:
    for source, target in serving.files.items():
        shutil.copy(bundle.folder / source, folder / "1" / target)
    max_batch = serving.batches[-1]
    warm = {
        "inputs": [
            {"key": INPUT, "value": {**_typed("TYPE_UINT8", _photo_dims(bundle)), "random_data": True}}
        ],
    }  # fmt: skip
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in bundle.labels))
    _write(
        folder,
        {
            "name": name,
            "backend": serving.backend,
            "max_batch_size": max_batch,
            "input": [_photos(bundle)],
            "output": [_probabilities(bundle) | {"label_filename": "labels.txt"}],
            "instance_group": [{"count": 1, "kind": _Word(serving.kind)}],
            "dynamic_batching": {
                "preferred_batch_size": [batch for batch in serving.batches if batch > 1],
                "max_queue_delay_microseconds": _DELAY_US,
            },
            "model_warmup": [{"name": f"batch of {count}"} | warm | {"batch_size": count} for count in {1, max_batch}],
            "parameters": _parameters(serving.parameters),
        },
    )


def _write_ensemble(folder: Path, name: str, bundle: Bundle, serving: _Serving) -> None:
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in bundle.labels))
    # The server needs a version folder, and version control does not keep empty ones.
    (folder / "1" / "README").write_text("An ensemble has no model files.\n")
    steps = [
        {
            "model_name": f"{name}_prepare",
            "model_version": -1,
            "input_map": [{"key": "picture", "value": "picture"}],
            "output_map": [{"key": INPUT, "value": "prepared"}],
        },
        {
            "model_name": f"{name}_engine",
            "model_version": -1,
            "input_map": [{"key": INPUT, "value": "prepared"}],
            "output_map": [{"key": OUTPUT, "value": OUTPUT}],
        },
    ]
    metadata = {
        "bundle_fingerprint": bundle.fingerprint,
        "thresholds": json.dumps(dict(zip(bundle.labels, bundle.thresholds, strict=True))),
        "findings": json.dumps(bundle.findings),
    }
    _write(
        folder,
        {
            "name": name,
            "platform": "ensemble",
            "max_batch_size": min(_MAX_AT_ONCE, serving.batches[-1]),
            "input": [{"name": "picture", "data_type": _Word("TYPE_STRING"), "dims": [1]}],
            "output": [_probabilities(bundle) | {"label_filename": "labels.txt"}],
            "ensemble_scheduling": {"step": steps},
            "parameters": _parameters(metadata),
        },
    )


def _photo_dims(bundle: Bundle) -> list[int]:
    return [bundle.spec.size, bundle.spec.size, 3]


def _typed(kind: str, dims: list[int]) -> dict[str, Any]:
    return {"data_type": _Word(kind), "dims": dims}


def _photos(bundle: Bundle) -> dict[str, Any]:
    return {"name": INPUT, **_typed("TYPE_UINT8", _photo_dims(bundle))}


def _probabilities(bundle: Bundle) -> dict[str, Any]:
    side = [bundle.spec.size] * 2 if bundle.metadata["output"] == "maps" else []
    return {"name": OUTPUT, **_typed("TYPE_FP32", [len(bundle.labels) + bundle.guarded, *side])}


def _parameters(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


class _Word(str):
    """An identifier of the schema, written without quotes."""


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.pbtxt").write_text("".join(f"{line}\n" for line in _lines(config)))


def _lines(config: dict[str, Any]) -> list[str]:
    """Return the lines of a configuration in the Protocol Buffers text format."""
    lines = []
    for key, value in config.items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                lines += [f"{key} {{", *(f"  {line}" for line in _lines(entry)), "}"]
            elif isinstance(entry, bool):
                lines.append(f"{key}: {'true' if entry else 'false'}")
            elif isinstance(entry, str) and not isinstance(entry, _Word):
                # The text format accepts all JSON escapes.
                lines.append(f"{key}: {json.dumps(entry)}")
            else:
                lines.append(f"{key}: {entry}")
    return lines
