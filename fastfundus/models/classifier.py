"""Classifiers: a timm backbone with a linear head, initialised from scratch, ImageNet weights or another checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.models.foreign import refuse_deeper_network, resample_positions, without_prefix
from fastfundus.models.initial import InitReport, load_state, stated_normalisation
from fastfundus.models.local_contrast import add_local_contrast
from fastfundus.models.other_names import with_timm_names
from fastfundus.models.pretrained import download_weights, find_weights, is_hub_name

__all__ = [
    "check_backbone",
    "create_model",
    "first_outputs",
    "set_prior",
    "set_training",
    "uses_channels_last",
]


def check_backbone(name: str) -> None:
    """Check that a backbone is a timm model.

    Raises:
        ConfigError: timm has no such model; the message suggests similar names.
    """
    if not timm.is_model(name.split("/")[-1]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(f"model.backbone {name!r} is not a timm model; similar names: {', '.join(close)}")


def create_model(config: ModelConfig, outputs: int, *, size: int | None = None) -> tuple[nn.Module, InitReport]:
    """Build a classifier and load its initial weights.

    The head starts with weights of zero, unless the source has a matching one: every photo begins with a probability
    of one half (or 1 / C), whatever the backbone. timm draws the heads of some families from (-1, 1), which starts
    training at several times that loss and spoils pretrained features within the first steps.

    Args:
        config: backbone, init, local contrast and dropout; init "auto" counts as resolved to "scratch", see
            `resolve_init`, and local contrast "auto" as false, see `resolve_local_contrast`.
        outputs: number of logits per photo.
        size: side of the photos in pixels, for transformers built for a single size; None keeps their own.

    Returns:
        A module that maps float [N, 3, S, S] to logits [N, outputs], and a report on the origin of its weights.

    Raises:
        ConfigError: timm has no such backbone, or it does not accept photos of this size.
        CheckpointError: the file given as init is missing or does not match, or the hub is unreachable.
    """
    model, report = _create(config, outputs, size)
    if config.local_contrast is True:
        add_local_contrast(model, report.normalisation.mean, report.normalisation.std)
    return model, report


def _create(config: ModelConfig, outputs: int, size: int | None) -> tuple[nn.Module, InitReport]:
    check_backbone(config.backbone)
    options: dict[str, Any] = {"drop_rate": config.drop_rate} | _fixed_size_options(config.backbone, size)
    if config.init == "imagenet" or is_hub_name(config.init):
        return _from_published(config, outputs, options)
    create = partial(timm.create_model, config.backbone, num_classes=outputs, **options)
    model = _sized_model(config.backbone, options, create)
    if config.init in ("auto", "scratch"):
        _zero_head(model)
        return model, InitReport("scratch", 0, (), normalisation=stated_normalisation(config))
    return model, _take_over(model, load_state(Path(config.init)), config)


def _from_published(config: ModelConfig, outputs: int, options: dict[str, Any]) -> tuple[nn.Module, InitReport]:
    weights = None if is_hub_name(config.init) else find_weights(config.backbone)
    name = config.init if is_hub_name(config.init) else config.backbone
    load = partial(weights.create, config.backbone) if weights else partial(download_weights, name)
    model = _sized_model(config.backbone, options, partial(load, **options))
    model.reset_classifier(outputs)  # type: ignore[operator]
    published: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    head = _zero_head(model)
    origin = weights.origin if weights else f"hub ({published.get('hf_hub_id') or published.get('url')})"
    return model, InitReport(
        config.init,
        len(model.state_dict()) - len(head),
        head,
        normalisation=stated_normalisation(config, published),
        origin=origin,
        license=weights.license if weights else published.get("license") or "unknown",
        sha256=weights.sha256 if weights else "",
    )


def _fixed_size_options(backbone: str, size: int | None) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for photos of a size that the backbone was not published for."""
    published = timm.get_pretrained_cfg(backbone.split("/")[-1], allow_unregistered=True)
    if size is None or published is None or not published.fixed_input_size or published.input_size[-1] == size:
        return {}
    return {"img_size": size}


