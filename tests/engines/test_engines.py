"""Engines: the graph against two other runtimes, the gate, and bundles that cannot be misused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fastfundus.cli import building
from fastfundus.cli.building import build_from_run
from fastfundus.data import PhotoCache
from fastfundus.engines import build
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.export import INPUT, ScreeningModel
from fastfundus.engines.openvino_backend import precisions
from fastfundus.engines.parity import Gate, compare
from fastfundus.errors import BundleError, ConfigError, GateRefused
from fastfundus.evaluate.operating_point import read_operating_point
from fastfundus.train.run import Run
from tests.conftest import Trained
from tests.tolerances import ENGINE_FP32


@pytest.fixture(scope="module")
def photos(cache: PhotoCache) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    black, white = (np.full((1, 64, 64, 3), level, np.uint8) for level in (0, 255))
    return np.concatenate([cache.photos[:10], noise, black, white])


@pytest.fixture(scope="module")
def expected(trained: Trained, photos: np.ndarray) -> np.ndarray:
    """Probabilities worked out step by step from the run, in float64 where that matters."""
    run = Run.open(trained.run)
    point = read_operating_point(run)["labels"]["abnormal"]
    mean, std = np.array(run.spec.mean), np.array(run.spec.std)
    inputs = ((photos / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        logits = run.load_model()(torch.from_numpy(inputs)).double().numpy()
    return 1 / (1 + np.exp(-logits / point["temperature"]))


def test_openvino_answers_as_the_model(trained: Trained, photos: np.ndarray, expected: np.ndarray) -> None:
    engine = trained.bundle.load()
    got = engine.infer(photos)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=ENGINE_FP32)
    # Alone or in a batch, first or last: the same photo gets the same answer.
    for row in (0, 7, len(photos) - 1):
        np.testing.assert_array_equal(engine.infer(photos[row : row + 1])[0], got[row])
    engine.close()


def test_onnx_answers_as_the_model_at_any_batch(trained: Trained, photos: np.ndarray, expected: np.ndarray) -> None:
    session = onnxruntime.InferenceSession(trained.bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == (INPUT, "tensor(uint8)", [64, 64, 3])
    for count in (1, 2, 5, len(photos)):
        (got,) = session.run(None, {INPUT: photos[:count]})
        np.testing.assert_allclose(got, expected[:count], atol=ENGINE_FP32)


@pytest.mark.parametrize("backend", ["onnxruntime", "aoti"])
def test_other_backends_answer_as_the_model(
    trained: Trained, photos: np.ndarray, expected: np.ndarray, tmp_path: Path, backend: str
) -> None:
    bundle, report = build_from_run(Run.open(trained.run), tmp_path / "bundle", backend=backend, precision="fp32")
    assert report.passed
    assert bundle.about["tried"] == [report.to_dict()]
    engine = bundle.load()
    for count in (1, 2, 5, len(photos)):
        got = engine.infer(photos[:count])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[:count], atol=ENGINE_FP32)
    with pytest.raises(ValueError, match=r"photos must be uint8 \[N, 64, 64, 3\]"):
        engine.infer(photos[:, :32])
    engine.close()
    with pytest.raises(BundleError, match="was closed"):
        engine.infer(photos)
    (bundle.path / bundle.about["engine"]).write_bytes(b"junk")
    with pytest.raises(BundleError, match="was changed after it was built"):
        Bundle.open(bundle.path)
    with pytest.raises(BundleError, match="cannot load it"):
        bundle.load()


def test_a_package_for_another_machine_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastfundus.engines import aoti_backend

    bundle, _ = build_from_run(Run.open(trained.run), tmp_path / "bundle", backend="aoti", precision="fp32")
    here = aoti_backend.needs()
    assert bundle.about["needs"] == here
    monkeypatch.setattr(aoti_backend, "needs", lambda: {**here, "device": "NVIDIA H100"})
    with pytest.raises(BundleError, match=r"was compiled for device .*, this is NVIDIA H100; build it here again"):
        bundle.load()


def test_auto_builds_measures_and_keeps_the_fastest(trained: Trained, tmp_path: Path) -> None:
    bundle, report = build_from_run(Run.open(trained.run), tmp_path / "bundle")
    tried = bundle.about["tried"]
    assert tuple(entry["precision"] for entry in tried) == precisions()
    passed = [entry for entry in tried if entry["passed"]]
    assert bundle.about["precision"] == max(passed, key=lambda entry: entry["images_per_s"])["precision"]
    assert bundle.about["parity"] == report.to_dict()
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "engine.bin", "engine.xml", "model.onnx"}
    assert report.auroc_loss is not None


def test_loss_of_auroc_by_hand() -> None:
    before = np.array([[0.9], [0.6], [0.4], [0.3], [0.1]], np.float32)
    truth = np.array([[1.0], [1.0], [0.0], [0.0], [np.nan]])
    limits = {"precision": "bf16", "images_per_s": 1.0, "torch_images_per_s": 1.0}

    def loss(second: float, truth: np.ndarray = truth) -> float | None:
        after = before.copy()
        after[1] = second
        report = compare(before, after, np.array([0.05]), truth=truth, **limits)  # type: ignore[arg-type]
        assert report.passed == (abs(second - 0.6) < 0.05 and not report.auroc_loss)
        return report.auroc_loss

    # Two pairs of four are now in the wrong order; one alone is the least that these photos could show.
    assert loss(0.2) == 0.5
    assert loss(0.35) == 0.0
    assert loss(0.6) == 0.0
    assert loss(0.6, truth * 0) is None


def test_bf16_passes_its_gate(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if precisions()[0] != "bf16":
        pytest.skip("this processor does not compute in bfloat16")
    # After two epochs every photo has nearly the same probability, and the fitted threshold lies on one of them: a
    # difference of 1e-5 would flip it. Flips are counted in a test of their own.
    point = read_operating_point(Run.open(trained.run))
    point["labels"]["abnormal"]["threshold"] = 0.999
    monkeypatch.setattr(building, "read_operating_point", lambda run: point)
    bundle, report = build_from_run(Run.open(trained.run), tmp_path / "bundle", precision="bf16")
    assert report.passed
    assert report.largest_difference > 0
    assert bundle.about["parity"] == report.to_dict()


def test_what_an_engine_cannot_take(trained: Trained, photos: np.ndarray) -> None:
    engine = trained.bundle.load()
    for wrong in (photos.astype(np.float32), photos[0], photos[:, :32], photos[:0]):
        with pytest.raises(ValueError, match=r"photos must be uint8 \[N, 64, 64, 3\]"):
            engine.infer(wrong)
    engine.close()
    with pytest.raises(BundleError, match="was closed"):
        engine.infer(photos)


def test_two_engines_in_one_process(trained: Trained, photos: np.ndarray) -> None:
    first, second = trained.bundle.load(), trained.bundle.load()
    before = first.infer(photos)
    first.close()
    np.testing.assert_array_equal(second.infer(photos), before)
    second.close()


def test_ctrl_c_still_works_after_engines_were_closed(trained: Trained) -> None:
    """OpenVINO swaps the stack of signal handlers; freed in the order they were made, two cores left one that was gone.

    A process of its own, since a failure is a segmentation fault.
    """
    code = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from fastfundus.engines.bundle import Bundle
faulthandler.enable()
# A shell's background jobs ignore SIGINT and hand that down; a user's terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
bundle = Bundle.open(Path(sys.argv[1]))
first, second = bundle.load(), bundle.load()
for engine in (first, second):
    engine.close()
del first, second, engine
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("stopped as asked")
"""
    command = [sys.executable, "-c", code, str(trained.bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "stopped as asked\n"), done.stderr


def test_parity_by_hand() -> None:
    expected = np.array([[0.2], [0.50], [0.9]], np.float32)
    got = np.array([[0.2], [0.49], [0.93]], np.float32)
    limits = {"precision": "bf16", "images_per_s": 10.0, "torch_images_per_s": 5.0}
    report = compare(expected, got, np.array([0.495]), **limits)  # type: ignore[arg-type]
    assert report.largest_difference == pytest.approx(0.03, abs=1e-6)
    assert report.flipped == 1
    assert not report.passed  # one flip in three is more than one in a hundred
    assert compare(expected, got, np.array([0.7]), **limits).passed  # type: ignore[arg-type]
    for bad in (np.nan, 1.5, -0.1):
        broken = got.copy()
        broken[0] = bad
        assert not compare(expected, broken, np.array([0.7]), **limits).passed  # type: ignore[arg-type]


def test_an_engine_that_misses_the_gate_is_refused_and_leaves_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(trained.run)
    output = tmp_path / "bundle"
    real = build.ScreeningModel.forward

    def disturbed(self: ScreeningModel, photos: torch.Tensor) -> torch.Tensor:
        # The model that the engine is compared with says something else than the one that was exported.
        return real(self, photos) * (1.0 if torch.compiler.is_exporting() else 0.9)

    monkeypatch.setattr(build.ScreeningModel, "forward", disturbed)
    with pytest.raises(GateRefused, match=r"refused: fp32 MISSES: largest \|dp\|"):
        build_from_run(run, output, precision="fp32")
    # No bundle, but the figures.
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.refused.json"]
    (report, *_) = json.loads((tmp_path / "bundle.refused.json").read_text())
    assert not report["passed"]
    assert report["precision"] == "fp32"


@pytest.mark.skipif(precisions()[0] != "bf16", reason="this processor does not compute in bfloat16")
def test_a_refusal_names_the_precision_that_passes(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastfundus.engines import parity

    strict = {**parity.GATES, "bf16": Gate(probability=1e-7, flipped=0.0)}
    monkeypatch.setattr(parity, "GATES", strict)
    with pytest.raises(GateRefused, match=r"tried instead: fp32 passes: .*; build with --precision fp32"):
        build_from_run(Run.open(trained.run), tmp_path / "bundle", precision="bf16")


def test_building_wrongly(trained: Trained, tmp_path: Path) -> None:
    run = Run.open(trained.run)
    with pytest.raises(ConfigError, match="precision 'fp23' cannot be built here; did you mean"):
        build_from_run(run, tmp_path / "bundle", precision="fp23")
    with pytest.raises(ConfigError, match="backend 'openvno' cannot be built; did you mean 'openvino'"):
        build_from_run(run, tmp_path / "bundle", backend="openvno")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="is no bundle; choose another"):
        build_from_run(run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.bundle.path, tmp_path / "copy"))


