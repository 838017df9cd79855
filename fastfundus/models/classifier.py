"""A timm backbone with a linear head, started from scratch, from ImageNet, or from another checkpoint."""

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
    """Where a model's first weights came from."""

    source: str
    """"scratch", "imagenet" or a path."""
    loaded: int
    """Tensors taken over."""
    fresh: tuple[str, ...]
    """Tensors that start at random: the head, when the source has another one."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that have no place here: another head, or what does not belong to a model."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "from scratch"
        parts = [f"{self.loaded} tensors"]
        parts += [f"fresh: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"not used of it: {_named(self.unused)}"] if self.unused else []
        return f"from {self.source} ({'; '.join(parts)})"


def _named(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_backbone(name: str) -> None:
    """Check that timm knows a backbone.

    Raises:
        ConfigError: it does not; the message has close names.
    """
    if not timm.is_model(name.split("/")[-1]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(f"model.backbone {name!r} is not a timm model; close names: {', '.join(close)}")


def create_model(config: ModelConfig, outputs: int) -> tuple[nn.Module, InitReport]:
    """Build the network and give it its first weights.

    Args:
        config: backbone, init and dropout.
        outputs: logits per photo.

    Returns:
        A module from float [N, 3, S, S] to logits [N, outputs], and where its weights came from.

    Raises:
        ConfigError: timm knows no such backbone.
        CheckpointError: the init's file is missing or does not fit, or the hub cannot be reached.
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
    """Timm's model with its published weights, from its hub or the hub's cache on this machine.

    Raises:
        CheckpointError: timm has none for this backbone, or the hub cannot be reached.
    """
    known = timm.list_pretrained(f"{backbone}*")
    if not any(name.split(".")[0] == backbone.split(".")[0] for name in known):
        raise CheckpointError(
            f"timm has no published weights for {backbone}; give another model.backbone, or a file as model.init"
        )
    try:
        return timm.create_model(backbone, pretrained=True, **options)
    except Exception as error:
        # The hub client raises its own, urllib's, ssl's and requests' errors: all mean that the weights are not here.
        raise CheckpointError(
            f"the ImageNet weights of {backbone} cannot be fetched ({type(error).__name__}); on a machine without "
            f"network, copy timm's .safetensors file here (timm/{known[0]} on huggingface.co) and give its path as "
            "model.init"
        ) from None


def load_state(path: Path) -> dict[str, Tensor]:
    """Read weights from a run folder, or from any file that `read_foreign` reads; runs no code from it.

    Raises:
        CheckpointError: the file is missing or holds no plain tensors.
    """
    return read_foreign(path / "best.safetensors" if path.is_dir() else path)[0]


def set_training(model: nn.Module, *, freeze: bool) -> None:
    """Put a model into training mode.

    Args:
        model: from `create_model` or `create_segmenter`.
        freeze: only the head is trained: other weights stay, and so do the statistics of normalisation layers.
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
    """Load every tensor that fits; only the head may be missing or of another shape."""
    wanted = model.state_dict()
    head = {name for name in wanted if any(name.startswith(f"{part}.") for part in _head_names(model))}
    fitting = {name: value for name, value in state.items() if name in wanted and wanted[name].shape == value.shape}
    missing = [name for name in wanted if name not in fitting and name not in head]
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} of the {len(wanted)} tensors of this backbone are absent or of another shape, "
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
    """Resolve "auto": channels-last pays for convolutions, and means nothing to plain transformers."""
    if setting != "auto":
        return setting == "on"
    return any(isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3 for module in model.modules())
