"""TensorRT for RTX: built by NVIDIA's own library, which needs no GPU; loaded with a test double of its API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastfundus.engines import tensorrt_rtx_backend
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.proof import PROOF, draw_photos
from fastfundus.errors import BundleError, ConfigError, MissingDependency
from fastfundus.kernels.building import cache_folder
from fastfundus.training.run import Run
from fastfundus.workflow.build_engine import build_engine
from tests.conftest import Trained
from tests.engines.test_tensorrt import World, on_double

REAL: Any = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="NVIDIA's builder is not installed: pip install -e '.[dev]' on Linux x86-64"
)
pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("exported_once")]


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("tensorrt_api.py")), REAL.__name__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    described: dict[str, Any] = json.loads(done.stdout)
    return described


class RtxWorld(World):
    """Adds what only TensorRT for RTX has: compute capabilities, validity of engines, and what it compiled."""

    def __init__(self, api: dict[str, Any], gpu: Any) -> None:
        super().__init__(api, gpu)
        trt = self.trt
        self.targets: list[str] = []
        self.invalid = 0
        self.compiled: list[bytes] = []

        def set_capability(config: Any, capability: Any, index: int) -> bool:
            assert index == len(self.targets) < config.num_compute_capabilities
            self.targets.append(capability.name.lower())
            return True

        def validity(runtime: Any, plan: bytes) -> tuple[Any, int]:
            assert gpu.current, "a context must be current"
            return (trt.EngineValidity.INVALID if self.invalid else trt.EngineValidity.VALID), self.invalid

        def new_config(engine: Any) -> Any:
            return trt.IRuntimeConfig.__new__(trt.IRuntimeConfig)

        def set_strategy(config: Any, strategy: Any) -> None:
            config._strategy = strategy

        def set_cache(config: Any, cache: Any) -> bool:
            assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config._cache = cache
            return True

        def deserialize(cache: Any, data: bytes) -> bool:
            self.compiled.append(bytes(data))
            return True

        trt.behaviour |= {
            "IBuilderConfig.set_compute_capability": set_capability,
            "Runtime.get_engine_validity": validity,
            "ICudaEngine.create_runtime_config": new_config,
            "IRuntimeConfig.set_execution_context_allocation_strategy": set_strategy,
            "IRuntimeConfig.create_runtime_cache": lambda config: trt.IRuntimeCache.__new__(trt.IRuntimeCache),
            "IRuntimeConfig.set_runtime_cache": set_cache,
            "IRuntimeCache.deserialize": deserialize,
            "IRuntimeCache.serialize": lambda cache: b"compiled",
        }


@pytest.fixture
def world(api: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RtxWorld]:
    monkeypatch.setattr(tensorrt_rtx_backend, "_loggers", {})
    yield from on_double(RtxWorld, api, tensorrt_rtx_backend.PACKAGE, monkeypatch, tmp_path)


def built(trained: Trained, output: Path, **options: Any) -> Bundle:
    bundle, report = build_engine(
        Run.open(trained.run), output, backend="tensorrt-rtx", precision="fp32", options={"batches": (8,), **options}
    )
    assert report.passed
    return bundle


def with_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(tensorrt_rtx_backend, "first_gpu", lambda extra: (name, capability))


def test_the_real_builder_needs_no_gpu(trained: Trained, tmp_path: Path) -> None:
    bundle, report = build_engine(
        Run.open(trained.run), tmp_path / "bundle", backend="tensorrt-rtx", precision="auto",
        options={"targets": ("sm89", "sm120"), "batches": (1, 8)},
    )  # fmt: skip
    # Nobody knows which is fastest there: the first that passes.
    assert [entry["precision"] for entry in bundle.metadata["tried"]] == ["fp16", "bf16", "fp32"]
    assert report.precision == next(entry["precision"] for entry in bundle.metadata["tried"] if entry["passed"])
    assert report.images_per_s == 0
    assert "not run yet" in str(report)
    known = {name: bundle.metadata[name] for name in ("not_run", "targets", "batches", "tensorrt_rtx")}
    assert known == {
        "not_run": True, "targets": ["sm89", "sm120"], "batches": [1, 8], "tensorrt_rtx": REAL.__version__
    }  # fmt: skip
    names = {path.name for path in bundle.folder.iterdir()}
    assert names == {"bundle.json", "model.onnx", "heatmap.onnx", "engine.plan", PROOF}
    plan = (bundle.folder / "engine.plan").read_bytes()
    logger = tensorrt_rtx_backend._logger(REAL)
    _, found = REAL.Runtime(logger).get_engine_validity(plan)
    malformed = int(REAL.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert not found & malformed
    assert REAL.Runtime(logger).get_engine_validity(plan[::-1])[1] & malformed
    with pytest.raises((BundleError, MissingDependency), match=r"GPU|pycuda is not installed.*fastfundus\[cuda\]"):
        bundle.load()
    # The graph of the bundle runs here all the same.
    bundle.using("onnxruntime").load().close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"targets": ("sm90",)}, r"cannot build for 'sm90'; targets are sm75, .*H100, H200 and B200"),
     ({"targets": ()}, "must be different ones of sm75, .*, got none"),
     ({"targets": ("sm89", "sm89")}, "must be different ones"),
     ({"target": ("sm89",)}, "has no option 'target'; did you mean 'targets'")],
)  # fmt: skip
def test_wrong_options(trained: Trained, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(trained, tmp_path / "bundle", **options)
    assert not any(tmp_path.iterdir())


def test_an_engine_is_proven_when_first_loaded(
    world: RtxWorld, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The GPU of the double is an H200, for which there are no such engines.
    bundle = built(trained, tmp_path / "bundle")
    assert world.targets == list(tensorrt_rtx_backend.DEFAULT_TARGETS)
    assert bundle.metadata["not_run"]
    assert not world.runs
    with_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    with bundle.load() as engine:
        photos = draw_photos(64, 3)
        with trained.bundle.using("onnxruntime").load() as other:
            np.testing.assert_allclose(engine.infer(photos), other.infer(photos), atol=1e-4)
    kept = sorted(path.name for path in (cache_folder() / "tensorrt-rtx").iterdir())
    assert [name.rpartition(".")[2] for name in kept] == ["cache", "json"]
    assert all("NVIDIA_L4" in name and bundle.fingerprint[:16] in name for name in kept)
    assert world.compiled == []
    runs = world.runs
    bundle.load().close()
    assert world.compiled == [b"compiled"], "compiled once, and read by both contexts"
    # Each of two contexts is warmed up, and nothing is proven again.
    assert world.runs == runs + 2
    with_gpu(monkeypatch, "NVIDIA A100", (8, 0))
    bundle.load().close()
    assert len(list((cache_folder() / "tensorrt-rtx").iterdir())) == 4


def test_an_engine_that_answers_wrongly_is_refused(
    world: RtxWorld, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(trained, tmp_path / "bundle")
    with_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    execute = world.trt.behaviour["IExecutionContext.execute_async_v3"]

    def wrong(context: Any, stream: int) -> bool:
        done = execute(context, stream)
        answers = world.gpu.at(context._addresses["probabilities"], 4)
        world.gpu.streams[stream].give(lambda: answers.__setitem__(slice(None), np.float32([0.99]).view(np.uint8)))
        return bool(done)

    world.trt.behaviour["IExecutionContext.execute_async_v3"] = wrong
    with pytest.raises(BundleError, match=r"on NVIDIA L4 .* differ from the model's by up to .*--backend openvino"):
        bundle.load()
    assert not world.gpu.memory, "what was allocated is free again"
    assert not list((cache_folder() / "tensorrt-rtx").glob("*.json")), "nothing vouches for it"


def test_a_proof_that_cannot_be_read_is_an_error_in_words(
    world: RtxWorld, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(trained, tmp_path / "bundle")
    with_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    file = bundle.folder / PROOF
    whole = file.read_bytes()
    np.savez(tmp_path / "other.npz", photos=np.zeros((2, 8), np.uint8), expected=np.zeros(2))
    for content in (
        b"",
        b"junk",
        whole[:-30],
        whole[:200] + bytes(50) + whole[250:],
        (tmp_path / "other.npz").read_bytes(),
    ):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=r"proof.npz: cannot be read .*; build the engine again"):
            bundle.load()
    file.write_bytes(whole)
    bundle.load().close()


def test_why_an_engine_cannot_run_is_said(
    world: RtxWorld, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(trained, tmp_path / "bundle", targets=("sm120",))
    with_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    reasons = world.trt.EngineInvalidityDiagnostics
    for reason, text in {
        reasons.UNSUPPORTED_CC: r"for sm120 by TensorRT for RTX .*: here is NVIDIA L4 .*build it with --targets",
        reasons.VERSION_MISMATCH: "install the other, or rebuild it",
        reasons.OLD_CUDA_DRIVER: "the driver of the GPU is too old; install a newer one",
        reasons.OLD_CUDA_RUNTIME: "the CUDA runtime is too old",
        reasons.INSUFFICIENT_GPU_MEMORY: "too little free memory; build with a smaller --max-batch",
        reasons.MALFORMED_ENGINE: "the engine is damaged; rebuild it",
        reasons.CUDA_ERROR: "CUDA failed on NVIDIA L4",
    }.items():
        world.invalid = int(reason)
        with pytest.raises(BundleError, match=text):
            bundle.load()
    world.invalid = 0
    bundle.load().close()


def test_a_build_on_such_a_gpu_runs_the_engine(
    world: RtxWorld, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    bundle = built(trained, tmp_path / "bundle")
    assert not bundle.metadata["not_run"]
    assert bundle.metadata["parity"]["images_per_s"] > 0
    assert world.runs > 0
    assert (bundle.folder / PROOF).is_file(), "for other GPUs"
    bundle.load().close()
