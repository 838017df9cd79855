"""A trained run as ONNX: uint8 NHWC in, calibrated probabilities out, so that no caller can normalise wrongly."""

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
"""Largest difference of a probability between the float32 graph and torch: the order of sums differs, no more."""
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ScreeningModel(nn.Module):
    """A network between its preprocessing and calibration.

    Photos uint8 [N, S, S, 3] to probabilities float32 [N, L], or [N, L, S, S] of one that maps.

    Args:
        network: from normalised [N, 3, S, S] to logits [N, L] or [N, L, S, S].
        spec: of its photos.
        temperatures: by output, what logits are divided by.
        activation: what makes probabilities of logits.
        stride: of a network that maps: sides of its inputs must be multiples of it; black is added at the right and
            below, and cut off again. 1 adds nothing.
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
    ) -> None:
        super().__init__()
        self.activation, self.size, self.added = activation, spec.size, -spec.size % stride
        self.dtype = torch.float32
        self.network = network
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)
        self.register_buffer("temperature", torch.tensor(temperatures))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let the network compute in a type; normalisation and probabilities stay float32."""
        self.network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, photos: Tensor) -> Tensor:
        """Normalise, run the network, calibrate."""
        return self.calibrate(self.network(self.normalise(photos)))

    def normalise(self, photos: Tensor) -> Tensor:
        """Photos to what the network takes: [N, 3, S, S] in its type."""
        if self.added:
            photos = nn.functional.pad(photos, (0, 0, 0, self.added, 0, self.added))
        inputs = (photos.float() * self.scale + self.offset).permute(0, 3, 1, 2)
        return inputs.to(self.dtype)

    def calibrate(self, logits: Tensor) -> Tensor:
        """What the network gives to probabilities."""
        logits = logits.float()
        if self.added:
            logits = logits[:, :, : self.size, : self.size]
        temperature = self.temperature.reshape(-1, *[1] * (logits.ndim - 2))
        return activate(logits / temperature, self.activation)


def feature_shape(model: ScreeningModel) -> tuple[int, int, int] | None:
    """Channels, height and width of the last maps before the network pools them; None where there are none.

    Networks that map, and those whose last features are tokens (vision transformers) or lie channels last, have none.
    """
    network = model.network
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        return None
    with torch.no_grad():
        features = network.forward_features(model.normalise(torch.zeros(1, model.size, model.size, 3)))  # type: ignore[operator]
    shape = tuple(features.shape)
    return shape[1:] if len(shape) == 4 and shape[1] == getattr(network, "num_features", None) else None


class FeatureTap(nn.Module):
    """A model that also gives its last features."""

    def __init__(self, model: ScreeningModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, and features [N, C, h, w]."""
        network: Any = self.model.network
        features = network.forward_features(self.model.normalise(photos))
        return self.model.calibrate(network.forward_head(features)), features


def to_onnx(module: nn.Module, example: Tensor, given: str, gives: list[str], **options: Any) -> onnx.ModelProto:
    """Translate a module of one input.

    Args:
        module: in evaluation mode.
        example: an input.
        given: name of the input.
        gives: names of the outputs.
        options: further ones of `torch.onnx.export`.

    Raises:
        torch.onnx.OnnxExporterError: it cannot be translated.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter prints its progress and warns about its own use of torch's older tree utilities.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            # The first whose convolutions know bfloat16.
            opset_version=22,
            input_names=[given],
            output_names=gives,
            external_data=False,
            verbose=False,
            **options,
        )
    return cast(torch.onnx.ONNXProgram, program).model_proto


def export_onnx(model: ScreeningModel, path: Path, labels: list[str], *, precision: str = "fp32") -> None:
    """Write the graph with a dynamic batch, the names of its outputs as metadata, and check it.

    Args:
        model: in evaluation mode, on the CPU; left as it is.
        path: the file to write.
        labels: names of the outputs, in order; stored as a JSON list under `labels`.
        precision: "fp32", "fp16" or "bf16", what the network computes in: the types of the graph say so, as strongly
            typed builders want it.
    """
    if precision != "fp32":
        model = copy.deepcopy(model)
        model.compute_in(_TYPES[precision])
    # Two photos: the exporter would take a batch of one for a constant.
    example = torch.zeros(2, model.size, model.size, 3, dtype=torch.uint8)
    named = FeatureTap(model.eval()) if feature_shape(model) else model.eval()
    graph = to_onnx(
        named,
        example,
        INPUT,
        [OUTPUT] if named is model else [OUTPUT, FEATURES],
        # Its optimiser folds normalisation into bfloat16 convolutions as float32; builders fold on their own.
        optimize=precision != "bf16",
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    # The features keep their name inside the graph, where heatmaps find them; its users see one output.
    del graph.graph.output[1:]
    onnx.helper.set_model_props(graph, {"labels": json.dumps(labels)})
    onnx.save_model(graph, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def check_graph(path: Path, photos: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """Run the float32 graph in ONNX Runtime and compare; whatever engine is built, the bundle's graph then holds too.

    Args:
        path: the graph.
        photos: uint8 [N, S, S, 3].
        expected: what the model gives.

    Returns:
        Largest difference of a probability.

    Raises:
        GateRefused: it is above `GRAPH_TOLERANCE`.
        MissingDependency: onnxruntime is not installed.
    """
    require("onnxruntime", extra="train")
    from fastfundus.engines.onnxruntime_backend import OnnxRuntimeEngine

    with OnnxRuntimeEngine(path, photos.shape[1]) as engine:
        got = np.concatenate([engine.infer(photos[row : row + 1]) for row in range(len(photos))])
    largest = float(np.abs(got.astype(np.float64) - expected).max())
    if largest > GRAPH_TOLERANCE:
        raise GateRefused(
            f"the exported graph differs from the model by {largest:.2e} in ONNX Runtime, at most {GRAPH_TOLERANCE:g} "
            "is allowed: torch's exporter translated this network wrongly; try another torch, or another backbone"
        )
    return largest
