"""Export of a bundle as a model repository for NVIDIA Triton Inference Server.

<name>/            the ensemble of both steps: takes an image file, returns probabilities named by label
<name>_prepare/    preprocessing in the Python backend: `triton_step`, the code of `fastfundus screen`
<name>_engine/     the engine, in a native backend of the server or in the Python backend (`triton_engine_step`), with
                   dynamic batching and warm-up
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

__all__ = ["ENGINES", "PICTURES", "export_repository"]

PICTURES = ("uint8", "bytes")
"""Types of the input: the bytes of one file as a vector, as the server's DALI backend takes them; or as strings."""
ENGINES = ("auto", "native", "python")
"""Backends of the server for the engine's step."""
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

    @property
    def in_python(self) -> bool:
        """True if the whole bundle is loaded by this library."""
        return self.backend == "python"


def export_repository(
    bundle: Bundle, output: Path, *, name: str = "fundus", pictures: str = "uint8", engine: str = "auto"
) -> tuple[Path, ...]:
    """Write the three models of a bundle to a model repository.

    Args:
        bundle: a bundle for any backend.
        output: the model repository; may contain other models.
        name: name of the ensemble.
        pictures: type of the ensemble's input `picture`: "uint8" for uint8 [1, L], the bytes of one file; "bytes" for
            BYTES [N, 1], which needs a server whose Python backend was built for the same major version of NumPy.
        engine: backend of the engine's step: "native" for the server's own one for OpenVINO, ONNX Runtime or TensorRT;
            "python" for this library in the server's Python backend; "auto" for the native one where there is one.

    Returns:
        The folders of the models, the ensemble first.

    Raises:
        BundleError: the server has no native backend for the bundle, and one is asked for.
        ConfigError: the name is not a valid model name, a model of this name already exists, or another argument has a
            value that is not allowed.
    """
    for value, allowed, what in ((pictures, PICTURES, "pictures"), (engine, ENGINES, "engine")):
        if value not in allowed:
            raise ConfigError(f"{what} is {value!r}; allowed are {', '.join(allowed)}")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"name {name!r} is not a valid model name; use letters, digits, '_', '-' and '.'")
    serving = _serving(bundle, engine)
    folders = tuple(output / part for part in (name, f"{name}_prepare", f"{name}_engine"))
    for folder in folders:
        if folder.exists():
            raise ConfigError(f"{folder} already exists; choose another --name, or remove it")
    partial = [folder.with_name(f".{folder.name}.partial") for folder in folders]
    try:
        for folder in partial:
            (folder / "1").mkdir(parents=True)
        _write_ensemble(partial[0], name, bundle, serving, pictures)
        _write_prepare(partial[1], f"{name}_prepare", bundle, pictures)
        _write_engine(partial[2], f"{name}_engine", bundle, serving)
        # Rename the ensemble last, so that a server polling the repository finds its steps.
        for written, folder in reversed(list(zip(partial, folders, strict=True))):
            written.rename(folder)
    finally:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
    return folders


def _serving(bundle: Bundle, engine: str) -> _Serving:
    """Return how the server runs a bundle.

    Raises:
        BundleError: a native backend is asked for, and the server has none for the bundle.
    """
    native = _native(bundle) if engine != "python" else None
    if native is not None:
        return native
    if engine == "native":
        raise BundleError(
            f"{bundle.path}: Triton Inference Server has native backends for openvino, onnxruntime and tensorrt, this "
            f"is {bundle.backend}; use --engine python, or build the bundle with one of these"
        )
    kind = "KIND_GPU" if bundle.backend in ("tensorrt", "tensorrt-rtx") else "KIND_CPU"
    parameters = {"bundle_fingerprint": bundle.fingerprint}
    if bundle.has_native_code:
        # Whoever exports it could have loaded it here.
        parameters["allow_native_code"] = "true"
    return _Serving("python", {}, kind, (1, 8, _MAX_AT_ONCE), parameters)


def _native(bundle: Bundle) -> _Serving | None:
    """Return how a native backend of the server runs a bundle; None if it has no such backend."""
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
    # Weights that are inserted when the engine is loaded are inserted by this library only.
    if bundle.backend == "tensorrt" and bundle.metadata["weights"] is None:
        batches = tuple(bundle.metadata["batches"])
        return _Serving("tensorrt", {bundle.metadata["engine"]: "model.plan"}, "KIND_GPU", batches, {})
    return None


def _write_prepare(folder: Path, name: str, bundle: Bundle, pictures: str) -> None:
    shutil.copy(Path(__file__).with_name("triton_step.py"), folder / "1" / "model.py")
    (folder / "1" / "spec.json").write_text(json.dumps(bundle.metadata["spec"], indent=1) + "\n")
    _write(
        folder,
        {
            "name": name,
            "backend": "python",
            "max_batch_size": _MAX_AT_ONCE,
            "input": [_picture(pictures)],
            "output": [_photos(bundle)],
            # Decoding holds no lock and keeps one core busy per instance; small servers have four.
            "instance_group": [{"count": 4, "kind": _Word("KIND_CPU")}],
            "parameters": _parameters({"spec_fingerprint": bundle.spec.fingerprint}),
        },
    )


def _write_engine(folder: Path, name: str, bundle: Bundle, serving: _Serving) -> None:
    for source, target in serving.files.items():
        shutil.copy(bundle.folder / source, folder / "1" / target)
    if serving.in_python:
        shutil.copy(Path(__file__).with_name("triton_engine_step.py"), folder / "1" / "model.py")
        shutil.copytree(bundle.folder, folder / "1" / "bundle")
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


def _write_ensemble(folder: Path, name: str, bundle: Bundle, serving: _Serving, pictures: str) -> None:
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
            "input": [_picture(pictures)],
            "output": [_probabilities(bundle) | {"label_filename": "labels.txt"}],
            "ensemble_scheduling": {"step": steps},
            "parameters": _parameters(metadata),
        },
    )


def _picture(pictures: str) -> dict[str, Any]:
    kind, length = ("TYPE_STRING", 1) if pictures == "bytes" else ("TYPE_UINT8", -1)
    return {"name": "picture", **_typed(kind, [length])}


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
