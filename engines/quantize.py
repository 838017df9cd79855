"""Explicit 8-bit quantisation of a graph with ranges learned on calibration photos.

Needs the extra `train`, but not torch. Only the network is quantised. Normalisation before it and calibration after it
stay in floating point: they cost nothing, and a threshold on rounded probabilities would mean little.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.openvino_core import forbid_telemetry, shared_core
from fastfundus.engines.runtime import INPUT
from fastfundus.errors import require

__all__ = ["MAX_CALIBRATION_PHOTOS", "MAX_DRIFT", "quantize_graph", "quantize_openvino"]

MAX_CALIBRATION_PHOTOS = 128
"""Maximum number of calibration photos. Ranges hardly change beyond a hundred, and each photo costs a forward pass of
the float32 model."""
MAX_DRIFT = 0.04
"""Largest allowed |dp| on calibration photos. Above it, layers are restored to floating point, worst first. Unseen
photos differ by more; the parity gate allows them 0.1."""
_PROBES = 48
"""Number of photos on which drift is measured. Each restored layer costs another pass over them."""
_MAX_LAYERS_BACK = 8


def quantize_openvino(model: Any, photos: NDArray[np.uint8]) -> tuple[Any, dict[str, Any]]:
    """Quantise an OpenVINO model by NNCF with accuracy control.

    Args:
        model: OpenVINO model whose input is uint8 [N, S, S, 3].
        photos: calibration photos, uint8 [N, S, S, 3].

    Returns:
        The quantised model, and metadata as plain data: the method, the number of calibration photos, and the largest
        |dp| that remains on a subset of them.

    Raises:
        MissingDependency: if nncf is not installed.
    """
    # NNCF imports torch's extension builder, which logs verbose warnings if there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    core = shared_core()
    forbid_telemetry("nncf")
    nncf = require("nncf", extra="train")
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    chosen = photos[:MAX_CALIBRATION_PHOTOS]
    probes = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _PROBES)).astype(int)]
    reference = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = [reference(photo[None])[0] for photo in probes]
    drifts: list[float] = []

    def agreement(compiled: Any, batches: Iterator[NDArray[np.uint8]]) -> tuple[float, None]:
        # Batches are numbered because NNCF may pass only a subset of them, when it ranks layers.
        differences = [float(np.abs(compiled(batch)[0] - expected[number]).max()) for number, batch in batches]
        drifts.append(max(differences))
        return 1 - drifts[-1], None

    numbered = [(number, photo[None]) for number, photo in enumerate(probes)]
    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        # NNCF draws progress bars on stdout, which is reserved for results.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            quantized = nncf.quantize_with_accuracy_control(
                model,
                nncf.Dataset([photo[None] for photo in chosen]),
                nncf.Dataset(numbered),
                agreement,
                max_drop=MAX_DRIFT,
                drop_type=nncf.DropType.ABSOLUTE,
                subset_size=len(chosen),
                preset=nncf.QuantizationPreset.MIXED,
                # Quantising sums and products gains nothing: they are memory-bound, or fused into a convolution.
                # Quantised residual sums changed probabilities of the demo's ResNet-18 by 0.4 on average.
                ignored_scope=nncf.IgnoredScope(types=["Add", "Multiply"]),
                # NNCF's default, the mean of the per-photo maxima, clips the activations of lesions.
                advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
                ),
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                    max_num_iterations=_MAX_LAYERS_BACK, ranking_subset_size=16
                ),
            )
    finally:
        logging.getLogger("nncf").setLevel(level)
    return quantized, {"method": "NNCF", "calibration_photos": len(chosen), "largest_drift": drifts[-1]}


def quantize_graph(graph: Path, photos: NDArray[np.uint8], output: Path, *, precision: str = "int8") -> None:
    """Quantise an ONNX graph explicitly, with Q/DQ pairs around convolutions and matrix products.

    Weights are quantised per output channel and activations per tensor, both symmetrically around zero, as TensorRT
    requires.

    Args:
        graph: path of the float32 graph.
        photos: calibration photos, uint8 [N, S, S, 3].
        output: file to write.
        precision: "int8", or "fp8" (E4M3: 4 mantissa bits, maximum 448; the same ranges).

    Raises:
        MissingDependency: if onnxruntime is not installed.
    """
    require("onnxruntime", extra="train")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            self._photos = iter(photos[:MAX_CALIBRATION_PHOTOS])

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            photo = next(self._photos, None)
            return None if photo is None else {INPUT: photo[None]}

    with tempfile.TemporaryDirectory(dir=output.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(graph), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(output),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        if precision == "fp8":
            _integers_to_float8(output, ready)


def _integers_to_float8(file: Path, floats: Path) -> None:
    """Convert an int8 graph to float8 in place: same Q/DQ nodes and ranges, weights rounded from float32 again.

    ONNX Runtime's own quantiser (1.32) produces NaN weights for this type.
    """
    import ml_dtypes
    import onnx
    from onnx import numpy_helper

    kind = ml_dtypes.float8_e4m3fn
    largest = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
    model = onnx.load(file)
    weights = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(floats).graph.initializer}
    scales = {
        entry.name: numpy_helper.to_array(entry) * np.float32(127 / largest)
        for entry in model.graph.initializer
        if entry.name.endswith("_scale")
    }
    ranges = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    axes = {
        node.input[0]: next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }
    for entry in model.graph.initializer:
        if entry.name in scales:
            value = scales[entry.name]
        elif entry.name.endswith("_zero_point"):
            value = np.zeros(numpy_helper.to_array(entry).shape, kind)
        elif entry.name.endswith("_quantized"):
            exact, scale = weights[entry.name.removesuffix("_quantized")], scales[ranges[entry.name]]
            if scale.ndim:
                scale = scale.reshape([-1 if axis == axes[entry.name] else 1 for axis in range(exact.ndim)])
            value = np.clip(exact / scale, -largest, largest).astype(kind)
        else:
            continue
        entry.CopyFrom(numpy_helper.from_array(value, entry.name))
    onnx.save_model(model, str(file))
