"""Grad-CAM as a graph of its own, so that what runs engines needs no torch to say where they look."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastfundus.engines.export import ScreeningModel, feature_shape, to_onnx
from fastfundus.engines.heatmap import HEATMAP, METHOD
from fastfundus.engines.runtime import FEATURES
from fastfundus.models.cam import grad_cam

__all__ = ["export_heatmap"]


def export_heatmap(model: ScreeningModel, folder: Path) -> dict[str, Any]:
    """Write the step from the graph's features to heatmaps, batch 1.

    Args:
        model: in evaluation mode, on the CPU.
        folder: where `heatmap.onnx` goes, beside the graph.

    Returns:
        What `bundle.json` says of it: `file`, None where there is none, and then why, in `note`.
    """
    shape = feature_shape(model)
    if shape is None:
        return {"file": None, "note": "the network has no last feature maps [N, C, h, w] that are pooled"}
    network: Any = copy.deepcopy(model.network).eval().requires_grad_(False)
    example = torch.rand(1, *shape)
    # The gradient as plain operators: the exporter knows no derivatives.
    plain = dict(cast(Any, torch.export.default_decompositions()).items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = make_fx(lambda maps: grad_cam(maps, network.forward_head), decomposition_table=plain)(example)
    try:
        graph = to_onnx(traced, example, FEATURES, ["heat"])
    except torch.onnx.OnnxExporterError:
        return {"file": None, "note": "torch cannot export the gradient of the network's head"}
    onnx.save_model(graph, str(folder / HEATMAP))
    return {"file": HEATMAP, "note": None, "method": METHOD, "features": list(shape)}
