"""A trained run as ONNX: uint8 NHWC in, calibrated probabilities out, so that no caller can normalise wrongly."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import cast

import onnx
import torch
from torch import Tensor, nn

from fastfundus.models.activation import Activation, activate
from fastfundus.spec import PreprocessSpec

__all__ = ["INPUT", "OUTPUT", "ScreeningModel", "export_onnx"]

INPUT, OUTPUT = "photos", "probabilities"
"""Names of the graph's input and output."""


class ScreeningModel(nn.Module):
    """A classifier between its preprocessing and calibration: photos uint8 [N, S, S, 3] to probabilities [N, L]."""

    scale: Tensor
    offset: Tensor
    temperature: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        spec: PreprocessSpec,
        temperatures: list[float],
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dtype = torch.float32
        self.classifier = classifier
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)
        self.register_buffer("temperature", torch.tensor(temperatures))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let the classifier compute in a type; normalisation and probabilities stay float32."""
        self.classifier.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, photos: Tensor) -> Tensor:
        """Normalise, classify, calibrate."""
        inputs = (photos.float() * self.scale + self.offset).permute(0, 3, 1, 2)
        logits = self.classifier(inputs.to(self.dtype)).float()
        return activate(logits / self.temperature, self.activation)


def export_onnx(model: ScreeningModel, size: int, path: Path) -> None:
    """Write the graph with a dynamic batch, and check it.

    Args:
        model: in evaluation mode, on the CPU.
        size: S, the side of the photos in pixels.
        path: the file to write.
    """
    # Two photos: the exporter would take a batch of one for a constant.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter prints its progress and warns about its own use of torch's older tree utilities.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    cast(torch.onnx.ONNXProgram, program).save(str(path), external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
