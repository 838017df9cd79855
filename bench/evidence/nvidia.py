"""What NVIDIA's parser and builder make of our graphs, per network and precision: the builder of TensorRT for RTX.

    python -m bench.evidence.nvidia [--output bench/results/nvidia_cpu_YYYYMM.json]        `make nvidia`

Building needs no GPU. Weights are random; the graphs are those of `build-engine`, with the guard's column for
classifiers, built for one kind of GPU (sm89) and batches of 1 to 32. Each graph is built in a process of its own, and
those that the parser refuses are named with its message.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from bench import RESULTS
from bench.harness.machine import environment

NETWORKS = {
    "resnet18": 96, "resnet50": 96, "convnext_tiny": 96, "tf_efficientnet_lite0": 96, "vit_small_patch16_224": 224,
    "vessel U-Net, resnet18": 96,
}  # fmt: skip
"""Side of the photos in pixels, by network."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGET, LARGEST_BATCH = "sm89", 32
_COMPUTING = ("CONVOLUTION", "MATRIX_MULTIPLY", "DECONVOLUTION")


def export(name: str, size: int, precision: str, folder: Path) -> Path:
    """Export the graph of a network with random weights, as `build-engine` does."""
    import torch

    from fastfundus.config import ModelConfig
    from fastfundus.engines.export import ScreeningModel, export_onnx
    from fastfundus.engines.quantize import quantize_graph
    from fastfundus.models.classifier import create_model
    from fastfundus.models.guard import Guard, GuardModel
    from fastfundus.models.segmenter import STRIDE_PX, create_segmenter
    from fastfundus.spec import PreprocessSpec

    torch.manual_seed(0)
    spec, backbone = PreprocessSpec(size=size), name.split(", ")[-1]
    config = ModelConfig(backbone=backbone, init="scratch", local_contrast=name == backbone)
    if name == backbone:
        network, _ = create_model(config, 2, size=size)
        features: int = network.num_features  # type: ignore[assignment]
        flat = GuardModel(np.zeros(features, np.float32), np.eye(4, features, dtype=np.float32), np.ones(5, np.float32))
        model = ScreeningModel(network.eval(), spec, [1.0, 1.0], "sigmoid", 1, Guard(flat, 1.0))
    else:
        network, _ = create_segmenter(config, 1)
        model = ScreeningModel(network.eval(), spec, [1.0], "sigmoid", STRIDE_PX)
    kind = precision if precision in ("fp16", "bf16") else "fp32"
    graph = folder / "model.onnx"
    export_onnx(model.eval(), graph, ["abnormal", "dr"], precision=kind)
    if precision in ("int8", "fp8"):
        photos = np.random.default_rng(0).integers(0, 256, (8, size, size, 3)).astype(np.uint8)
        quantize_graph(graph, photos, folder / "quantized.onnx", precision=precision)
        return folder / "quantized.onnx"
    return graph


def build(graph: Path, precision: str) -> dict[str, Any]:
    """Parse and build a graph as `build-engine` does, and return what NVIDIA's library made of it."""
    import tensorrt_rtx_bindings as trt

    from fastfundus.engines.export import INPUT
    from fastfundus.engines.tensorrt_build import message_logger, read_graph, serialize
    from fastfundus.engines.tensorrt_rtx_backend import set_targets
    from fastfundus.errors import BundleError

    logger = message_logger(trt)
    try:
        builder, network, config = read_graph(
            trt, graph.read_bytes(), INPUT, (LARGEST_BATCH,), logger, exact=precision == "fp32"
        )
        layers = [network.get_layer(number) for number in range(network.num_layers)]
        types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.type.name in _COMPUTING)
        set_targets(trt, config, [TARGET])
        began = time.perf_counter()
        engine = serialize(trt, builder, network, config, logger, lambda phase, step, steps: None)
    except BundleError as error:
        return {"refused": str(error)}
    return {
        "layers": len(layers),
        "quantized": sum(layer.type.name == "QUANTIZE" for layer in layers),
        "computing": dict(types),
        "seconds": time.perf_counter() - began,
        "bytes": len(engine),
        "version": trt.__version__,
    }


def one(name: str, precision: str) -> dict[str, Any]:
    """Export and build one graph."""
    with tempfile.TemporaryDirectory() as folder:
        return build(export(name, NETWORKS[name], precision, Path(folder)), precision)


def main() -> None:
    """Build every graph in a process of its own, and write the results as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS / f"nvidia_cpu_{date.today():%Y%m}.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    table: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        for precision in PRECISIONS:
            command = [sys.executable, "-W", "ignore", "-m", "bench.evidence.nvidia", "--one", name, precision]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-1:]
            try:
                entry = json.loads(lines[-1])
            except ValueError:
                entry = {"refused": lines[-1] if lines else f"ended with {done.returncode}"}
            table.setdefault(name, {})[precision] = entry
            print(name, precision, entry, flush=True)
    result = {
        "what": "graphs",
        **environment(("torch", "timm", "onnx", "onnxruntime")),
        "sizes": NETWORKS,
        "graphs": table,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
