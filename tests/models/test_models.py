"""Model creation: initial weights from every source, and safe reading of untrusted files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.classifier import create_model, load_state, uses_channels_last
from tests.conftest import Trained

SMALL = {"backbone": "resnet18"}


class Evil:
    """Object that creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (self.path,))


def test_init_from_scratch() -> None:
    model, report = create_model(ModelConfig(**SMALL), 1)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1)
    assert str(report) == "from scratch"


def test_init_from_a_run_loads_every_tensor(trained: Trained) -> None:
    model, report = create_model(ModelConfig(backbone="test_resnet", init=str(trained.run)), 1)
    state = load_state(trained.run)
    assert report.loaded == len(state)
    assert report.fresh == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "wrapped"])
def test_init_from_a_file_with_another_head(tmp_path: Path, form: str) -> None:
    other, _ = create_model(ModelConfig(**SMALL), 1000)
    state = other.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    model, report = create_model(ModelConfig(**SMALL, init=str(path)), 1)
    assert report.fresh == ("fc.bias", "fc.weight")
    assert set(report.unused) == {"fc.bias", "fc.weight"}
    assert "initialised anew: fc.bias, fc.weight; not used: fc." in str(report)
    assert torch.equal(model.conv1.weight, other.conv1.weight)  # type: ignore[union-attr]


def test_another_backbone_is_refused(trained: Trained) -> None:
    with pytest.raises(CheckpointError, match=r"is it the same model.backbone\?"):
        create_model(ModelConfig(backbone="resnet34", init=str(trained.run)), 1)


def test_unknown_backbone_suggests_similar_names() -> None:
    with pytest.raises(ConfigError, match="resnet50"):
        create_model(ModelConfig(backbone="resnet5O"), 1)


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match="other pickled objects could run code"):
        load_state(path)
    torch.save({"state_dict": Evil(mark)}, path)
    with pytest.raises(CheckpointError, match="other pickled objects could run code"):
        load_state(path)
    assert not mark.exists()


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_state(tmp_path / "gone.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        load_state(tmp_path / "junk.safetensors")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="contains no tensors"):
        load_state(tmp_path / "empty.pth")


def test_imagenet_without_network_suggests_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    def refuse(name: str, pretrained: bool = False, **rest: object) -> torch.nn.Module:
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        CheckpointError, match=r"copy model.safetensors of huggingface.co/timm/resnet18.* as resnet18.safe"
    ):
        create_model(ModelConfig(**SMALL, init="imagenet"), 1)


@pytest.mark.real_data
def test_a_real_foreign_checkpoint_is_read_or_refused_safely(real_data: Path) -> None:
    """A vessel network in the legacy pickle format: its tensors are read, and refused as another architecture."""
    path = real_data / "weights" / "lwnet_wnet_drive.pth"
    state = load_state(path)
    assert len(state) > 10
    with pytest.raises(CheckpointError, match="missing or differ in shape"):
        create_model(ModelConfig(**SMALL, init=str(path)), 1)


def test_channels_last_follows_the_architecture() -> None:
    convolutional, _ = create_model(ModelConfig(**SMALL), 1)
    transformer, _ = create_model(ModelConfig(backbone="vit_tiny_patch16_224"), 1)
    assert uses_channels_last("auto", convolutional)
    assert not uses_channels_last("auto", transformer)
    assert uses_channels_last("on", transformer)
    assert not uses_channels_last("off", convolutional)
