"""A U-Net with a timm backbone as encoder, which can be initialised from a classifier trained on whole photos."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.classifier import check_backbone, create_model
from fastfundus.models.initial import InitReport, load_state, stated_normalisation
from fastfundus.models.pretrained import is_hub_name

__all__ = ["STRIDE_PX", "create_segmenter"]

STRIDE_PX = 32
"""The sides of inputs must be multiples of this."""


def create_segmenter(config: ModelConfig, outputs: int) -> tuple[nn.Module, InitReport]:
    """Build a U-Net and load the initial weights of its encoder; the decoder is initialised randomly.

    If `config.init` is a vessel run, all of its weights are loaded, including the decoder.

    Args:
        config: backbone, init and dropout.
        outputs: number of maps per photo.

    Returns:
        A module that maps float [N, 3, S, S] to logits [N, outputs, S, S], with S a multiple of `STRIDE_PX`, and a
        report on the origin of its weights.

    Raises:
        ConfigError: timm has no such backbone, the backbone has no feature maps at several scales (plain ViTs, for
            example), or `config.freeze` is set.
        CheckpointError: the file given as init is missing or does not match, or the hub is unreachable.

    Source: Ronneberger et al., MICCAI 2015, as in segmentation-models-pytorch.
    """
    # Imported only when needed, because the import takes seconds.
    import segmentation_models_pytorch as smp

    check_backbone(config.backbone)
    if config.freeze:
        raise ConfigError("model.freeze trains only a head, but vessels need a trained decoder; set it to false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = smp.Unet(f"tu-{config.backbone}", encoder_weights=None, in_channels=3, classes=outputs)
    except (RuntimeError, AttributeError, ValueError, TypeError, AssertionError) as error:
        # timm and segmentation-models-pytorch raise different errors for a backbone without such maps.
        raise ConfigError(
            f"model.backbone {config.backbone!r} cannot be used as a U-Net encoder ({str(error).splitlines()[0]}); "
            "choose a convolutional one, such as resnet50 or convnext_tiny"
        ) from None
    if config.init in ("auto", "scratch"):
        return model, InitReport("scratch", 0, (), normalisation=stated_normalisation(config))
    wanted = model.state_dict()
    if config.init != "imagenet" and not is_hub_name(config.init):
        state = load_state(Path(config.init))
        if all(name in state and state[name].shape == value.shape for name, value in wanted.items()):
            model.load_state_dict({name: state[name] for name in wanted})
            return model, InitReport(config.init, len(wanted), (), normalisation=stated_normalisation(config))
    classifier, report = create_model(config, 1)
    state = classifier.state_dict()
    taken = _encoder_names(state, wanted)
    missing = [name for name in wanted if name.startswith("encoder.") and name not in taken]
    if missing:
        raise CheckpointError(
            f"{config.init}: {len(missing)} tensors of the encoder are missing or differ in shape, such as "
            f"{missing[0]}; is it the same model.backbone?"
        )
    model.load_state_dict(wanted | taken)
    used = {id(value) for value in taken.values()}
    unused = tuple(name for name, value in state.items() if id(value) not in used)
    fresh = ("decoder", "segmentation_head")
    return model, replace(report, loaded=len(taken), fresh=fresh, unused=report.unused + unused)


def _encoder_names(state: dict[str, Tensor], wanted: dict[str, Any]) -> dict[str, Tensor]:
    """Rename a classifier's tensors to the encoder's names: timm joins the first two parts with "_" for its stages."""
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
