"""The single definition of how a photo is preprocessed for a model. Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from fastfundus.errors import ConfigError, SpecMismatch, close_matches

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PreprocessSpec", "fingerprint_of"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of R, G and B in 0 to 1. Source: ImageNet training set, as in torchvision's weights."""


def fingerprint_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of plain data (dicts, lists, strings, numbers), as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessSpec:
    """Field detection, crop, size and normalisation of one photo.

    Specs with equal fields have equal fingerprints. Checkpoints, bundles and results store the fingerprint, and parts
    with different fingerprints refuse to work together. Mean and standard deviation belong to the model: a cache stores
    the pixels before normalisation and serves models with any of them, see `pixels`.
    """

    version: int = 2
    """Version of the preprocessing; it increases when any step changes its output by more than rounding. Since version
    2, squeezed fields are cropped whole, white margins become black, and JPEGs are scaled by halves only."""
    size: int = 512
    """Side of the square output in pixels, 32 to 4096."""
    field: Literal["circle", "frame"] = "circle"
    """"circle": crop to the detected retinal field; "frame": crop to the largest centred square of the photo."""
    margin: float = 0.02
    """Black margin kept around the field, as a share of its radius, 0 to 0.5."""
    mask_outside: bool = True
    """Blacken everything outside the field circle and its margin, so that burned-in text cannot become a feature."""
    filter: Literal["area"] = "area"
    """Resampling filter: area average when shrinking, bilinear when enlarging."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in 0 to 1, as the model's weights expect."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in 0 to 1 after the mean is subtracted, likewise."""

    def __post_init__(self) -> None:
        if self.version != 2:
            older = self.version < 2
            cure = "prepare the photos and train again" if older else "upgrade FastFundus"
            raise ConfigError(f"spec.version is {self.version}, but this FastFundus supports only version 2; {cure}")
        if type(self.size) is not int or not 32 <= self.size <= 4096:
            raise ConfigError(f"spec.size must be 32 to 4096 pixels, got {self.size}")
        if self.field not in ("circle", "frame"):
            raise ConfigError(f"spec.field must be 'circle' or 'frame', got {self.field!r}")
        if self.filter != "area":
            raise ConfigError(f"spec.filter must be 'area', got {self.filter!r}")
        if not 0 <= self.margin <= 0.5:
            raise ConfigError(f"spec.margin must be 0 to 0.5 of the field radius, got {self.margin}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ConfigError(f"spec.{name} needs three numbers (R, G, B), got {len(values)}")
            # Lists from JSON become tuples, so that equal specs compare and hash equal.
            object.__setattr__(self, name, values)
        if not all(math.isfinite(value) for value in self.mean):
            raise ConfigError(f"spec.mean must be finite, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ConfigError(f"spec.std must be positive, got {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        plain = asdict(self)
        return plain | {"mean": list(self.mean), "std": list(self.std)}

    def to_pixels_dict(self) -> dict[str, Any]:
        """Return what `to_dict` does without mean and std, as a cache stores it."""
        return {key: value for key, value in self.to_dict().items() if key not in ("mean", "std")}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PreprocessSpec:
        """Read plain data.

        Raises:
            ConfigError: a key is unknown or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        for key in plain:
            if key not in known:
                raise ConfigError(f"spec.{key} is not a setting{close_matches(key, known)}")
        return cls(**plain)

    @property
    def fingerprint(self) -> str:
        """64 hex digits that identify this preprocessing."""
        return fingerprint_of(self.to_dict())

    @property
    def pixels(self) -> PreprocessSpec:
        """The same preprocessing up to, but without, normalisation: mean and std have their defaults."""
        return replace(self, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def require_same(
        self,
        other: PreprocessSpec,
        *,
        mine: str,
        theirs: str,
        advice: str = "prepare the photos again with the settings of the model",
    ) -> None:
        """Raise an error if the pixels of two parts were prepared differently; normalisation may differ.

        Args:
            other: spec of the other part.
            mine: description of the part that this spec belongs to, such as "the cache odir/".
            theirs: description of the part that `other` belongs to.
            advice: next step of the user.

        Raises:
            SpecMismatch: the pixels differ; the message lists the fields that differ.
        """
        if self.pixels == other.pixels:
            return
        here, there = self.to_pixels_dict(), other.to_pixels_dict()
        different = ", ".join(f"{key} {here[key]} / {there[key]}" for key in here if here[key] != there[key])
        raise SpecMismatch(f"{mine} and {theirs} preprocess differently ({different}); {advice}")
