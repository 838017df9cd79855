"""Tests of the TensorRT backend without TensorRT's library or a GPU.

Every call is checked against the vendor's bindings, and behaviour is tested on a test double. The double is created
from the bindings of TensorRT 11 and the newest 10 (see `tensorrt_api`); its engines run the graph in ONNX Runtime, in
the memory of a test double of the GPU.
"""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fastfundus.engines import cuda_graph, cuda_sample, tensorrt_backend, tensorrt_build, tensorrt_rtx_backend
from fastfundus.engines.cuda_graph import CudaGraph
from fastfundus.engines.cuda_sample import OUTPUTS, current
from fastfundus.engines.runtime import Blueprint
from fastfundus.engines.tensorrt_build import PlanOptions, build_plan, profile_ranges, timing_cache_file
from fastfundus.engines.tensorrt_runtime import TensorRtEngine
from fastfundus.errors import BundleError, ConfigError, MissingDependency
from fastfundus.kernels import reference
from fastfundus.training.run import Run
from fastfundus.workflow.build_engine import build_engine
from tests.conftest import Trained
from tests.engines.gpu_double import Gpu, GraphDriver, install
from tests.engines.tensorrt_api import Double
from tests.tolerances import ENGINE_FP32

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("exported_once")]

WHEELS = Path(sys.prefix) / "tensorrt"
VERSIONS = Path(__file__).with_name("tensorrt_versions.txt").read_text().split()
"""TensorRT versions to test, newest first: version 11 and the last version 10."""
# For tests that export models, which takes seconds; other tests make every TensorRT call with both versions.
newest = pytest.mark.parametrize("api", VERSIONS[:1], indirect=True)
SOURCES = sorted(
    set(Path(tensorrt_build.__file__).parent.glob("tensorrt_*.py")) - {Path(tensorrt_rtx_backend.__file__)}
)


@pytest.fixture(scope="module", params=VERSIONS)
def api(request: pytest.FixtureRequest) -> dict[str, Any]:
    wheel = WHEELS / request.param
    if not wheel.is_dir():
        pytest.skip(f"needs TensorRT's bindings in {wheel}; `make test` installs them")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("tensorrt_api.py")), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    metadata: dict[str, Any] = json.loads(done.stdout)
    assert metadata["version"] == request.param
    return metadata


def test_every_name_is_one_of_the_bindings(api: dict[str, Any]) -> None:
    """Check every attribute of `trt` in the sources, including lines that no test runs."""
    seen = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            if not (isinstance(node, ast.Name) and node.id == "trt" and chain) or chain[0] == "__version__":
                continue
            seen.add(".".join(chain))
            name, *rest = chain
            if name in api["enums"]:
                assert not rest or rest[0] in api["enums"][name], chain
                continue
            metadata = api["classes"][name]
            if rest:
                inner, *member = rest
                assert member[0] in metadata["inner"][inner] if member else inner in metadata["inner"], chain
    assert {"BuilderFlag.TF32", "HardwareCompatibilityLevel.AMPERE_PLUS", "Refitter"} <= seen
    text = "".join(file.read_text() for file in SOURCES)
    assert not re.search(r"BuilderFlag\.(FP16|BF16|INT8|FP8)", text), "removed in TensorRT 11"


