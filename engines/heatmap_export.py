"""Export of Grad-CAM as a separate graph, so that heatmaps can be computed without torch."""

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
    """Export the step from the graph's features to heatmaps, with batch size 1.

    Args:
        model: model in evaluation mode, on the CPU.
        folder: folder of the graph, to which `heatmap.onnx` is written.

    Returns:
        Entry for `bundle.json`. If there are no heatmaps, `file` is None and `note` gives the reason.
    """
    shape = feature_shape(model)
    if shape is None:
        return {"file": None, "note": "the network has no final feature maps [N, C, h, w] that it pools"}
    network: Any = copy.deepcopy(model.network).eval().requires_grad_(False)
    example = torch.rand(1, *shape)
    # Trace the gradient into plain operators because the exporter cannot differentiate.
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
