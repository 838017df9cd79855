"""Classifiers: a timm backbone with a linear head, initialised from scratch, ImageNet weights or another checkpoint."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.foreign import read_foreign

__all__ = [
    "InitReport",
    "check_backbone",
    "create_model",
    "load_state",
    "load_timm",
    "set_training",
    "uses_channels_last",
]


@dataclass(frozen=True, slots=True)
class InitReport:
    """The origin of a model's initial weights."""

    source: str
    """"scratch", "imagenet" or a path."""
    loaded: int
    """Number of tensors loaded from the source."""
    fresh: tuple[str, ...]
    """Randomly initialised tensors: the head, unless the source has a matching one."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that were not loaded: those of another head, or not part of the model."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "from scratch"
        parts = [f"{self.loaded} tensors"]
        parts += [f"randomly initialised: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {_named(self.unused)}"] if self.unused else []
        return f"from {self.source} ({'; '.join(parts)})"


def _named(names: tuple[str, ...], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_backbone(name: str) -> None:
    """Check that a backbone is a timm model.

    Raises:
        ConfigError: timm has no such model; the message suggests similar names.
    """
    if not timm.is_model(name.split("/")[-1]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(f"model.backbone {name!r} is not a timm model; similar names: {', '.join(close)}")


def create_model(config: ModelConfig, outputs: int) -> tuple[nn.Module, InitReport]:
    """Build a classifier and load its initial weights.

    Args:
        config: backbone, init and dropout.
        outputs: number of logits per photo.

    Returns:
        A module that maps float [N, 3, S, S] to logits [N, outputs], and a report on the origin of its weights.

    Raises:
        ConfigError: timm has no such backbone.
        CheckpointError: the file given as init is missing or does not match, or the hub is unreachable.
    """
    check_backbone(config.backbone)
    if config.init == "imagenet":
        model = load_timm(config.backbone, num_classes=outputs, drop_rate=config.drop_rate)
        classifier: nn.Module = model.get_classifier()  # type: ignore[operator]
        head = tuple(name for name, _ in classifier.named_parameters())
        return model, InitReport("imagenet", len(model.state_dict()) - len(head), head)
    model = timm.create_model(config.backbone, pretrained=False, num_classes=outputs, drop_rate=config.drop_rate)
    if config.init == "scratch":
        return model, InitReport("scratch", 0, ())
    state = load_state(Path(config.init))
    return model, _take_over(model, state, config.init)


def load_timm(backbone: str, **options: Any) -> nn.Module:
    """Create a timm model with its published weights, from the hub or its local cache.

    Raises:
        CheckpointError: timm has no weights for this backbone, or the hub is unreachable.
    """
    known = timm.list_pretrained(f"{backbone}*")
    if not any(name.split(".")[0] == backbone.split(".")[0] for name in known):
        raise CheckpointError(
            f"timm has no published weights for {backbone}; choose another model.backbone, or set model.init to a file"
        )
    try:
        return timm.create_model(backbone, pretrained=True, **options)
    except Exception as error:
        # The hub client raises its own errors and those of urllib, ssl and requests; all mean that the download failed.
        raise CheckpointError(
            f"cannot download the ImageNet weights of {backbone} ({type(error).__name__}); on a machine without "
            f"network access, copy timm's .safetensors file (timm/{known[0]} on huggingface.co) to it and set "
            "model.init to its path"
        ) from None


def load_state(path: Path) -> dict[str, Tensor]:
    """Read weights from a run folder, or from any file that `read_foreign` supports, without running code from it.

    Raises:
        CheckpointError: the file is missing or contains no plain tensors.
    """
    return read_foreign(path / "best.safetensors" if path.is_dir() else path)[0]


def set_training(model: nn.Module, *, freeze: bool) -> None:
    """Put a model into training mode.

    Args:
        model: a model from `create_model` or `create_segmenter`.
        freeze: train only the head; all other weights and the statistics of normalisation layers stay fixed.
    """
    model.train()
    if not freeze:
        return
    heads = [model.get_submodule(name) for name in _head_names(model)]
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    model.eval()
    for head in heads:
        head.train()


def _take_over(model: nn.Module, state: dict[str, Tensor], source: str) -> InitReport:
    """Load every tensor with a matching name and shape; only tensors of the head may be missing or differ in shape."""
    wanted = model.state_dict()
    head = {name for name in wanted if any(name.startswith(f"{part}.") for part in _head_names(model))}
    fitting = {name: value for name, value in state.items() if name in wanted and wanted[name].shape == value.shape}
    missing = [name for name in wanted if name not in fitting and name not in head]
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} of the {len(wanted)} tensors of this backbone are missing or differ in shape, "
            f"such as {missing[0]}; is it the same model.backbone?"
        )
    model.load_state_dict(wanted | fitting)
    fresh = tuple(sorted(name for name in head if name not in fitting))
    return InitReport(source, len(fitting), fresh, tuple(name for name in state if name not in fitting))


def _head_names(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "default_cfg", {})
    names = config.get("classifier", "fc")
    return (names,) if isinstance(names, str) else tuple(names)


def uses_channels_last(setting: str, model: nn.Module) -> bool:
    """Resolve "auto": use channels-last for networks with 3 x 3 convolutions; plain transformers do not benefit."""
    if setting != "auto":
        return setting == "on"
    return any(isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3 for module in model.modules())
