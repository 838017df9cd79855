"""The Triton model repository: checked against the server's schema, with its steps run as configured."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
from click.testing import CliRunner
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from fastfundus.cli import main
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import BundleError, ConfigError
from fastfundus.photo.prepare import prepare_photo
from fastfundus.serving.triton_repository import export_repository
from tests.conftest import Trained
from tests.tolerances import ENGINE_FP32

TYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}


class Refused(Exception):
    """The error that a client of the server would receive."""


class Capsule:
    """An object with the memory of a DLPack capsule."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Utilities(types.ModuleType):
    """Stub of the used parts of `triton_python_backend_utils`."""

    TritonModelException = type("TritonModelException", (Exception,), {})

    class TritonError:
        def __init__(self, message: str) -> None:
            self.text = message

    class Tensor:
        def __init__(self, name: str, data: np.ndarray) -> None:
            self.name, self.data = name, data

        def as_numpy(self) -> np.ndarray:
            return self.data

        def __dlpack__(self, **options: Any) -> Any:
            return self.data.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.data.__dlpack_device__()

        @classmethod
        def from_dlpack(cls, name: str, capsule: Any) -> Utilities.Tensor:
            """Take over the memory of a capsule, as the server does."""
            return cls(name, np.from_dlpack(Capsule(capsule)))

    class InferenceResponse:
        def __init__(self, output_tensors: list[Any] | None = None, error: Any = None) -> None:
            self.tensors, self.error = output_tensors or [], error

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Any:
        return request[name]


