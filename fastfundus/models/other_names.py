"""Tensor names of other libraries, for architectures that timm has under names of its own.

ResNet has the same names in torchvision and timm. Sources: torchvision's `densenet`, `efficientnet`, `convnext` and
`vision_transformer` modules, MONAI's `densenet`, DINOv2's `vision_transformer`, and the package efficientnet_pytorch,
each against timm's module of the same architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

__all__ = ["with_timm_names"]

_VIT = {
    "class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm", "heads.head": "head",
}  # fmt: skip
_VIT_LAYERS = {
    "ln_1": "norm1", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "ln_2": "norm2",
    "mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2",
}  # fmt: skip
_CONVNEXT = {"features.0.0": "stem.0", "features.0.1": "stem.1", "classifier.0": "head.norm", "classifier.2": "head.fc"}
_CONVNEXT_LAYERS = {
    "block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1", "block.5": "mlp.fc2", "layer_scale": "gamma",
}  # fmt: skip
_EFFICIENTNET = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
_SQUEEZE = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}
_SEPARABLE = {"0.0": "conv_dw", "0.1": "bn1", "2.0": "conv_pw", "2.1": "bn2"}
"""Layers of a block without expansion."""
_INVERTED = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "3.0": "conv_pwl", "3.1": "bn3"}
"""Layers of an inverted residual block."""
_EFFICIENTNET_PYTORCH = (
    {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"},
    {
        "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
        "_project_conv": "conv_pw", "_bn2": "bn2",
    },
    {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3",
    },
)  # fmt: skip
"""Layers outside of blocks, in blocks without expansion, and in inverted residual blocks."""


_OTHER_SPELLINGS = (
    # DenseNet: MONAI, and torchvision before 0.3.
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"class_layers\.out\."), "classifier."),
    # DINOv2: blocks in chunks, as its training shards them.
    (re.compile(r"blocks\.\d+\.(\d+)\.(norm[12]|attn|ls[12]|mlp)\."), r"blocks.\1.\2."),
    (re.compile(r"(^|\.)register_tokens$"), r"\1reg_token"),
)


def with_timm_names(tensors: Mapping[str, Tensor], wanted: Iterable[str] = ()) -> dict[str, Tensor]:
    """Rename tensors of architectures of other libraries; all others are returned as they are.

    Args:
        tensors: tensors by name; other networks of the checkpoint are dropped if one has to be renamed.
        wanted: timm's names. EfficientNets are renamed only if they are given, because their blocks are numbered
            through in efficientnet_pytorch.
    """
    tensors = _in_usual_spelling(tensors)
    wanted = set(wanted)
    blocks = _numbered_blocks(wanted)
    rename: Callable[[str, Mapping[str, Tensor]], str]
    for anchor, rename in (
        ("encoder.pos_embedding", _vit),
        ("features.1.0.layer_scale", _convnext),
        ("features.1.0.block.0.0.weight", _efficientnet),
        ("_blocks.0._depthwise_conv.weight", lambda name, those: _efficientnet_pytorch(name, those, blocks)),
    ):
        prefix = next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), None)
        if prefix is None or (prefix and not prefix.endswith(".")) or anchor in wanted:
            continue
        those = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        renamed = {rename(name, those): value for name, value in those.items()}
        # torchvision keeps the factors of layer scale as [C, 1, 1].
        return {name: value.flatten() if name.endswith(".gamma") else value for name, value in renamed.items()}
    return dict(tensors)


def _in_usual_spelling(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for pattern, ours in _OTHER_SPELLINGS:
            name = pattern.sub(ours, name)
        renamed[name] = value
    for name in [name for name in renamed if name.endswith("reg_token")]:
        prefix = name.removesuffix("reg_token")
        token, places = renamed.get(f"{prefix}cls_token"), renamed.get(f"{prefix}pos_embed")
        if token is not None and places is not None and _is_square(places.shape[1] - 1):
            # timm adds the position of the class token to the token itself.
            renamed[f"{prefix}cls_token"] = token + places[:, :1]
            renamed[f"{prefix}pos_embed"] = places[:, 1:]
    return renamed


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _replaced(name: str, names: Mapping[str, str]) -> str | None:
    for theirs, ours in names.items():
        if name == theirs or name.startswith(theirs if theirs.endswith("_") else theirs + "."):
            return ours + name.removeprefix(theirs)
    return None


def _vit(name: str, _: Mapping[str, Tensor]) -> str:
    layer = re.fullmatch(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)", name)
    if layer:
        return f"blocks.{layer[1]}.{_replaced(layer[2], _VIT_LAYERS) or layer[2]}"
    return _replaced(name, _VIT) or name


def _convnext(name: str, _: Mapping[str, Tensor]) -> str:
    part = re.fullmatch(r"features\.([1-7])\.(\d+)\.(.+)", name)
    if not part:
        return _replaced(name, _CONVNEXT) or name
    number, index, rest = int(part[1]), part[2], part[3]
    if number % 2 == 0:
        return f"stages.{number // 2}.downsample.{index}.{rest}"
    return f"stages.{number // 2}.blocks.{index}.{_replaced(rest, _CONVNEXT_LAYERS) or rest}"


def _efficientnet(name: str, those: Mapping[str, Tensor]) -> str:
    part = re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(.+)", name)
    if part:
        stage, index, rest = int(part[1]), part[2], part[3]
        expanded = f"features.{stage}.{index}.block.3.0.weight" in those
        squeeze = re.fullmatch(r"[12]\.(fc[12])\.(.+)", rest)
        layer = (
            f"{_SQUEEZE[squeeze[1]]}.{squeeze[2]}"
            if squeeze
            else _replaced(rest, _INVERTED if expanded else _SEPARABLE)
        )
        return f"blocks.{stage - 1}.{index}.{layer or rest}"
    last = re.fullmatch(r"features\.\d+\.([01])\.(.+)", name)
    if last and not name.startswith("features.0."):
        return f"{('conv_head', 'bn2')[int(last[1])]}.{last[2]}"
    return _replaced(name, _EFFICIENTNET) or name


def _numbered_blocks(wanted: Iterable[str]) -> dict[str, str]:
    """Return timm's place "blocks.S.I" of each block by its number in all of the network."""
    places = {match[0]: None for name in wanted if (match := re.match(r"blocks\.\d+\.\d+", name))}
    ordered = sorted(places, key=lambda place: [int(number) for number in place.split(".")[1:]])
    return {str(number): place for number, place in enumerate(ordered)}


def _efficientnet_pytorch(name: str, those: Mapping[str, Tensor], blocks: Mapping[str, str]) -> str:
    outer, separable, inverted = _EFFICIENTNET_PYTORCH
    first, *rest = name.split(".")
    if first != "_blocks":
        return ".".join([outer.get(first, first), *rest])
    layers = inverted if f"_blocks.{rest[0]}._expand_conv.weight" in those else separable
    return ".".join([blocks.get(rest[0], "?"), layers.get(rest[1], "?"), *rest[2:]])