def _sized_model(backbone: str, options: dict[str, Any], create: Callable[[], nn.Module]) -> nn.Module:
    """Create a model; if it is built for another size than published, check that it accepts photos of that size."""
    if "img_size" not in options:
        return create()
    size = options["img_size"]
    try:
        model = create()
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        if size % patch[0]:
            raise ValueError(f"{size} is not a multiple of its patches of {patch[0]} pixels")
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        # timm's families refuse sizes with different errors.
        own = timm.get_pretrained_cfg(backbone.split("/")[-1]).input_size[-1]
        raise ConfigError(
            f"{backbone} does not accept photos of {size} pixels ({str(error).splitlines()[0][:150]}); prepare a cache "
            f"with --size {own}, or choose a convolutional backbone"
        ) from None
    return model.train()


def _zero_head(model: nn.Module) -> tuple[str, ...]:
    """Set the weights and biases of the head to zero, and return their names."""
    names = []
    for part in _head_names(model):
        for name, parameter in model.get_submodule(part).named_parameters():
            nn.init.zeros_(parameter)
            names.append(f"{part}.{name}")
    return tuple(names)


def set_prior(model: nn.Module, bias: Tensor) -> None:
    """Set the bias of a head of zeros, so that training starts from the prevalence of rare outputs.

    Args:
        model: a classifier from `create_model`.
        bias: float [L] logits.
    """
    for part in _head_names(model):
        head = model.get_submodule(part)
        if getattr(head, "bias", None) is not None:
            with torch.no_grad():
                head.bias.copy_(bias)  # type: ignore[operator]


def first_outputs(model: nn.Module, count: int) -> dict[str, Tensor]:
    """Return the state of a classifier whose head is reduced to its first outputs.

    Args:
        model: a classifier from `create_model` with `count` outputs or more.
        count: number of outputs to keep.
    """
    heads = tuple(f"{part}." for part in _head_names(model))
    return {name: value[:count] if name.startswith(heads) else value for name, value in model.state_dict().items()}


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


def _take_over(model: nn.Module, state: dict[str, Tensor], config: ModelConfig) -> InitReport:
    """Load every tensor with a matching name and shape; only tensors of the head may be missing or differ in shape."""
    source, wanted = config.init, model.state_dict()
    state = without_prefix(with_timm_names(state, wanted), wanted)
    head = {name for name in wanted if any(name.startswith(f"{part}.") for part in _head_names(model))}
    place = wanted.get("pos_embed")
    if place is not None and "pos_embed" in state and state["pos_embed"].shape != place.shape:
        state = state | {"pos_embed": resample_positions(state["pos_embed"], place.shape[1], source)}
    fitting = {name: value for name, value in state.items() if name in wanted and wanted[name].shape == value.shape}
    missing = [name for name in wanted if name not in fitting and name not in head]
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} of the {len(wanted)} tensors of this backbone are missing or differ in shape, "
            f"such as {missing[0]}; is it the same model.backbone?"
        )
    refuse_deeper_network(state, (name for name in wanted if name not in head), source)
    # A head of which only a part matches would be a mixture of two.
    fresh = tuple(sorted(name for name in head if name not in fitting))
    if fresh:
        _zero_head(model)
        fitting = {name: value for name, value in fitting.items() if name not in head}
        fresh = tuple(sorted(head))
    model.load_state_dict(model.state_dict() | fitting)
    # timm's own files have the head of ImageNet's 1000 classes; no other file says how it was trained.
    published = model.pretrained_cfg if _has_published_head(model, state) else None
    return InitReport(
        source,
        len(fitting),
        fresh,
        tuple(name for name in state if name not in fitting),
        normalisation=stated_normalisation(config, published),
    )


def _has_published_head(model: nn.Module, state: dict[str, Tensor]) -> bool:
    classes = model.pretrained_cfg["num_classes"]  # type: ignore[index]
    return any(f"{part}.weight" in state and len(state[f"{part}.weight"]) == classes for part in _head_names(model))


def _head_names(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "default_cfg", {})
    names = config.get("classifier", "fc")
    return (names,) if isinstance(names, str) else tuple(names)


def uses_channels_last(setting: str, model: nn.Module) -> bool:
    """Resolve "auto": use channels-last for networks with 3 x 3 convolutions; plain transformers do not benefit."""
    if setting != "auto":
        return setting == "on"
    return any(isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3 for module in model.modules())