class Server:
    """Runs a model repository in this process, with configurations and tensors checked against the server's schema."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utilities("triton_python_backend_utils"))
        # It keeps the utilities that it was imported with.
        monkeypatch.delitem(sys.modules, "fastfundus.serving.triton_tensors", raising=False)
        monkeypatch.delattr("fastfundus.serving.triton_tensors", raising=False)
        self.configs = {}
        for folder in sorted(repository.iterdir()):
            config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
            assert config.name == folder.name, "the server rejects other names"
            assert (folder / "1").is_dir()
            for output in config.output:
                assert not output.label_filename or (folder / output.label_filename).is_file()
            self.configs[folder.name] = config
        runners = {"python": self._python, "onnxruntime": self._onnx, "openvino": self._openvino}
        self.run = {
            name: runners[config.backend](repository / name / "1", config)
            for name, config in self.configs.items()
            if config.platform != "ensemble"
        }
        for name, config in self.configs.items():
            for warm in config.model_warmup:
                given = {}
                for key, entry in warm.inputs.items():
                    kind = TYPES[model_config_pb2.DataType.Name(entry.data_type)]
                    given[key] = np.random.default_rng(0).integers(0, 256, (warm.batch_size, *entry.dims)).astype(kind)
                self.infer(name, given)

    def infer(self, name: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.configs[name]
        self._check(config.input, given, config.max_batch_size)
        if config.platform == "ensemble":
            known = dict(given)
            for step in config.ensemble_scheduling.step:
                answer = self.infer(step.model_name, {key: known[value] for key, value in step.input_map.items()})
                known |= {value: answer[key] for key, value in step.output_map.items()}
            got = {output.name: known[output.name] for output in config.output}
        else:
            got = self.run[name](given)
        self._check(config.output, got, config.max_batch_size)
        return got

    @staticmethod
    def _check(declared: Any, tensors: dict[str, np.ndarray], max_batch: int) -> None:
        assert {entry.name for entry in declared} == set(tensors)
        for entry in declared:
            tensor = tensors[entry.name]
            assert tensor.dtype == TYPES[model_config_pb2.DataType.Name(entry.data_type)]
            assert tensor.shape[1:] == tuple(
                n if n >= 0 else m for n, m in zip(entry.dims, tensor.shape[1:], strict=True)
            )
            assert 1 <= len(tensor) <= max_batch

    @staticmethod
    def _python(folder: Path, config: Any) -> Callable[..., dict[str, np.ndarray]]:
        module_spec = importlib.util.spec_from_file_location("triton_model", folder / "model.py")
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize({"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})

        def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            request = {name: Utilities.Tensor(name, value) for name, value in given.items()}
            (response,) = model.execute([request])
            if response.error is not None:
                raise Refused(response.error.text)
            return {tensor.name: tensor.data for tensor in response.tensors}

        return run

    @staticmethod
    def _onnx(folder: Path, config: Any) -> Callable[..., dict[str, np.ndarray]]:
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda given: dict(zip(names, session.run(None, given), strict=True))

    @staticmethod
    def _openvino(folder: Path, config: Any) -> Callable[..., dict[str, np.ndarray]]:
        model = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            answer = model(given)
            return {output.any_name: np.array(answer[output]) for output in model.outputs}

        return run


@pytest.fixture
def bundle(trained: Trained) -> Bundle:
    """Return the trained bundle marked as bfloat16; the engine files of both are the same."""
    return replace(trained.bundle, precision="bf16")


@pytest.mark.parametrize("pictures", ["bytes", "uint8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ensemble_matches_the_bundle(
    bundle: Bundle, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, pictures: str
) -> None:
    bundle = replace(bundle, precision=precision)
    ensemble, _, engine = export_repository(bundle, tmp_path / "models", pictures=pictures)
    server = Server(tmp_path / "models", monkeypatch)
    config = server.configs["fundus_engine"]
    assert config.backend == {"fp32": "onnxruntime", "bf16": "openvino"}[precision]
    assert ("HINT_BF16" in config.parameters) == (precision == "bf16")
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 64]
    assert sorted(warm.batch_size for warm in config.model_warmup) == [1, 64]
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_CPU]
    prepared = [(path, prepare_photo(path, bundle.spec)) for path in sorted(photo_folder.rglob("*.jpg"))]
    good = [(path, entry.image) for path, entry in prepared if entry.status == "ok" and entry.image is not None][:5]
    files = [path.read_bytes() for path, _ in good]
    if pictures == "bytes":
        given = [np.array([[data] for data in files], np.object_)]
    else:
        # Files have different lengths, so that each is a request.
        given = [np.frombuffer(data, np.uint8)[None] for data in files]
    got = np.concatenate([server.infer("fundus", {"picture": picture})["probabilities"] for picture in given])
    with bundle.using("onnxruntime").load() as loaded:
        expected = loaded.infer(np.stack([image for _, image in good]))
    np.testing.assert_allclose(got, expected, atol=ENGINE_FP32)
    for folder in (ensemble, engine):
        assert (folder / "labels.txt").read_text() == "abnormal\n"
    metadata = server.configs["fundus"].parameters
    assert metadata["bundle_fingerprint"].string_value == bundle.fingerprint
    assert json.loads(metadata["thresholds"].string_value) == {"abnormal": bundle.thresholds[0]}


def test_pictures_that_cannot_be_scored_fail_with_their_reason(
    bundle: Bundle, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_repository(bundle, tmp_path / "models", pictures="bytes")
    server = Server(tmp_path / "models", monkeypatch)
    photo = sorted(photo_folder.rglob("*.jpg"))[0].read_bytes()
    for data, say in ((b"", "unreadable: "), (photo[: len(photo) // 2], "unreadable: "), (b"%PDF-1.4 ...", "un")):
        with pytest.raises(Refused, match=say):
            server.infer("fundus", {"picture": np.array([[photo], [data]], np.object_)})


def test_the_step_refuses_another_preprocessing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, prepare, _ = export_repository(bundle, tmp_path / "models")
    file = prepare / "1" / "spec.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 128}))
    with pytest.raises(Utilities.TritonModelException, match="the engine was built for"):
        Server(tmp_path / "models", monkeypatch)


def test_tensorrt_bundles_require_a_gpu(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    (folder / "engine.plan").write_bytes(b"plan")
    metadata = {**bundle.metadata, "engine": "engine.plan", "weights": None, "batches": [1, 4]}
    plan = replace(bundle, backend="tensorrt", metadata=metadata, folder=folder)
    _, _, engine = export_repository(plan, tmp_path / "models")
    config = text_format.Parse((engine / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
    assert (engine / "1" / "model.plan").read_bytes() == b"plan"
    weightless = replace(plan, metadata={**metadata, "weights": "engine.onnx"})
    with pytest.raises(BundleError, match="use --engine python"):
        export_repository(weightless, tmp_path / "other", engine="native")
    # The library itself inserts the weights.
    _, _, engine = export_repository(weightless, tmp_path / "other")
    config = text_format.Parse((engine / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.backend, config.instance_group[0].kind) == ("python", model_config_pb2.ModelInstanceGroup.KIND_GPU)


def test_bundles_that_the_server_has_no_backend_for_run_in_this_library(
    bundle: Bundle, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_repository(bundle, tmp_path / "models", engine="python")
    server = Server(tmp_path / "models", monkeypatch)
    photos = np.random.default_rng(0).integers(0, 256, (3, bundle.spec.size, bundle.spec.size, 3)).astype(np.uint8)
    got = server.infer("fundus_engine", {"photos": photos})["probabilities"]
    with Bundle.open(bundle.path).load() as loaded:
        np.testing.assert_allclose(got, loaded.infer(photos, guard=True), atol=ENGINE_FP32)
    # Native code of another machine is run because whoever exported it could have.
    native = export_repository(replace(bundle, backend="aoti"), tmp_path / "aoti")[2]
    config = text_format.Parse((native / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.backend == "python"
    assert config.parameters["allow_native_code"].string_value == "true"


def test_an_engine_step_refuses_another_bundle(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, engine = export_repository(bundle, tmp_path / "models", engine="python")
    config = engine / "config.pbtxt"
    config.write_text(config.read_text().replace(bundle.fingerprint, "0" * 64))
    with pytest.raises(Utilities.TritonModelException, match="export it again"):
        Server(tmp_path / "models", monkeypatch)


def test_export_errors(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="native backends for openvino, onnxruntime and tensorrt, this is aoti"):
        export_repository(replace(bundle, backend="aoti"), tmp_path / "models", engine="native")
    for option in ("pictures", "engine"):
        with pytest.raises(ConfigError, match=f"{option} is 'x'; allowed are"):
            export_repository(bundle, tmp_path / "models", **{option: "x"})
    with pytest.raises(ConfigError, match="is not a valid model name"):
        export_repository(bundle, tmp_path / "models", name="a/b")
    assert not (tmp_path / "models").exists()


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    command = ["export-triton", str(trained.bundle.path), "--output", str(tmp_path), "--name", "eye"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    names = ["eye", "eye_engine", "eye_prepare"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert sorted(done.stdout.split()) == [f"{tmp_path / name}/config.pbtxt" for name in names]
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1
    assert "already exists; choose another --name" in again.stderr
