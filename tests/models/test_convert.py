"""`fastfundus convert`: foreign weight formats, a report of every tensor, and no code execution from pickles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18

from fastfundus.config import ModelConfig
from fastfundus.models.classifier import create_model
from fastfundus.models.convert import guess_backbone
from fastfundus.models.foreign import read_foreign
from tests.cli.test_cli import run
from tests.models.test_models import Evil


def paper_network() -> nn.Module:
    """Return a network like the one of the paper's authors: a torchvision ResNet, a two-layer head, in DataParallel."""
    torch.manual_seed(0)
    network = resnet18()
    network.fc = nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    return nn.DataParallel(network)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def test_the_papers_pickled_network(tmp_path: Path) -> None:
    network = paper_network()
    torch.save(network, tmp_path / "fundus.pth")
    result = run("convert", tmp_path / "fundus.pth", "--output", tmp_path / "fundus.safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["what"] == "a pickled DataParallel"
    assert report["backbone"] == "resnet18"
    assert set(report["unused"]) == {f"fc.{name}" for name in network.module.fc.state_dict()}
    assert len(report["used"]) + len(report["unused"]) == len(network.state_dict())
    assert report["sha256"] == hashlib.sha256((tmp_path / "fundus.pth").read_bytes()).hexdigest()
    with safe_open(tmp_path / "fundus.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastfundus_convert"]) == report
    # The converted weights give equal features, and `--init` accepts them.
    model, init = create_model(ModelConfig(backbone="resnet18", init=str(tmp_path / "fundus.safetensors")), 1)
    assert init.fresh == ("fc.bias", "fc.weight")
    network.module.fc = model.fc = nn.Identity()  # type: ignore[assignment]
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(logits(model, images), logits(network.module, images))


@pytest.mark.parametrize("form", ["plain", "nested", "prefixed", "safetensors"])
def test_state_dict_formats(tmp_path: Path, form: str) -> None:
    state = resnet18().state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "plain":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "optimizer": {"lr": 1.0}, "model": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "prefixed":
        extra = {"backbone." + name: value for name, value in state.items()}
        torch.save({**extra, "decoder.weight": torch.zeros(3)}, path)
    else:
        save_file(state, path)
    result = run("convert", path, "--output", tmp_path / "out.safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["used"]) == len(state) - 2
    assert {name.split(".")[-2] for name in report["unused"]} <= {"fc", "decoder"}
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in written.items())


def test_a_retfound_like_vit_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=96, global_pool="avg")
    state = other.state_dict()
    assert "fc_norm.weight" in state
    torch.save({"model": {**state, "decoder_embed.weight": torch.zeros(2, 2)}}, tmp_path / "vit.pth")
    result = run("convert", tmp_path / "vit.pth", "--output", tmp_path / "vit.safetensors")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "vit_tiny_patch16_224, from a checkpoint with 'model'" in lines[0]
    assert "  resampled: pos_embed" in lines
    assert {line for line in lines if "left out" in line} == {
        f"  left out: {name}" for name in ("head.weight", "head.bias", "decoder_embed.weight")
    }
    written = load_file(tmp_path / "vit.safetensors")
    assert written["pos_embed"].shape == (1, 1 + 14 * 14, 192)
    # The position of the class token is not resampled.
    torch.testing.assert_close(written["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert torch.equal(written["norm.weight"], state["fc_norm.weight"])
    model, _ = create_model(ModelConfig(backbone="vit_tiny_patch16_224", init=str(tmp_path / "vit.safetensors")), 1)
    assert logits(model, torch.rand(1, 3, 224, 224)).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "vit_small_patch16_224"])
def test_backbones_are_recognised_by_their_tensors(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert guess_backbone({f"encoder.{key}": value for key, value in model.state_dict().items()}) == name


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"state_dict": resnet18().state_dict(), "more": Evil(trap)}, tmp_path / "evil.pth")
    network = paper_network()
    for name in ("evil.pth", "network.pth"):
        if name == "network.pth":
            network.__dict__["extra"] = Evil(trap)
            torch.save(network, tmp_path / name)
        result = run("convert", tmp_path / name, "--output", tmp_path / "out.safetensors")
        assert result.exit_code == 1
        assert "cannot be read as weights" in result.stderr
        assert "could run code" in result.stderr
    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_network_that_contains_itself_is_refused(tmp_path: Path) -> None:
    network = paper_network()
    network.module.layer1._modules["again"] = network.module
    torch.save(network, tmp_path / "w.pth")
    result = run("convert", tmp_path / "w.pth", "--output", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "nested more than 16 levels deep" in result.stderr


def small(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors


BAD = {
    "does not exist": (None, ()),
    "contains no tensors": ({"epoch": 3}, ()),
    "the backbone cannot be recognised from its tensors (weight": (small(weight=torch.zeros(2)), ()),
    "lacks 1 of the 120 tensors of resnet18, such as conv1.weight": ("without conv1", ()),
    "conv1.weight has shape [64, 1, 7, 7], resnet18 needs [64, 3, 7, 7]": ("grey", ()),
    "'resnet5' is not a timm model; similar names": (small(weight=torch.zeros(2)), ("--backbone", "resnet5")),
}


@pytest.mark.parametrize("message", BAD)
def test_mismatch_errors(tmp_path: Path, message: str) -> None:
    value, options = BAD[message]
    state = resnet18().state_dict()
    if value == "without conv1":
        value = {name: tensor for name, tensor in state.items() if name != "conv1.weight"}
    elif value == "grey":
        value = {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    if value is not None:
        torch.save(value, tmp_path / "w.pth")
    result = run("convert", tmp_path / "w.pth", "--output", tmp_path / "out.safetensors", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.glob("out*")) == []


def test_damaged_files_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"not at all")
    result = run("convert", tmp_path / "w.safetensors", "--output", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "is not a valid safetensors file" in result.stderr
    result = run("convert", tmp_path / "w.safetensors", "--output", tmp_path / "out.pth")
    assert result.exit_code == 1
    assert "must end in .safetensors, got out.pth" in result.stderr


@pytest.mark.real_data
def test_a_legacy_pickle_of_a_vessel_network(real_data: Path) -> None:
    """The tensors are read, but the file is refused because no classifier backbone is recognised."""
    path = real_data / "weights" / "lwnet_wnet_drive.pth"
    tensors, what = read_foreign(path)
    assert tensors
    assert "checkpoint" in what or what == "a state dict"
    result = run("convert", path, "--output", "/dev/null/out.safetensors")
    assert result.exit_code == 1
    assert "the backbone cannot be recognised" in result.stderr