def test_the_real_bindings_take_our_logger_and_monitor(api: dict[str, Any]) -> None:
    """Instantiate our subclasses of the vendor's classes and call them as the builder does."""
    code = """
import sys
from pathlib import Path
from tests.engines.tensorrt_api import real_module
from fastfundus.engines.tensorrt_build import _monitor, message_logger
trt = real_module(Path(sys.argv[1]))
logger = message_logger(trt)
logger.log(trt.ILogger.Severity.WARNING, "no matter")
assert logger.last() == "TensorRT gave no reason"
logger.log(trt.ILogger.Severity.ERROR, "bad\\n thing")
assert logger.last() == "bad thing"
seen = []
monitor = _monitor(trt, lambda *event: seen.append(event))
monitor.phase_start("tactics", None, 2)
assert monitor.step_complete("tactics", 0)
monitor.phase_finish("tactics")
assert seen == [("tactics", 0, 2), ("tactics", 1, 2), ("tactics", 2, 2)]
assert isinstance(monitor, trt.IProgressMonitor) and isinstance(logger, trt.ILogger)
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(WHEELS / api["version"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


Made = TypeVar("Made", bound="World")


class World:
    """Test double of TensorRT that builds and runs plans from ONNX graphs, with the GPU it runs them on."""

    def __init__(self, api: dict[str, Any], gpu: Gpu) -> None:
        self.trt, self.gpu = Double(api), gpu
        self.flags: set[str] = set()
        self.profiles: list[tuple[int, ...]] = []
        self.timings: list[bytes] = []
        self.kept = b"fresh"
        self.monitored: list[Any] = []
        self.refuse: str | None = None
        self.runs = 0
        trt = self.trt
        members = {value: name for name, value in api["enums"]["BuilderFlag"].items()}

        def create_network(builder: Any, flags: int) -> Any:
            assert flags == 1 << api["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
            return trt.INetworkDefinition.__new__(trt.INetworkDefinition)

        def new_parser(parser: Any, network: Any, logger: Any) -> None:
            parser._network, parser._logger = network, logger

        def parse(parser: Any, model: bytes) -> bool:
            if self.refuse == "parse":
                return False
            parser._network._graph = model
            return True

        def get_error(parser: Any, index: int) -> Any:
            return trt.ParserError.__new__(trt.ParserError)

        def get_input(network: Any, index: int) -> Any:
            tensor = trt.ITensor.__new__(trt.ITensor)
            entry = onnx.load_from_string(network._graph).graph.input[0].type.tensor_type
            assert entry.elem_type == onnx.TensorProto.UINT8
            tensor._shape = tuple(d.dim_value or -1 for d in entry.shape.dim)
            return tensor

        def set_shape(profile: Any, name: str, *shapes: tuple[int, ...]) -> None:
            assert name == "photos"
            assert len({shape[1:] for shape in shapes}) == 1
            profile._range = tuple(shape[0] for shape in shapes)

        def add_profile(config: Any, profile: Any) -> int:
            if self.refuse == "profile":
                return -1
            self.profiles.append(profile._range)
            return len(self.profiles) - 1

        def create_timing_cache(config: Any, data: bytes) -> Any:
            cache = trt.ITimingCache.__new__(trt.ITimingCache)
            cache._data = data
            return None if data == b"damaged" else cache

        def set_timing_cache(config: Any, cache: Any, ignore: bool) -> bool:
            assert not ignore
            self.timings.append(cache._data)
            config._cache = cache
            return bool(cache._data != b"of another device")

        def build(builder: Any, network: Any, config: Any) -> bytes | None:
            assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
            self.portable = config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
            monitor = config.progress_monitor
            monitor.phase_start("Building Engine", None, 3)
            for step in range(3):
                if not monitor.step_complete("Building Engine", step):
                    return None
            monitor.phase_finish("Building Engine")
            if self.refuse == "build":
                self.complain(builder._logger, "out of tactics")
                return None
            graph = b"" if "STRIP_PLAN" in self.flags else network._graph
            return json.dumps({"graph": graph.hex(), "profiles": self.profiles}).encode()

        def new_builder(builder: Any, logger: Any) -> None:
            builder._logger = logger

        def new_runtime(runtime: Any, logger: Any) -> None:
            runtime._logger = logger

        def deserialize(runtime: Any, data: bytes) -> Any:
            if self.refuse == "load":
                self.complain(runtime._logger, "Version tag does not match")
                return None
            plan = json.loads(data)
            if self.flags & {"VERSION_COMPATIBLE"}:
                assert runtime.engine_host_code_allowed
            engine = trt.ICudaEngine.__new__(trt.ICudaEngine)
            engine._graph, engine._profiles, engine._session = bytes.fromhex(plan["graph"]), plan["profiles"], None
            return engine

        def session(engine: Any) -> Any:
            if engine._session is None:
                assert engine._graph, "an engine without weights must not run"
                engine._session = onnxruntime.InferenceSession(engine._graph, providers=["CPUExecutionProvider"])
            return engine._session

        def shape_of(engine: Any, name: str) -> tuple[int, ...]:
            entries = {entry.name: entry for entry in (*session(engine).get_inputs(), *session(engine).get_outputs())}
            return tuple(d if isinstance(d, int) else -1 for d in entries[name].shape)

        def profile_shape(engine: Any, name: str, index: int) -> list[tuple[int, ...]]:
            return [(count, *shape_of(engine, name)[1:]) for count in engine._profiles[index]]

        def create_context(engine: Any, strategy: Any = None, runtime_config: Any = None) -> Any:
            # TensorRT for RTX takes it by its own kind of configuration.
            strategy = strategy if runtime_config is None else runtime_config._strategy
            assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = trt.IExecutionContext.__new__(trt.IExecutionContext)
            context._engine, context._addresses = engine, {}
            return context

        def set_memory(context: Any, memory: int, size: int) -> None:
            self.gpu.at(memory, size)

        def set_profile(context: Any, index: int, stream: int) -> bool:
            context._profile = context._engine._profiles[index]
            return True

        def set_address(context: Any, name: str, memory: int) -> bool:
            context._addresses[name] = memory
            return True

        def set_input_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
            smallest, _, largest = context._profile
            assert smallest <= shape[0] <= largest, "outside the profile"
            context._shape = shape
            return True

        def execute(context: Any, stream: int) -> bool:
            if self.refuse == "run" or (self.refuse == "record" and self.gpu.streams[stream].recording is not None):
                return False
            shape, addresses = context._shape, dict(context._addresses)

            def work() -> None:
                self.runs += 1
                photos = self.gpu.at(addresses["photos"], int(np.prod(shape))).reshape(shape)
                (answer,) = session(context._engine).run(None, {"photos": photos.copy()})
                self.gpu.at(addresses["probabilities"], answer.nbytes)[:] = np.frombuffer(answer.tobytes(), np.uint8)

            self.gpu.streams[stream].give(work)
            return True

        def refit(refitter: Any, model: bytes) -> bool:
            if self.refuse == "refit":
                return False
            refitter._refitter._engine._graph = model
            return True

        def new_refitter(refitter: Any, engine: Any, logger: Any) -> None:
            refitter._engine = engine

        def new_onnx_refitter(refitter: Any, inner: Any, logger: Any) -> None:
            refitter._refitter = inner

        trt.behaviour = {
            "Builder.__init__": new_builder, "Builder.create_network": create_network,
            "Builder.build_serialized_network": build, "OnnxParser.__init__": new_parser, "OnnxParser.parse": parse,
            "OnnxParser.get_error": get_error, "OnnxParser.num_errors": lambda parser: 1,
            "ParserError.desc": lambda error: "Unsupported operator Foo", "INetworkDefinition.get_input": get_input,
            "ITensor.shape": lambda tensor: tensor._shape, "IOptimizationProfile.set_shape": set_shape,
            "IBuilderConfig.add_optimization_profile": add_profile,
            "IBuilderConfig.set_flag": lambda config, flag: self.flags.add(members[int(flag)]),
            "IBuilderConfig.clear_flag": lambda config, flag: self.flags.add("no " + members[int(flag)]),
            "IBuilderConfig.create_timing_cache": create_timing_cache,
            "IBuilderConfig.set_timing_cache": set_timing_cache,
            "IBuilderConfig.get_timing_cache": lambda config: config._cache,
            "ITimingCache.serialize": lambda cache: self.kept, "Runtime.__init__": new_runtime,
            "Runtime.deserialize_cuda_engine": deserialize,
            "ICudaEngine.num_optimization_profiles": lambda engine: len(engine._profiles),
            "ICudaEngine.get_tensor_profile_shape": profile_shape, "ICudaEngine.get_tensor_shape": shape_of,
            "ICudaEngine.get_device_memory_size_for_profile_v2": lambda engine, index: 100 + index,
            "ICudaEngine.create_execution_context": create_context,
            "EngineInspector.get_engine_information": lambda inspector, format: '{"Layers": ["one"]}',
            "IExecutionContext.set_device_memory": set_memory,
            "IExecutionContext.set_optimization_profile_async": set_profile,
            "IExecutionContext.set_tensor_address": set_address, "IExecutionContext.set_input_shape": set_input_shape,
            "IExecutionContext.execute_async_v3": execute, "Refitter.__init__": new_refitter,
            "OnnxParserRefitter.__init__": new_onnx_refitter, "OnnxParserRefitter.refit_from_bytes": refit,
        }  # fmt: skip

    def complain(self, logger: Any, text: str) -> None:
        logger.log(self.trt.ILogger.Severity.ERROR, text)


def on_double(
    kind: Callable[[dict[str, Any], Gpu], Made],
    api: dict[str, Any],
    module: str,
    patch: pytest.MonkeyPatch,
    folder: Path,
) -> Iterator[Made]:
    """Put a world in the place of a module, of pycuda, of libcuda's graphs and of the cache folder."""
    gpu = install(patch)
    made = kind(api, gpu)
    patch.setitem(sys.modules, module, made.trt)
    driver = GraphDriver(gpu)
    patch.setattr(cuda_graph, "driver", lambda: driver)
    (folder / "cache").mkdir(mode=0o700)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield made
    assert not gpu.current, "a context is still current"


