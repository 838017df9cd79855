"""A U-Net whose encoder is a timm backbone, so that what was learned on whole photos can be taken over."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.classifier import InitReport, check_backbone, load_state, load_timm

__all__ = ["STRIDE_PX", "create_segmenter"]

STRIDE_PX = 32
"""Sides of inputs must be multiples of it."""


def create_segmenter(config: ModelConfig, outputs: int) -> tuple[nn.Module, InitReport]:
    """Build the network and give its encoder its first weights; the decoder starts at random.

    Args:
        config: backbone, init and dropout.
        outputs: maps per photo.

    Returns:
        A module from float [N, 3, S, S] to logits [N, outputs, S, S], S a multiple of `STRIDE_PX`, and where its
        weights came from. The weights of a vessel run are taken over whole.

    Raises:
        ConfigError: timm knows no such backbone, or it has no maps at several scales, as plain ViTs.
        CheckpointError: the init's file is missing or does not fit, or the hub cannot be reached.

    Source: Ronneberger et al., MICCAI 2015, as in segmentation-models-pytorch.
    """
    # Loaded by those who need it: it takes seconds.
    import segmentation_models_pytorch as smp

    check_backbone(config.backbone)
    if config.freeze:
        raise ConfigError("model.freeze trains a head alone, but vessels need a decoder; set it to false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = smp.Unet(f"tu-{config.backbone}", encoder_weights=None, in_channels=3, classes=outputs)
    except (RuntimeError, AttributeError, ValueError, TypeError, AssertionError) as error:
        # timm and the decoder's library each say in their own way that a backbone has no such maps.
        raise ConfigError(
            f"model.backbone {config.backbone!r} cannot be a U-Net's encoder ({str(error).splitlines()[0]}); take a "
            "convolutional one, such as resnet50 or convnext_tiny"
        ) from None
    if config.init == "scratch":
        return model, InitReport("scratch", 0, ())
    state = load_timm(config.backbone).state_dict() if config.init == "imagenet" else load_state(Path(config.init))
    wanted = model.state_dict()
    if all(name in state and state[name].shape == value.shape for name, value in wanted.items()):
        model.load_state_dict({name: state[name] for name in wanted})
        return model, InitReport(config.init, len(wanted), ())
    taken = _encoder_names(state, wanted)
    missing = [name for name in wanted if name.startswith("encoder.") and name not in taken]
    if missing:
        raise CheckpointError(
            f"{config.init}: {len(missing)} tensors of the encoder are absent or of another shape, as {missing[0]}: "
            "is it the same model.backbone?"
        )
    model.load_state_dict(wanted | taken)
    used = {id(value) for value in taken.values()}
    unused = tuple(name for name, value in state.items() if id(value) not in used)
    return model, InitReport(config.init, len(taken), ("decoder", "segmentation_head"), unused)


def _encoder_names(state: dict[str, Tensor], wanted: dict[str, Any]) -> dict[str, Tensor]:
    """Bring a classifier's names into the encoder's: timm joins the outer two by "_" where it cuts out stages."""
    prefix = "encoder.model."
    own = {name.removeprefix(prefix) for name in wanted}
    stages = {name.split(".")[0] for name in own if "_" in name.split(".")[0]}
    taken = {}
    for name, value in state.items():
        outer, *rest = name.split(".")
        joined = f"{outer}_{rest[0]}" if rest else outer
        renamed = ".".join([joined, *rest[1:]]) if joined in stages else name
        if renamed in own and wanted[prefix + renamed].shape == value.shape:
            taken[prefix + renamed] = value
    return taken
