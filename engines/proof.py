"""Proof of engines on machines that cannot run them.

An engine for a GPU may be built where there is none. Its graph is then proven on the processor, with every tensor
rounded as on the GPU; and the bundle carries drawn photos with the model's answers, on which the engine itself is
checked when it is first loaded on a GPU. They are drawn because a bundle travels, and photos of patients must not.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.onnxruntime_backend import OnnxRuntimeEngine
from fastfundus.engines.parity import ParityReport, compare
from fastfundus.engines.runtime import Engine
from fastfundus.errors import BundleError, require
from fastfundus.files import atomic_write
from fastfundus.synthetic.draw import draw_photo
from fastfundus.synthetic.pathology import LESIONS

__all__ = ["PROOF", "RoundedEngine", "draw_photos", "prove", "rounded_graph", "write_proof"]

PROOF = "proof.npz"
"""Photos [N, S, S, 3] uint8 and the model's answers to them, float32."""
_PHOTOS = 12
_MAX_BYTES = 1 << 30
"""More than they take at 4096 px."""


def draw_photos(size: int, count: int = _PHOTOS) -> NDArray[np.uint8]:
    """Draw photos of healthy and diseased eyes, uint8 [N, S, S, 3] RGB; equal arguments give equal photos."""
    photos = np.empty((count, size, size, 3), np.uint8)
    for number in range(count):
        lesions = LESIONS[number % len(LESIONS) :][:2] if number % 2 else ()
        drawn = draw_photo(number, eye="LR"[number % 2], lesions=lesions, long_side=max(96, round(size * 1.4)))
        height, width = drawn.image.shape[:2]
        left, top = (
            int(np.clip(centre - drawn.field.radius_px, 0, whole))
            for centre, whole in ((drawn.field.x_px, width), (drawn.field.y_px, height))
        )
        side = int(2 * drawn.field.radius_px)
        cut = drawn.image[top : top + side, left : left + side]
        photos[number] = cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA)
    return photos


def write_proof(folder: Path, photos: NDArray[np.uint8], expected: NDArray[np.float32]) -> None:
    """Write the file that `prove` reads."""
    np.savez_compressed(folder / PROOF, photos=photos, expected=expected)


def prove(engine: Engine, folder: Path, precision: str, report: Path, device: str) -> ParityReport:
    """Check an engine on the photos in its bundle, once for each device.

    Args:
        engine: the engine, loaded on the device.
        folder: folder of the bundle.
        precision: precision of the engine.
        report: file that keeps the result; if it exists, nothing is computed.
        device: name of the device, for messages.

    Raises:
        BundleError: the engine's answers differ too much from the model's.
    """
    if report.is_file():
        try:
            return ParityReport(**json.loads(report.read_text()))
        except (OSError, ValueError, TypeError):
            # An older version, or damaged: check again.
            pass
    photos, expected = _read_proof(folder / PROOF)
    # Decisions of drawn eyes mean nothing: only probabilities are compared.
    nowhere = np.full(expected.shape[1], np.nan)
    got = engine.infer(photos, guard=True)
    result = compare(expected, got, nowhere, precision=precision, images_per_s=0.0, torch_images_per_s=0.0)
    if not result.passed:
        raise BundleError(
            f"{folder}: on {device}, the answers of the {precision} engine differ from the model's by up to "
            f"{result.largest_difference:.2e}, more than {result.gate_probability:g}; do not use it there: build it "
            "with --precision fp32, or run the float32 graph in the bundle: --backend openvino or onnxruntime"
        )
    # Where nothing can be kept, the engine is checked whenever it is loaded.
    with contextlib.suppress(OSError):
        report.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(report) as partial:
            partial.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def _read_proof(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise ValueError("it expands to more than any valid one")
        with np.load(file) as proof:
            photos, expected = proof["photos"], proof["expected"]
        if photos.dtype != np.uint8 or photos.ndim != 4 or expected.ndim < 2 or len(photos) != len(expected):
            raise ValueError(f"it has {photos.dtype} {photos.shape} and {expected.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{file}: cannot be read ({error}); build the engine again") from None
    return photos, expected


class RoundedEngine(OnnxRuntimeEngine):
    """Engine that runs a graph of any precision on the processor, rounded to its types; slower than float32.

    Args:
        file: path of the ONNX graph.
        size: side of the photos in pixels.
    """

    def __init__(self, file: Path, size: int) -> None:
        rounded = file.with_suffix(".rounded.onnx")
        rounded.write_bytes(rounded_graph(file.read_bytes()))
        try:
            super().__init__(rounded, size)
        finally:
            rounded.unlink()


def rounded_graph(graph: bytes) -> bytes:
    """Return a graph that computes in float32 and rounds every tensor that was bfloat16 to that type.

    This is what processors and GPUs do that compute in bfloat16: they sum in float32. ONNX Runtime has no bfloat16
    operators for processors; it converts float16 likewise by itself, so graphs without bfloat16 are returned unchanged.
    """
    onnx = require("onnx", extra="train")
    model = onnx.load_from_string(graph)
    kinds = onnx.TensorProto
    inferred = onnx.shape_inference.infer_shapes(model).graph
    short = {
        entry.name for entry in (*inferred.value_info, *inferred.output)
        if entry.type.tensor_type.elem_type == kinds.BFLOAT16
    }  # fmt: skip
    for entry in model.graph.initializer:
        if entry.data_type == kinds.BFLOAT16:
            value = onnx.numpy_helper.to_array(entry).astype(np.float32)
            entry.CopyFrom(onnx.numpy_helper.from_array(value, entry.name))
    nodes: list[Any] = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and node.op_type == "Cast" and attribute.i == kinds.BFLOAT16:
                attribute.i = kinds.FLOAT
            if attribute.name == "value" and attribute.t.data_type == kinds.BFLOAT16:
                value = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(value))
        rounding = []
        for number, name in enumerate(node.output):
            if name in short:
                node.output[number] = f"{name}_exact"
                rounding += [
                    onnx.helper.make_node("Cast", [f"{name}_exact"], [f"{name}_short"], to=kinds.BFLOAT16),
                    onnx.helper.make_node("Cast", [f"{name}_short"], [name], to=kinds.FLOAT),
                ]
        nodes += [node, *rounding]
    if not short:
        return graph
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())
