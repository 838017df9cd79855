"""ONNX export of a trained run.

The graph takes uint8 NHWC photos and returns calibrated probabilities, so callers cannot get the normalisation wrong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.engines.runtime import FEATURES, INPUT, OUTPUT
from fastfundus.errors import GateRefused, require
from fastfundus.models.activation import Activation, activate
from fastfundus.spec import PreprocessSpec

__all__ = ["GRAPH_TOLERANCE", "FeatureTap", "ScreeningModel", "check_graph", "export_onnx", "feature_shape", "to_onnx"]

GRAPH_TOLERANCE = 1e-3
"""Largest allowed difference in probability between the float32 graph and torch; only summation order differs."""
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ScreeningModel(nn.Module):
    """Network combined with its normalisation and calibration.

    Maps uint8 photos [N, S, S, 3] to float32 probabilities [N, L], or [N, L, S, S] for networks that output maps. With
    a guard, another column [N, L + 1] says how unfamiliar the photo is.

    Args:
        network: network from normalised photos [N, 3, S, S] to logits [N, L] or [N, L, S, S].
        spec: preprocessing of its photos.
        temperatures: divisor of the logits, one per output.
        activation: function that turns logits into probabilities.
        stride: for networks that output maps, the number that the sides of their input must be a multiple of. Inputs
            are padded with black at the right and bottom, and outputs are cropped back. 1 means no padding.
        guard: maps the network's penultimate features [N, F] to [N, 1], 0 to 1; if given, this is one more column.
    """

    scale: Tensor
    offset: Tensor
    temperature: Tensor

    def __init__(
        self,
        network: nn.Module,
        spec: PreprocessSpec,
        temperatures: list[float],
        activation: Activation = "sigmoid",
        stride: int = 1,
        guard: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.size, self.added = activation, spec.size, -spec.size % stride
        self.dtype = torch.float32
        self.network, self.guard = network, guard
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)
        self.register_buffer("temperature", torch.tensor(temperatures))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Set the dtype that the network computes in; normalisation and probabilities stay float32."""
        self.network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, photos: Tensor) -> Tensor:
        """Normalise the photos, run the network and calibrate its logits."""
        inputs = self.normalise(photos)
        if self.guard is None:
            return self.calibrate(self.network(inputs))
        return self.from_features(self.network.forward_features(inputs))  # type: ignore[operator]

    def answers(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the outputs for photos [N, S, S, 3] in host memory, computed in batches of 16."""
        with torch.inference_mode():
            parts = [self(torch.from_numpy(photos[start : start + 16])).numpy() for start in range(0, len(photos), 16)]
        return np.concatenate(parts)

    def from_features(self, features: Tensor) -> Tensor:
        """Return the outputs from the network's final features."""
        network: Any = self.network
        probabilities = self.calibrate(network.forward_head(features))
        if self.guard is None:
            return probabilities
        return torch.cat([probabilities, self.guard(network.forward_head(features, pre_logits=True))], dim=1)

    def normalise(self, photos: Tensor) -> Tensor:
        """Convert photos to network inputs [N, 3, S, S] in the dtype of the network."""
        if self.added:
            photos = nn.functional.pad(photos, (0, 0, 0, self.added, 0, self.added))
        inputs = (photos.float() * self.scale + self.offset).permute(0, 3, 1, 2)
        return inputs.to(self.dtype)

    def calibrate(self, logits: Tensor) -> Tensor:
        """Convert logits to calibrated probabilities."""
        logits = logits.float()
        if self.added:
            logits = logits[:, :, : self.size, : self.size]
        temperature = self.temperature.reshape(-1, *[1] * (logits.ndim - 2))
        return activate(logits / temperature, self.activation)


def feature_shape(model: ScreeningModel) -> tuple[int, int, int] | None:
    """Return channels, height and width of the final feature map before pooling, or None if there is none.

    Networks that output maps have none, nor do networks whose final features are tokens (vision transformers) or
    channels-last.
    """
    network = model.network
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        return None
    with torch.no_grad():
        features = network.forward_features(model.normalise(torch.zeros(1, model.size, model.size, 3)))  # type: ignore[operator]
    shape = tuple(features.shape)
    return shape[1:] if len(shape) == 4 and shape[1] == getattr(network, "num_features", None) else None


class FeatureTap(nn.Module):
    """Wrapper around a model that also returns its final feature maps."""

    def __init__(self, model: ScreeningModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities and the features [N, C, h, w]."""
        network: Any = self.model.network
        features = network.forward_features(self.model.normalise(photos))
        return self.model.from_features(features), features


def to_onnx(module: nn.Module, example: Tensor, given: str, gives: list[str], **options: Any) -> onnx.ModelProto:
    """Export a module with one input to ONNX.

    Args:
        module: module in evaluation mode.
        example: example input.
        given: name of the input.
        gives: names of the outputs.
        options: further options of `torch.onnx.export`.

    Raises:
        torch.onnx.OnnxExporterError: if the module cannot be exported.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter prints its progress and warns about its own use of older torch tree utilities.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            # First opset whose convolutions support bfloat16.
            opset_version=22,
            input_names=[given],
            output_names=gives,
            external_data=False,
            verbose=False,
            **options,
        )
        exported = cast(torch.onnx.ONNXProgram, program)
        if not options.get("optimize", True):
            # Parsers need constant axes and shapes: fold constants, but do not fuse operations.
            optimizer: Any = require("onnxscript.optimizer", extra="train")
            optimizer.fold_constants(exported.model)
            optimizer.remove_unused_nodes(exported.model)
    return exported.model_proto


def export_onnx(model: ScreeningModel, path: Path, labels: list[str], *, precision: str = "fp32") -> None:
    """Write a model's graph with a dynamic batch size and its output names as metadata, and validate it.

    Args:
        model: model in evaluation mode, on the CPU; it is not modified.
        path: file to write.
        labels: names of the outputs, in order; stored as a JSON list under `labels`.
        precision: "fp32", "fp16" or "bf16", the precision of the network. It is encoded in the tensor types of the
            graph, as strongly typed builders require.
    """
    if precision != "fp32":
        model = copy.deepcopy(model)
        model.compute_in(_TYPES[precision])
    # Two photos, because the exporter would treat a batch size of one as a constant.
    example = torch.zeros(2, model.size, model.size, 3, dtype=torch.uint8)
    named = FeatureTap(model.eval()) if feature_shape(model) else model.eval()
    graph = to_onnx(
        named,
        example,
        INPUT,
        [OUTPUT] if named is model else [OUTPUT, FEATURES],
        # The exporter would fold float32 normalisation into bfloat16 convolutions; builders fold it themselves.
        optimize=precision != "bf16",
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    # The features keep their name inside the graph, for heatmaps; callers see a single output.
    del graph.graph.output[1:]
    if precision == "bf16":
        _spell_out_hard_activations(graph.graph)
    onnx.helper.set_model_props(graph, {"labels": json.dumps(labels)})
    onnx.save_model(graph, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _spell_out_hard_activations(graph: onnx.GraphProto) -> None:
    """Replace HardSwish and HardSigmoid by elementary operations: TensorRT's parser knows them in other types only.

    HardSigmoid(x) = clip(x / 6 + 1/2, 0, 1), HardSwish(x) = x * HardSigmoid(x). Source: ONNX operators, opset 22.
    """
    kept = list(graph.node)
    del graph.node[:]
    for node in kept:
        if node.op_type not in ("HardSwish", "HardSigmoid"):
            graph.node.append(node)
            continue
        slope = {attribute.name: attribute.f for attribute in node.attribute}
        given, gives = node.input[0], node.output[0]
        inner = gives if node.op_type == "HardSigmoid" else f"{gives}_gate"
        values = {"slope": slope.get("alpha", 1 / 6), "shift": slope.get("beta", 0.5), "zero": 0.0, "one": 1.0}
        for name, value in values.items():
            graph.initializer.append(onnx.helper.make_tensor(f"{gives}_{name}", onnx.TensorProto.BFLOAT16, [], [value]))
        make = onnx.helper.make_node
        graph.node.append(make("Mul", [given, f"{gives}_slope"], [f"{gives}_scaled"]))
        graph.node.append(make("Add", [f"{gives}_scaled", f"{gives}_shift"], [f"{gives}_shifted"]))
        graph.node.append(make("Clip", [f"{gives}_shifted", f"{gives}_zero", f"{gives}_one"], [inner]))
        if inner != gives:
            graph.node.append(make("Mul", [given, inner], [gives]))


def check_graph(path: Path, photos: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """Run the float32 graph in ONNX Runtime and compare it with the model.

    This verifies the graph in the bundle independently of the engine that is built from it.

    Args:
        path: path of the graph.
        photos: uint8 [N, S, S, 3].
        expected: probabilities of the model.

    Returns:
        Largest difference in probability.

    Raises:
        GateRefused: if the difference is above `GRAPH_TOLERANCE`.
        MissingDependency: if onnxruntime is not installed.
    """
    require("onnxruntime", extra="train")
    from fastfundus.engines.onnxruntime_backend import OnnxRuntimeEngine

    with OnnxRuntimeEngine(path, photos.shape[1]) as engine:
        got = np.concatenate([engine.infer(photos[row : row + 1]) for row in range(len(photos))])
    largest = float(np.abs(got.astype(np.float64) - expected).max())
    if largest > GRAPH_TOLERANCE:
        raise GateRefused(
            f"the exported graph differs from the model by {largest:.2e} in ONNX Runtime (at most {GRAPH_TOLERANCE:g} "
            "is allowed): torch exported this network incorrectly; try another torch version or another backbone"
        )
    return largest
