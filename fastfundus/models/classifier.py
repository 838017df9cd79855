"""A timm backbone with a linear head, started from scratch, from ImageNet, or from another checkpoint."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError

__all__ = ["InitReport", "check_backbone", "create_model", "load_state", "uses_channels_last"]


@dataclass(frozen=True, slots=True)
class InitReport:
    """Where a model's first weights came from."""

    source: str
    """"scratch", "imagenet" or a path."""
    loaded: int
    """Tensors taken over."""
    fresh: tuple[str, ...]
    """Tensors that start at random: the head, when the source has another one."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "from scratch"
        fresh = f"; fresh: {', '.join(self.fresh)}" if self.fresh else ""
        return f"from {self.source} ({self.loaded} tensors{fresh})"


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
        return _from_hub(config, outputs)
    model = timm.create_model(config.backbone, pretrained=False, num_classes=outputs, drop_rate=config.drop_rate)
    if config.init == "scratch":
        return model, InitReport("scratch", 0, ())
    state = load_state(Path(config.init))
    return model, _take_over(model, state, config.init)


def _from_hub(config: ModelConfig, outputs: int) -> tuple[nn.Module, InitReport]:
    try:
        model = timm.create_model(config.backbone, pretrained=True, num_classes=outputs, drop_rate=config.drop_rate)
    except Exception as error:
        # The hub client raises its own, urllib's, ssl's and requests' errors: all mean that the weights are not here.
        raise CheckpointError(
            f"the ImageNet weights of {config.backbone} cannot be fetched ({type(error).__name__}); on a machine "
            "without network, copy timm's .safetensors file here and give its path as model.init"
        ) from None
    head = tuple(name for name, _ in model.get_classifier().named_parameters())
    return model, InitReport("imagenet", len(model.state_dict()) - len(head), head)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read weights from a run folder, a .safetensors file or a state dict.

    Files from elsewhere are untrusted: pickles are read with ``weights_only=True``, which runs no code.

    Raises:
        CheckpointError: the file is missing or holds no plain tensors.
    """
    file = path / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: is not there; give a run folder, a .safetensors file or a state dict")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model_state_dict", "model"):
                if isinstance(state, dict) and isinstance(state.get(key), dict):
                    state = state[key]
    except Exception as error:
        # Unpicklers and safetensors raise many kinds of errors on files that are not theirs.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: cannot be read as weights ({reason}); only tensors are accepted, never pickled code"
        ) from None
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors")
    return tensors


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
    model.load_state_dict(fitting, strict=False)  # what stays fresh is the head, and reported
    return InitReport(source, len(fitting), tuple(sorted(name for name in head if name not in fitting)))


def _head_names(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "default_cfg", {})
    names = config.get("classifier", "fc")
    return (names,) if isinstance(names, str) else tuple(names)


def uses_channels_last(setting: str, model: nn.Module) -> bool:
    """Resolve "auto": channels-last pays for convolutions, and means nothing to plain transformers."""
    if setting != "auto":
        return setting == "on"
    return any(isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3 for module in model.modules())