@pytest.fixture
def world(api: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    yield from on_double(World, api, "tensorrt", monkeypatch, tmp_path)


@pytest.fixture
def graph(trained: Trained) -> bytes:
    return (trained.bundle.folder / "model.onnx").read_bytes()


def planned(world: World, graph: bytes, options: PlanOptions, **more: Any) -> tensorrt_build.Plan:
    settings = {"exact": True, "device": "NVIDIA H200", "progress": lambda phase, step, steps: None, **more}
    return build_plan(world.trt, graph, "photos", options, **settings)


def test_profiles_leave_no_batch_out() -> None:
    for batches in ((1, 8, 64), (4,), (1, 2, 3)):
        covered = [count for low, _, high in profile_ranges(batches) for count in range(low, high + 1)]
        assert covered == list(range(1, batches[-1] + 1))
    for wrong in ((), (8, 1), (1, 1), (0, 4)):
        with pytest.raises(ConfigError, match="batches must be ascending"):
            PlanOptions(wrong)


def test_a_plan_is_built_as_asked(world: World, graph: bytes) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = planned(world, graph, PlanOptions(), progress=lambda *step: seen.append(step))
    assert world.flags == {"no TF32"}
    assert not world.portable
    assert world.profiles == [(1, 1, 1), (2, 8, 8), (9, 64, 64)]
    assert json.loads(plan.layers) == {"Layers": ["one"]}
    assert seen[0] == ("Building Engine", 0, 3)
    assert seen[-1] == ("Building Engine", 3, 3)
    planned(world, graph, PlanOptions((2,), portable=True, weightless=True), exact=False)
    assert world.flags == {"no TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL"}
    assert world.portable


def test_timings_are_kept_by_device_and_version(world: World, graph: bytes, tmp_path: Path) -> None:
    file = timing_cache_file(world.trt.__version__, "NVIDIA H200")
    others = {timing_cache_file("11.0", "NVIDIA H200"), timing_cache_file(world.trt.__version__, "NVIDIA A100")}
    assert len({file, *others}) == 3
    assert file.is_relative_to(tmp_path)
    planned(world, graph, PlanOptions())
    assert (world.timings, file.read_bytes()) == ([b""], b"fresh")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    planned(world, graph, PlanOptions())
    assert world.timings == [b"", b"fresh"]
    for kept, used in ((b"damaged", [b""]), (b"of another device", [b"of another device", b""])):
        file.write_bytes(kept)
        world.timings = []
        planned(world, graph, PlanOptions())
        assert (world.timings, file.read_bytes()) == (used, b"fresh")


@pytest.mark.parametrize(
    ("what", "say"),
    [
        ("parse", r"cannot read the graph \(Unsupported operator Foo\); use --backend aoti"),
        ("profile", r"rejected a profile of 1 to 1 photos \(TensorRT gave no reason\)"),
        ("build", r"cannot build the engine \(out of tactics\); try --max-batch 8"),
        ("load", r"cannot load the engine it built \(Version tag does not match\)"),
    ],
)
def test_refusals_of_the_builder_are_reported(world: World, graph: bytes, what: str, say: str) -> None:
    world.refuse = what
    with pytest.raises(BundleError, match=say):
        planned(world, graph, PlanOptions())


def test_ctrl_c_stops_the_builder(world: World, graph: bytes) -> None:
    seen = []

    def progress(phase: str, step: int, steps: int) -> None:
        seen.append(step)
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planned(world, graph, PlanOptions(), progress=progress)
    assert seen == [0, 1], "the builder continued"


@pytest.fixture
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 12, 23])
def test_batches_of_any_size_are_answered_in_order(world: World, graph: bytes, photos: np.ndarray, count: int) -> None:
    """Batches of 1 and 4 are recorded; 2, 3 and the rest of 5 are not; 8, 12 and 23 alternate between both contexts."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"photos": photos[:count]})
    engine = TensorRtEngine(world.trt, planned(world, graph, PlanOptions((1, 4))).data, 64, "bundle")
    before, world.gpu.launches, world.runs = world.gpu.allocated, 0, 0
    for _ in range(2):
        np.testing.assert_allclose(engine.infer(photos[:count]), expected, atol=ENGINE_FP32)
    assert world.gpu.allocated == before, "the call allocated memory"
    assert world.runs == 2 * -(-count // 4)
    assert world.gpu.launches == 2 * (count // 4 + (count % 4 == 1))
    engine.close()
    assert not world.gpu.memory
    assert not world.gpu.retained
    engine.close()
    with pytest.raises(BundleError, match="was closed"):
        engine.infer(photos)


@newest
def test_the_batches_that_commands_send_are_recorded(world: World, graph: bytes, photos: np.ndarray) -> None:
    engine = TensorRtEngine(world.trt, planned(world, graph, PlanOptions()).data, 64, "bundle")
    recorded = []
    for count in (1, 2, 8, 12, 16, 23, 32, 64):
        world.gpu.launches = 0
        engine.infer(np.resize(photos, (count, 64, 64, 3)))
        recorded += [count] if world.gpu.launches else []
    assert recorded == [1, 8, 16, 32, 64]
    engine.close()


@newest
@pytest.mark.parametrize("fault", ["refused", "stale"])
def test_a_graph_that_does_not_answer_like_the_engine_is_not_used(
    world: World, graph: bytes, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A call that fails only while it is recorded, or a graph that lacks the work, would repeat earlier answers."""
    if fault == "refused":
        world.refuse = "record"
    else:
        monkeypatch.setattr(cuda_graph.CudaGraph, "launch", lambda self, stream: None)
    engine = TensorRtEngine(world.trt, planned(world, graph, PlanOptions((1, 4))).data, 64, "bundle")
    world.gpu.launches = 0
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"photos": photos[:4]})
    np.testing.assert_allclose(engine.infer(photos[:4]), expected, atol=ENGINE_FP32)
    assert world.gpu.launches == 0
    engine.close()
    assert not world.gpu.memory


