"""Initial weights of a network: which ones, where they come from, and how they expect photos to be normalised."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.data import constants
from torch import Tensor

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.foreign import read_foreign
from fastfundus.models.pretrained import find_weights, how_to_get_weights, hub_backbone, is_hub_name
from fastfundus.spec import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec

__all__ = [
    "InitReport",
    "Normalisation",
    "load_state",
    "resolve_init",
    "resolve_local_contrast",
    "stated_normalisation",
]

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What a network subtracts from, and divides, RGB in 0 to 1 by."""

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


_NAMED = {
    "imagenet": Normalisation(),
    "inception": Normalisation(constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
    "clip": Normalisation(constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
}


@dataclass(frozen=True, slots=True)
class InitReport:
    """The origin of a model's initial weights."""

    source: str
    """"scratch", "imagenet", "hf_hub:owner/name" or a path."""
    loaded: int
    """Number of tensors loaded from the source."""
    fresh: tuple[str, ...]
    """Tensors that were not loaded: the head, unless the source has a matching one."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that were not loaded: those of another head, or not part of the model."""
    normalisation: Normalisation = Normalisation()
    origin: str = ""
    """Where published weights were found."""
    license: str = ""
    """SPDX identifier of the terms of published weights."""
    sha256: str = ""
    """SHA-256 of the file of published weights, if there was one."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "from scratch"
        parts = [self.origin] if self.origin else []
        parts += [f"licence {self.license}"] if self.license else []
        parts += [f"{self.loaded} tensors"]
        parts += [f"initialised anew: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {_named(self.unused)}"] if self.unused else []
        expected = (self.normalisation.mean, self.normalisation.std)
        mean, std = (" ".join(f"{value:g}" for value in values) for values in expected)
        return f"from {self.source} ({'; '.join(parts)}; mean {mean}, std {std})"

    def provenance(self) -> dict[str, str]:
        """Return source, origin, licence and SHA-256, as stored with a run; unknown ones are omitted."""
        facts = {"source": self.source, "origin": self.origin, "license": self.license, "sha256": self.sha256}
        return {key: value for key, value in facts.items() if value}


def _named(names: tuple[str, ...], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def resolve_init(config: ModelConfig) -> tuple[ModelConfig, str]:
    """Make `model.init` definite, and a backbone named by its repository of the hub a timm model.

    Returns:
        The configuration, and one line for the user; empty if there was nothing to choose.

    Raises:
        CheckpointError: this machine has weights for the backbone, but they are not as published; or the hub's
            description of the backbone cannot be read.
    """
    if is_hub_name(config.backbone):
        init = config.backbone if config.init in ("auto", "imagenet") else config.init
        return replace(config, backbone=hub_backbone(config.backbone), init=init), ""
    if config.init != "auto":
        return config, ""
    if find_weights(config.backbone):
        return replace(config, init="imagenet"), "starting from ImageNet weights; --init scratch does not"
    return replace(config, init="scratch"), (
        f"no ImageNet weights of {config.backbone} on this machine: training from scratch, which needs more photos. "
        f"To start from ImageNet, use --init imagenet to download them; {how_to_get_weights(config.backbone)}"
    )


def resolve_local_contrast(config: ModelConfig, task: str) -> ModelConfig:
    """Make `model.local_contrast` definite; see there.

    Args:
        config: with a definite `init`.
        task: the task of the run.

    Raises:
        ConfigError: it is true for vessels, which it does not support.
        CheckpointError: the header of the file given as init cannot be read.
    """
    if task == "vessels":
        if config.local_contrast is True:
            raise ConfigError("model.local_contrast is true, but vessels do not support it; set it to false")
        return replace(config, local_contrast=False)
    if config.local_contrast != "auto":
        return config
    if config.init in ("scratch", "imagenet") or is_hub_name(config.init):
        return replace(config, local_contrast=config.init != "scratch")
    header = _header_of_run(Path(config.init))
    # Runs of earlier versions had none; other people's weights are pretrained ones.
    used = True if header is None else header.get("config", {}).get("model", {}).get("local_contrast") is True
    return replace(config, local_contrast=used)


def _header_of_run(path: Path) -> dict[str, Any] | None:
    """Return what FastFundus stored with weights, or None if other programs wrote them.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = path / "best.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.exists():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            header = tensors.metadata() or {}
        stored: dict[str, Any] | None = json.loads(header["fastfundus"]) if "fastfundus" in header else None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: its header cannot be read ({error}); copy it again") from None
    return stored


def load_state(path: Path) -> dict[str, Tensor]:
    """Read weights from a run folder, or from any file that `read_foreign` supports, without running code from it.

    Raises:
        CheckpointError: the file is missing or contains no plain tensors.
    """
    return read_foreign(path)[0]


def stated_normalisation(config: ModelConfig, published: Any = None) -> Normalisation:
    """Return the normalisation that the initial weights of a configuration expect.

    Args:
        config: the model's configuration; `config.normalisation` takes precedence.
        published: timm's `pretrained_cfg` of published weights; None for other weights.

    Returns:
        That of the published weights, of the earlier run or converted file, or else ImageNet's usual one.
    """
    if config.normalisation != "auto":
        return _NAMED[config.normalisation]
    if published:
        return Normalisation(tuple(published["mean"]), tuple(published["std"]))
    if config.init in ("scratch", "imagenet") or is_hub_name(config.init):
        return Normalisation()
    header = _header_of_run(Path(config.init))
    if header is None:
        return Normalisation()
    try:
        spec = PreprocessSpec.from_dict(header["spec"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{config.init}: its header cannot be read ({error}); copy it again") from None
    return Normalisation(spec.mean, spec.std)
