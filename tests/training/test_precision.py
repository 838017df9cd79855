"""Precision of a run: chosen by the device's capability, stored, and kept on resume."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfundus.config import LoopConfig, TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.training import precision
from fastfundus.training.observer import Observer
from fastfundus.training.precision import autocast_dtype, resolve_precision
from fastfundus.training.run import Run
from fastfundus.training.trainer import Interrupted, Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that simulates another processor or GPU."""

    def pretend(*, bfloat16: bool = False, gpu: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")

    return pretend


DEVICES = {
    "avx2": (CPU, {}, False, "auto", "float32: this processor has no fast 16-bit types"),
    "amx": (CPU, {"bfloat16": True}, True, "bfloat16", "bfloat16 AMP, which this processor computes natively"),
    "pascal": (GPU, {"gpu": (6, 1)}, False, "auto", "float32: a GPU has no fast 16-bit types"),
    "turing": (GPU, {"gpu": (7, 5)}, True, "float16", "float16 AMP, which a GPU computes natively"),
    "ampere": (GPU, {"gpu": (8, 0)}, True, "bfloat16", "bfloat16 AMP, which a GPU computes natively"),
    "hopper": (GPU, {"gpu": (9, 0)}, True, "bfloat16", "bfloat16 AMP, which a GPU computes natively"),
}


@pytest.mark.parametrize(("device", "pretend", "amp", "dtype", "line"), DEVICES.values(), ids=DEVICES)
def test_auto_by_device(capability, device, pretend, amp, dtype, line) -> None:  # type: ignore[no-untyped-def]
    capability(**pretend)
    loop, described = resolve_precision(LoopConfig(), device)
    assert (loop.amp, loop.amp_dtype) == (amp, dtype)
    assert described.startswith(line)
    # A resolved setting stays the same on any other device.
    capability(bfloat16=not pretend.get("bfloat16", False), gpu=(8, 0))
    assert resolve_precision(loop, device)[0] == loop


def test_named_dtype_is_used_only_where_it_is_native(capability) -> None:  # type: ignore[no-untyped-def]
    capability(gpu=(7, 0))
    assert resolve_precision(LoopConfig(amp_dtype="float16"), GPU)[0].amp is True
    loop, described = resolve_precision(LoopConfig(amp_dtype="bfloat16"), GPU)
    assert loop.amp is False
    assert "no fast bfloat16" in described


def test_forced_amp_reports_emulation(capability) -> None:  # type: ignore[no-untyped-def]
    capability()
    loop, described = resolve_precision(LoopConfig(amp=True), CPU)
    assert autocast_dtype(loop) is torch.bfloat16
    assert "only emulates, several times slower than float32" in described
    assert resolve_precision(LoopConfig(amp=False), CPU) == (LoopConfig(amp=False), "float32")


def test_unresolved_settings_are_a_programming_error() -> None:
    for loop in (LoopConfig(), LoopConfig(amp=True)):
        with pytest.raises(ValueError, match="resolve_precision"):
            autocast_dtype(loop)
    assert autocast_dtype(LoopConfig(amp=False)) is None


class Notes(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class StopAfterStep(Notes):
    def step(self, epoch: int, step: int, steps: int) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_keeps_its_precision_on_another_processor(  # type: ignore[no-untyped-def]
    cache: PhotoCache, tmp_path: Path, capability
) -> None:
    plain = {"model": {"backbone": "test_resnet"}, "data": {"folds": 3}, "loop": {"epochs": 1, "batch_size": 8}}
    config, run = TrainConfig.from_dict(plain), tmp_path / "run"
    capability(bfloat16=False)
    notes = StopAfterStep()
    with pytest.raises(Interrupted):
        Trainer(cache, run, config, observer=notes).fit()
    assert any(line.startswith("training in float32: this processor has no fast") for line in notes.lines)
    assert "amp = false" in (run / "config.toml").read_text()
    capability(bfloat16=True)
    with pytest.raises(ConfigError, match="different settings"):
        Trainer(cache, run, replace(config, loop=replace(config.loop, amp=True)), resume=True).fit()
    notes = Notes()
    Trainer(cache, run, config, resume=True, observer=notes).fit()
    assert "training in float32" in notes.lines
    stored = Run.open(run)
    assert stored.config.loop.amp is False
    assert json.loads((run / "environment.json").read_text())["cores"] >= 1


def test_resuming_bfloat16_without_native_support_is_reported(  # type: ignore[no-untyped-def]
    cache: PhotoCache, tmp_path: Path, capability
) -> None:
    plain = {"model": {"backbone": "test_resnet"}, "data": {"folds": 3}, "loop": {"epochs": 1, "batch_size": 8}}
    config = TrainConfig.from_dict(plain)
    capability(bfloat16=True)
    with pytest.raises(Interrupted):
        Trainer(cache, tmp_path / "run", config, observer=StopAfterStep()).fit()
    assert 'amp_dtype = "bfloat16"' in (tmp_path / "run" / "config.toml").read_text()
    capability(bfloat16=False)
    notes = Notes()
    Trainer(cache, tmp_path / "run", config, resume=True, observer=notes).fit()
    assert any("bfloat16 AMP, which this processor only emulates" in line for line in notes.lines)


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_convnext"])
def test_depthwise_convolutions_compute_in_float32_under_amp(backbone: str) -> None:
    """Only under autocast: float32 results, names and copies of the network stay as they are."""
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=1).eval()
    changed = copy.deepcopy(plain)
    precision.depthwise_in_float32(changed)
    assert changed.state_dict().keys() == plain.state_dict().keys()
    inputs, seen = torch.randn(2, 3, 64, 64), set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.ops.aten.convolution.default:
                seen.add((args[8] > 1, args[0].dtype, args[1].dtype))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        assert torch.equal(changed(inputs), plain(inputs))
        expected = plain(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, again = changed(inputs), copy.deepcopy(changed)(inputs)
            with Record():
                changed(inputs)
    half, full = torch.bfloat16, torch.float32
    assert seen == {(True, full, full), (False, half, half)}, "only depthwise convolutions are in float32"
    assert torch.equal(rounded, again)
    # Two networks of bfloat16 layers: each is within a few of its 8-bit roundings of float32.
    scale = float(expected.abs().max()) + 0.05
    assert float((rounded.float() - expected).abs().max()) < 0.1 * scale