def test_a_bundle_can_be_moved(trained: Trained, copied: Path, photos: np.ndarray) -> None:
    bundle = Bundle.open(copied)
    assert bundle.fingerprint == trained.bundle.fingerprint
    engine = bundle.load()
    assert engine.infer(photos[:1]).shape == (1, 1)
    engine.close()


@pytest.mark.parametrize("name", ["model.onnx", "engine.xml", "engine.bin", "bundle.json"])
def test_one_changed_byte_is_noticed(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    place = data.index(b'"threshold": ') + 15 if name == "bundle.json" else len(data) // 2
    data[place] = ord("3") if data[place] != ord("3") else ord("4")
    (copied / name).write_bytes(bytes(data))
    with pytest.raises(BundleError, match=rf"{name}: was changed|{name} was changed"):
        Bundle.open(copied)


def test_other_faults_of_a_bundle(copied: Path) -> None:
    about = json.loads((copied / "bundle.json").read_text())
    (copied / "engine.bin").unlink()
    with pytest.raises(BundleError, match=r"engine.bin is missing"):
        Bundle.open(copied)
    (copied / "bundle.json").write_text(json.dumps(about | {"schema": 9}))
    with pytest.raises(BundleError, match="schema 9, this FastFundus reads 2"):
        Bundle.open(copied)
    (copied / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(copied)
    with pytest.raises(BundleError, match=r"no bundle.json"):
        Bundle.open(copied.parent)


def test_a_bundle_may_not_name_files_outside(copied: Path) -> None:
    from fastfundus.engines.bundle import fingerprint_of

    about = json.loads((copied / "bundle.json").read_text())
    del about["fingerprint"]
    about["files"]["../../etc/passwd"] = "0" * 64
    about["fingerprint"] = fingerprint_of(about)
    (copied / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(BundleError, match="names a file outside"):
        Bundle.open(copied)


def test_a_bf16_bundle_is_refused_where_bf16_is_missing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfundus.engines import openvino_backend

    monkeypatch.setattr(openvino_backend, "precisions", lambda: ("fp32",))
    with pytest.raises(BundleError, match="build here with --precision fp32"):
        openvino_backend.OpenVinoEngine(copied / "engine.xml", 64, "bf16")
