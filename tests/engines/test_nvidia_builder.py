"""NVIDIA's own ONNX parser and builder, from TensorRT for RTX, on our graphs: building needs no GPU."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from fastfundus.config import ModelConfig
from fastfundus.engines.export import INPUT, ScreeningModel, export_onnx
from fastfundus.engines.tensorrt_build import message_logger, read_graph, serialize
from fastfundus.engines.tensorrt_rtx_backend import set_targets
from fastfundus.models.classifier import create_model
from fastfundus.models.guard import Guard, GuardModel
from fastfundus.spec import PreprocessSpec

# The bindings work without the package around them, which is a source distribution.
trt: Any = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="NVIDIA's builder is not installed: pip install -e '.[dev]' on Linux x86-64"
)
SIZE = 64
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


@pytest.fixture(scope="module")
def logger() -> Any:
    """One for all: NVIDIA's library takes one logger a process and warns about others."""
    return message_logger(trt)


def model_of(backbone: str, *, guard: bool = False) -> ScreeningModel:
    torch.manual_seed(0)
    network, _ = create_model(ModelConfig(backbone=backbone, init="scratch"), 2, size=SIZE)
    # The head starts from zeros: every photo would have the same answer.
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == 2:
            nn.init.normal_(module.weight)
    distance = None
    if guard:
        features = network.num_features
        flat = GuardModel(np.zeros(features, np.float32), np.eye(4, features, dtype=np.float32), np.ones(5, np.float32))
        distance = Guard(flat, 1.0)
    return ScreeningModel(network.eval(), PreprocessSpec(size=SIZE), [1.0, 1.0], "sigmoid", 1, distance).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that exports a graph, once for all tests because that takes seconds."""
    folder = tmp_path_factory.mktemp("graphs")

    def export(backbone: str, precision: str) -> Path:
        graph = folder / f"{backbone}_{precision}.onnx"
        if not graph.exists():
            export_onnx(model_of(backbone), graph, ["abnormal", "dr"], precision=precision)
        return graph

    return export


def parsed(graph: Path, logger: Any) -> tuple[Any, Any, Any]:
    """Return the builder, the strongly typed network and the configuration that `build-engine` makes of a graph."""
    return read_graph(trt, graph.read_bytes(), INPUT, (32,), logger, exact=False)


def built(builder: Any, network: Any, config: Any, logger: Any) -> bytes:
    """Build an engine of batches from 1 to 32 for one kind of GPU."""
    set_targets(trt, config, ["sm89"])
    return serialize(trt, builder, network, config, logger, lambda phase, step, steps: None)


_USUAL = {("test_vit", "bf16")}
_ALL = [
    (backbone, precision)
    for backbone in ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "test_vit")
    for precision in TYPES
]


@pytest.mark.parametrize(
    ("backbone", "precision"),
    [pytest.param(*pair, marks=[] if pair in _USUAL else pytest.mark.long) for pair in _ALL],
)
def test_graphs_are_parsed_and_built(
    exported: Callable[[str, str], Path], logger: Any, backbone: str, precision: str
) -> None:
    graph = exported(backbone, precision)
    builder, network, config = parsed(graph, logger)
    kinds = Counter(
        network.get_layer(layer).get_output(0).dtype.name
        for layer in range(network.num_layers)
        if network.get_layer(layer).type.name == "CONVOLUTION"
    )
    assert set(kinds) == {TYPES[precision]}
    assert len(built(builder, network, config, logger)) > 50_000


@pytest.mark.long
def test_the_guard_is_built(tmp_path: Path, logger: Any) -> None:
    graph = tmp_path / "model.onnx"
    export_onnx(model_of("resnet18", guard=True), graph, ["abnormal", "dr"], precision="bf16")
    builder, network, config = parsed(graph, logger)
    assert tuple(network.get_output(0).shape)[1:] == (3,)
    built(builder, network, config, logger)


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("mobilenetv3_small_050", marks=pytest.mark.long)])
def test_bf16_graphs_compute_what_the_model_does(exported: Callable[[str, str], Path], backbone: str) -> None:
    """Constants are folded and hard activations spelled out; nothing else may change."""
    graph, model = exported(backbone, "bf16"), model_of(backbone)
    operations = Counter(node.op_type for node in onnx.load(graph).graph.node)
    assert not operations.keys() & {"HardSwish", "HardSigmoid"}
    assert operations["Conv"] > 0
    photos = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    (got,) = ReferenceEvaluator(str(graph)).run(None, {INPUT: photos})
    with torch.no_grad():
        expected = model(torch.from_numpy(photos)).numpy()
    assert expected.std() > 0.005
    # Weights and activations are rounded to 8 bits of mantissa, 2^-9 each, through some fifty layers.
    np.testing.assert_allclose(got, expected, atol=0.02)


def test_the_builder_is_a_real_one() -> None:
    assert importlib.import_module("tensorrt_rtx_bindings").__version__.split(".")[0] == "1"
