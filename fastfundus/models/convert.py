"""Conversion of third-party weights to a file that `--init` accepts, with a report on every tensor."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
from safetensors.torch import save_file
from torch import Tensor

from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.files import atomic_write, hash_file
from fastfundus.models.classifier import check_backbone
from fastfundus.models.foreign import network_prefix, read_foreign, refuse_deeper_network, resample_positions
from fastfundus.models.other_names import with_timm_names

__all__ = ["ConvertReport", "convert_weights", "guess_backbone"]

_RESNETS: dict[tuple[int, ...], tuple[str, str]] = {
    (2, 2, 2, 2): ("resnet18", ""), (3, 4, 6, 3): ("resnet34", "resnet50"), (3, 4, 23, 3): ("", "resnet101"),
    (3, 8, 36, 3): ("", "resnet152"),
}  # fmt: skip
"""Names by number of blocks per stage: first with two convolutions per block, then with three."""
_VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """A report on every tensor of the source."""

    source: str
    """Name of the source file."""
    sha256: str
    """SHA-256 of the source file."""
    what: str
    """Description of the source file, such as "a state dict"."""
    backbone: str
    """The timm model whose tensor names the weights now have."""
    prefix: str
    """The prefix of the tensor names in the source file."""
    used: tuple[str, ...]
    """Names in the source file of tensors that were copied unchanged."""
    reshaped: tuple[str, ...]
    """Names of tensors that were resampled to another size: position embeddings."""
    unused: tuple[str, ...]
    """Names of tensors that are not part of the backbone: heads, decoders, remains of the optimizer."""


def guess_backbone(names: dict[str, Tensor]) -> str:
    """Return the backbone with these tensors, or "" if it is not recognised.

    Recognised backbones are ResNet-18 to -152, with the tensor names of timm and torchvision, and ViTs from tiny to
    large, with patches of 16 pixels as in RETFound or 14 pixels as in DINOv2.
    """
    blocks = [
        len({match[1] for name in names if (match := re.search(rf"(?:^|\.)layer{stage}\.(\d+)\.", name))})
        for stage in (1, 2, 3, 4)
    ]
    if all(blocks):
        deep = any(re.search(r"(?:^|\.)layer1\.0\.conv3\.weight$", name) for name in names)
        return _RESNETS.get(tuple(blocks), ("", ""))[deep]
    patches = next((value for name, value in names.items() if name.endswith("patch_embed.proj.weight")), None)
    if patches is not None and patches.ndim == 4 and patches.shape[0] in _VITS:
        size = _VITS[patches.shape[0]]
        name = f"vit_{size}_patch14_dinov2" if patches.shape[-1] == 14 else f"vit_{size}_patch{patches.shape[-1]}_224"
        return name if timm.is_model(name) else ""
    return ""


def convert_weights(path: Path, output: Path, *, backbone: str = "auto") -> ConvertReport:
    """Rename third-party weights to match a timm backbone and write them, with their provenance, as safetensors.

    Args:
        path: file with the weights; see `read_foreign`.
        output: file to write; its name must end in .safetensors.
        backbone: name of a timm model; "auto" recognises it from the tensors.

    Raises:
        ConfigError: timm has no such backbone, or `output` has another suffix.
        CheckpointError: the file cannot be read, its backbone is not recognised, or tensors are missing from it or have
            the wrong shape.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"the output must end in .safetensors, got {output.name}")
    tensors, what = read_foreign(path)
    tensors = with_timm_names(tensors)
    if backbone == "auto":
        backbone = guess_backbone(tensors)
        if not backbone:
            raise CheckpointError(
                f"{path}: the backbone cannot be recognised from its tensors ({', '.join(list(tensors)[:3])}, ...); "
                "give its timm name with --backbone"
            )
    check_backbone(backbone)
    # No head is created, because every task adds its own.
    wanted = timm.create_model(backbone, pretrained=False, num_classes=0).state_dict()
    tensors = with_timm_names(tensors, wanted)
    prefix = network_prefix(tensors, wanted)
    taken: dict[str, Tensor] = {}
    used, reshaped = [], []
    for name, place in wanted.items():
        found = _found(tensors, prefix, name)
        if found is None:
            continue
        value = tensors[found]
        if value.shape == place.shape:
            used.append(found)
        elif name == "pos_embed" and value.ndim == 3 and value.shape[-1] == place.shape[-1]:
            value = resample_positions(value, place.shape[1], str(path))
            reshaped.append(found)
        else:
            raise CheckpointError(
                f"{path}: {found} has shape {list(value.shape)}, {backbone} needs {list(place.shape)}; if the "
                "backbone is another one, give its name with --backbone"
            )
        taken[name] = value.to(place.dtype).contiguous()
    missing = [name for name in wanted if name not in taken]
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} of the {len(wanted)} tensors of {backbone}, such as {missing[0]}; it has "
            f"{', '.join(list(tensors)[:3])}, ...; if the backbone is another one, give its name with --backbone"
        )
    refuse_deeper_network((n.removeprefix(prefix) for n in tensors if n.startswith(prefix)), wanted, str(path))
    known = {*used, *reshaped}
    report = ConvertReport(
        path.name, hash_file(path), what, backbone, prefix, tuple(used), tuple(reshaped),
        tuple(name for name in tensors if name not in known),
    )  # fmt: skip
    with atomic_write(output) as partial:
        save_file(taken, partial, {"fastfundus_convert": json.dumps(asdict(report))})
    return report


def _found(tensors: dict[str, Tensor], prefix: str, name: str) -> str | None:
    """Return the name in the file of a tensor of the backbone, or None if it is missing.

    As in timm, RETFound's encoder ends in `fc_norm` with global pooling, and in `norm` otherwise.
    """
    others = {"norm.": "fc_norm.", "fc_norm.": "norm."}
    for ours, theirs in ((name, name), *((a, b) for a, b in others.items() if name.startswith(a))):
        candidate = prefix + (theirs if ours == name else theirs + name.removeprefix(ours))
        if candidate in tensors:
            return candidate
    return None