@newest
def test_frames_are_cut_and_resized_on_the_gpu(
    world: World, graph: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Score frames of different sizes in several batches, repeatedly, and compare with the reference crops."""
    names = [f"fastfundus_sample_{kind}_{mode}" for kind in OUTPUTS for mode in ("interpolate", "integrate", "nearest")]
    (tmp_path / "fatbin").write_text(" ".join(names))
    monkeypatch.setattr(cuda_sample, "fatbin", lambda: tmp_path / "fatbin")
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (90 + 7 * n, 120 + 3 * n, 3), dtype=np.uint8) for n in range(11)]
    geometry = np.array([[[1.25, 0, 5 + n], [0, 1.25, 3]] for n in range(11)], np.float32)
    pixels = torch.from_numpy(np.concatenate([frame.reshape(-1) for frame in frames]))
    sizes = torch.tensor([frame.shape[:2] for frame in frames], dtype=torch.int32)
    offsets = torch.tensor(np.cumsum([0, *(frame.nbytes for frame in frames[:-1])]))
    colour = torch.eye(4)[:3].repeat(11, 1, 1)
    cut = reference.sample(pixels, offsets, sizes, torch.from_numpy(geometry), colour, 64, torch.float32)
    photos = cut.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"photos": photos})
    engine = TensorRtEngine(world.trt, planned(world, graph, PlanOptions((1, 4))).data, 64, "bundle")
    # Values next to half a level may round either way, so some pixels differ by one grey level.
    np.testing.assert_allclose(engine.infer_frames(frames, geometry), expected, atol=ENGINE_FP32)
    before = world.gpu.allocated
    np.testing.assert_allclose(engine.infer_frames(frames[:5], geometry[:5]), expected[:5], atol=ENGINE_FP32)
    np.testing.assert_allclose(engine.infer(photos), expected, atol=ENGINE_FP32)
    assert world.gpu.allocated == before, "the call allocated memory"
    for wrong, matrices, say in (
        (frames[:2], geometry[:1], r"geometry must be \[N, 2, 3\]"),
        ([], geometry[:0], r"of N >= 1 frames"),
        ([frames[0].astype(np.float32)], geometry[:1], r"frames\[0\] must be uint8"),
        ([frames[0]], geometry[:1] * np.nan, r"geometry\[0\] must be finite"),
    ):
        with pytest.raises(ValueError, match=say):
            engine.infer_frames(wrong, matrices)
    engine.close()
    assert not world.gpu.memory
    assert not world.gpu.retained
    with pytest.raises(BundleError, match="was closed"):
        engine.infer_frames(frames, geometry)


def test_photos_on_the_device_stay_there(world: World, graph: bytes, photos: np.ndarray) -> None:
    class OnDevice:
        """Array with the interface of a torch tensor on a GPU."""

        def __init__(self, values: np.ndarray) -> None:
            self.memory = world.gpu.mem_alloc(values.nbytes)
            world.gpu.at(int(self.memory), values.nbytes)[:] = np.frombuffer(values.tobytes(), np.uint8)
            self.shape, self.dtype = values.shape, "torch.uint8"
            self.__cuda_array_interface__ = {"data": (int(self.memory), False)}

        def __len__(self) -> int:
            return self.shape[0]

    plan = planned(world, graph, PlanOptions((1, 4))).data
    with TensorRtEngine(world.trt, plan, 64, "bundle") as engine:
        expected = engine.infer(photos)
        context = world.gpu.Device(0).retain_primary_context()
        with current(context, cuda=world.gpu):
            given = OnDevice(photos)
        before = world.gpu.allocated
        np.testing.assert_array_equal(engine.infer_on_device(given), expected)
        assert world.gpu.allocated == before, "the call allocated memory"
        with pytest.raises(ValueError, match=r"photos must be uint8 \[N, 64, 64, 3\]"):
            engine.infer_on_device(photos.astype(np.float32))
        with current(context, cuda=world.gpu):
            given.memory.free()
        context.detach()


def test_two_engines_share_the_context(world: World, graph: bytes, photos: np.ndarray) -> None:
    plan = planned(world, graph, PlanOptions((8,))).data
    first, second = (TensorRtEngine(world.trt, plan, 64, "bundle") for _ in range(2))
    before = first.infer(photos)
    first.close()
    np.testing.assert_array_equal(second.infer(photos), before)
    second.close()
    assert not world.gpu.retained


def test_gpu_failures_are_reported_and_leave_nothing(world: World, graph: bytes, photos: np.ndarray) -> None:
    plan = planned(world, graph, PlanOptions((4,))).data
    for refuse, say in (
        ("load", r"bundle: TensorRT .* cannot load the engine \(Version tag does not match\); .*--backend openvino"),
        ("run", r"bundle: TensorRT cannot run the engine"),
    ):
        world.refuse = refuse
        with pytest.raises(BundleError, match=say):
            TensorRtEngine(world.trt, plan, 64, "bundle")
        assert not world.gpu.retained
    world.refuse, world.gpu.room = None, 1000
    with pytest.raises(BundleError, match=r"too little memory for the engine .*smaller --max-batch"):
        TensorRtEngine(world.trt, plan, 64, "bundle")
    assert not world.gpu.retained
    world.gpu.room = 1 << 40
    engine = TensorRtEngine(world.trt, plan, 64, "bundle")
    world.refuse = "run"
    engine.infer(photos[:4])  # recorded
    with pytest.raises(BundleError, match="could not run the engine"):
        engine.infer(photos[:3])
    engine.close()


@newest
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_a_bundle_is_built_proven_and_loaded(
    world: World, trained: Trained, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastfundus.engines import parity

    # After two epochs the order of photos depends on the fifth digit; 8-bit engines are not faster on this double.
    monkeypatch.setattr(parity, "MAX_AUROC_LOSS", 0.3)
    monkeypatch.setattr(parity, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(tensorrt_backend, "precisions", lambda: ("fp32", precision))
    loose = {name: parity.Gate(gate.probability, 1.0) for name, gate in parity.GATES.items()}
    monkeypatch.setattr(parity, "GATES", loose)
    bundle, report = build_engine(
        Run.open(trained.run), tmp_path / "bundle", backend="tensorrt", precision=precision,
        options={"batches": (1, 8), "weightless": precision == "fp16"},
    )  # fmt: skip
    assert report.passed
    assert bundle.metadata["batches"] == [1, 8]
    assert bundle.metadata["needs"] == {
        "device": "NVIDIA H200 (compute capability 9.0)", "tensorrt": world.trt.__version__
    }  # fmt: skip
    names = {path.name for path in bundle.folder.iterdir()}
    assert names - {"engine.onnx"} == {"bundle.json", "model.onnx", "heatmap.onnx", "engine.plan", "layers.json"}
    assert ("engine.onnx" in names) == (precision == "fp16"), "only a plan without weights needs the graph"
    with bundle.load() as engine:
        photos = np.zeros((3, 64, 64, 3), np.uint8)
        with trained.bundle.using("onnxruntime").load() as other:
            limit = loose[precision].probability
            np.testing.assert_allclose(engine.infer(photos), other.infer(photos), atol=limit)
    if precision == "fp16":
        world.refuse = "refit"
        with pytest.raises(BundleError, match="its weights do not fit the engine"):
            bundle.load()
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda *_: ("NVIDIA A100", (8, 0)))
    with pytest.raises(
        BundleError, match=r"compiled for device NVIDIA H200 .*this machine has NVIDIA A100 .*--backend openvino"
    ):
        bundle.load()


@newest
def test_search_continues_after_a_builder_error(
    world: World, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_backend, "precisions", lambda: ("bf16", "fp32"))
    real = world.trt.behaviour["OnnxParser.parse"]

    def no_bfloat16(parser: Any, model: bytes) -> bool:
        tensors = onnx.load_from_string(model).graph.initializer
        return bool(not any(entry.data_type == onnx.TensorProto.BFLOAT16 for entry in tensors) and real(parser, model))

    world.trt.behaviour["OnnxParser.parse"] = no_bfloat16
    bundle, _ = build_engine(
        Run.open(trained.run), tmp_path / "bundle", backend="tensorrt", options={"batches": (8,)}
    )  # fmt: skip
    assert bundle.precision == "fp32"
    assert [(entry["precision"], entry["passed"]) for entry in bundle.metadata["tried"]] == [
        ("bf16", False),
        ("fp32", True),
    ]
    assert "cannot read the graph (Unsupported operator Foo)" in bundle.metadata["tried"][0]["error"]


@newest
def test_a_portable_bundle_loads_elsewhere(
    world: World, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = build_engine(
        Run.open(trained.run), tmp_path / "bundle", backend="tensorrt", precision="fp32",
        options={"batches": (8,), "portable": True},
    )  # fmt: skip
    assert bundle.metadata["needs"] == {}
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda *_: ("NVIDIA B200", (10, 0)))
    bundle.load().close()
    blueprint = Blueprint(None, trained.bundle.folder / "model.onnx", 64, np.empty(0, np.uint8), {"portible": True})
    with pytest.raises(ConfigError, match="tensorrt has no option 'portible'; did you mean 'portable'"):
        tensorrt_backend.build(blueprint, tmp_path, "fp32")


def test_precisions_are_those_of_the_gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorrt_backend.precisions() == ("fp16", "bf16", "fp32", "int8", "fp8")
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda *_: ("Tesla T4", (7, 5)))
    assert tensorrt_backend.precisions() == ("fp16", "fp32", "int8")
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda *_: ("NVIDIA A100", (8, 0)))
    assert tensorrt_backend.precisions() == ("fp16", "bf16", "fp32", "int8")


@newest
def test_bfloat16_is_a_matter_of_the_graph(world: World, trained: Trained, tmp_path: Path) -> None:
    """Check the types in the graph, since no runtime available here computes convolutions in bfloat16."""
    from fastfundus.engines.export import ScreeningModel, export_onnx

    run = Run.open(trained.run)
    model = ScreeningModel(run.load_model(), run.spec, [1.0]).eval()
    export_onnx(model, tmp_path / "graph.onnx", ["abnormal"], precision="bf16")
    made = onnx.load(tmp_path / "graph.onnx")
    assert json.loads({entry.key: entry.value for entry in made.metadata_props}["labels"]) == ["abnormal"]
    types_of = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in onnx.shape_inference.infer_shapes(made).graph.value_info
    }
    outputs = [node.output[0] for node in made.graph.node if node.op_type == "Conv"]
    assert outputs
    assert {types_of[name] for name in outputs} == {onnx.TensorProto.BFLOAT16}
    assert made.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@newest
def test_without_a_gpu_or_its_packages(world: World, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoGpu(Exception):
        pass

    def init() -> None:
        raise NoGpu("cuInit failed: no CUDA-capable device is detected")

    monkeypatch.setattr(world.gpu, "Error", NoGpu)
    monkeypatch.setattr(world.gpu, "init", init)
    with pytest.raises(BundleError, match=r"needs an NVIDIA GPU, but none was found .*use --backend openvino"):
        tensorrt_backend.precisions()
    for package in ("tensorrt", "pycuda"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                MissingDependency, match=rf"{package} is not installed; run: pip install 'fastfundus\[ten"
            ):
                tensorrt_backend.precisions()


@newest
def test_graphs_end_recording_whatever_happens(world: World) -> None:
    gpu = world.gpu
    driver: Any = cuda_graph.driver()
    gpu.init()
    context = gpu.Device(0).retain_primary_context()
    context.push()
    stream, graph = gpu.Stream(), CudaGraph()
    with pytest.raises(ZeroDivisionError), graph.recorded(stream.handle):
        raise ZeroDivisionError
    assert stream.recording is None
    driver.fail = 901
    with (
        pytest.raises(RuntimeError, match=r"cuStreamBeginCapture failed: CUDA_ERROR_TEST \(901\)"),
        graph.recorded(stream.handle),
    ):
        pass
    graph.free()
    graph.free()
    context.pop()


def test_graph_functions_are_those_of_the_driver(tmp_path: Path) -> None:
    """Call a stub of libcuda compiled against CUDA's header, which verifies the names and types of the functions."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs CUDA's header, which is installed with nvcc")
    source = tmp_path / "stub.c"
    source.write_text("""
#include <cuda.h>
#include <stdio.h>
CUresult cuStreamBeginCapture_v2(CUstream s, CUstreamCaptureMode m) {
  printf("begin %p %d\\n", (void *)s, (int)m); return 0; }
CUresult cuStreamEndCapture(CUstream s, CUgraph *g) {
  *g = (CUgraph)0x2000000002; printf("end %p\\n", (void *)s); return 0; }
CUresult cuGraphInstantiateWithFlags(CUgraphExec *e, CUgraph g, unsigned long long f) {
  *e = (CUgraphExec)0x3000000003; printf("make %p %llu\\n", (void *)g, f); return 0; }
CUresult cuGraphLaunch(CUgraphExec e, CUstream s) {
  printf("launch %p %p\\n", (void *)e, (void *)s); fflush(stdout); return 700; }
CUresult cuGraphExecDestroy(CUgraphExec e) { printf("free %p\\n", (void *)e); fflush(stdout); return 0; }
CUresult cuGraphDestroy(CUgraph g) { printf("drop %p\\n", (void *)g); return 0; }
CUresult cuGetErrorName(CUresult c, const char **n) { *n = "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0; }
""")
    library = tmp_path / "libcuda.so.1"
    options = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-Wall,-Werror", "-Xlinker", "-soname=libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", library, source], check=True)
    code = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
from fastfundus.engines.cuda_graph import CudaGraph
from fastfundus.engines.cuda_sample import OUTPUTS
graph = CudaGraph()
with graph.recorded(0x1000000001):
    pass
try:
    graph.launch(0x1000000001)
except RuntimeError as error:
    print(error, flush=True)
graph.free()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "begin 0x1000000001 1", "end 0x1000000001", "make 0x2000000002 0", "drop 0x2000000002",
        "launch 0x3000000003 0x1000000001", "cuGraphLaunch failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)",
        "free 0x3000000003",
    ]  # fmt: skip
    assert ctypes.sizeof(ctypes.c_void_p) == 8
