"""A training run as one TOML file: frozen dataclasses that check themselves. Standard library only.

    task = "abnormality"
    [model]
    backbone = "resnet50"
    [loop]
    epochs = 30

Unknown keys are errors with close matches. The resolved config is stored with the run, the checkpoint and the bundle.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastfundus.errors import ConfigError, close_matches

__all__ = [
    "TASKS",
    "AugmentConfig",
    "DataConfig",
    "LoopConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "to_toml",
]

Task = Literal["abnormality", "multiclass", "multilabel", "ordinal", "vessels"]
TASKS: tuple[str, ...] = typing.get_args(Task)
"""What can be learned."""
_Config = TypeVar("_Config")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network."""

    backbone: str = "resnet50"
    """A timm model name. The paper uses ResNet-50; "resnet18" trains four times faster."""
    init: str = "scratch"
    """"scratch", "imagenet" (timm's weights, from its hub), or a path: a FastFundus run, .safetensors or state dict."""
    drop_rate: float = 0.0
    """Dropout before the head, 0 to 0.9. Raise it when validation loss rises while training loss falls."""
    freeze: bool = False
    """Train the head alone (a linear probe): the backbone stays as `init` gave it, its normalisation layers too."""

    def __post_init__(self) -> None:
        _check_range("model.drop_rate", self.drop_rate, 0, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Labels and the patient-grouped split."""

    labels: tuple[str, ...] = ()
    """Manifest columns to learn. Multilabel: columns of 0 and 1, as many as there are findings. The other tasks: one
    column; abnormality takes `abnormal` (1 = abnormal) or else `normal` (inverted) if none is named, multiclass
    `class`, ordinal `dr_grade`, and vessels the masks `mask_vessels`."""
    findings: tuple[str, ...] = ()
    """Outputs that make a photo positive when it is screened. None named takes every output, but for a class or label
    that is called normal or the like."""
    split: Literal["folds", "holdout"] = "folds"
    """"folds": k-fold cross-validation by `folds` and `fold`; "holdout": one split by `test_share` and `val_share`. A
    split that the label file or `split_file` fixes goes before both."""
    folds: int = 5
    """Patients are dealt into this many folds: one is the test fold, the next validates, the rest train."""
    fold: int = 0
    """Which fold is the test fold, 0 to folds - 1. Run every one of them for cross-validation."""
    test_share: float = 0.2
    """Share of the photos that test, for "holdout"."""
    val_share: float = 0.1
    """Share of the photos that validate, for "holdout"."""
    split_seed: int = 0
    """Deals patients into folds. Keep it when comparing runs."""
    split_file: str = ""
    """CSV or Parquet with the columns `path` and `split`, as `fastfundus cache split` and every run write; photos that
    it does not name are left out."""
    label_fraction: float = 1.0
    """Share of the training patients whose labels are used, 0.01 to 1: for curves of few labels. Of either class the
    same share; a smaller share is a part of any larger one."""
    duplicates: Literal["together", "ignore"] = "together"
    """"together": photos of different patients that are or look the same stay on one side of the split. "ignore" splits
    by patient alone."""

    def __post_init__(self) -> None:
        _check_range("data.folds", self.folds, 3, 100)
        _check_range("data.fold", self.fold, 0, self.folds - 1)
        _check_range("data.label_fraction", self.label_fraction, 0.01, 1)
        _check_range("data.test_share", self.test_share, 0.01, 0.9)
        _check_range("data.val_share", self.val_share, 0.01, 0.9)
        if self.test_share + self.val_share > 0.95:
            raise ConfigError("data.test_share and data.val_share leave too little to train: lower one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to each training photo, composed into one geometry and one colour matrix."""

    scale: float = 0.8
    """Smallest random crop: its longer side as a share of the photo's side; 1 turns cropping off."""
    aspect: float = 1.0
    """Largest ratio of the crop's sides, either way round; the crop is stretched to a square."""
    zoom: float = 0.0
    """Largest relative change of size about the centre, either way, after the crop; shrinking brings black rims in."""
    shear_degrees: float = 0.0
    """Largest lean of the columns, either way."""
    rotate_degrees: float = 15.0
    """Largest rotation either way."""
    flip_horizontal: bool = True
    """Mirror half of the photos left to right: a right eye becomes a left one."""
    flip_vertical: bool = False
    """Mirror half of the photos top to bottom; no retina looks like that, but lesions do."""
    brightness: float = 0.15
    """Largest relative change either way."""
    contrast: float = 0.15
    """Largest relative change either way, around mid-grey."""
    saturation: float = 0.15
    """Largest relative change either way, around each pixel's luma."""
    hue_degrees: float = 6.0
    """Largest turn of the colour circle either way."""

    def __post_init__(self) -> None:
        _check_range("augment.scale", self.scale, 0.1, 1)
        _check_range("augment.aspect", self.aspect, 1, 4)
        _check_range("augment.zoom", self.zoom, 0, 0.5)
        _check_range("augment.shear_degrees", self.shear_degrees, 0, 45)
        _check_range("augment.rotate_degrees", self.rotate_degrees, 0, 180)
        for name in ("brightness", "contrast", "saturation"):
            _check_range(f"augment.{name}", getattr(self, name), 0, 0.9)
        _check_range("augment.hue_degrees", self.hue_degrees, 0, 180)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero, and an average of the weights."""

    learning_rate: float = 1e-3
    """Peak learning rate. From a pretrained start, try 1e-4."""
    weight_decay: float = 0.02
    """Decoupled decay of weights; biases and normalisation layers are spared."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises from zero."""
    clip_norm: float = 1.0
    """Largest gradient norm; longer gradients are scaled down."""
    ema_decay: float = 0.995
    """Decay per step of the averaged weights that are validated and saved as best; 0 turns averaging off."""
    layer_decay: float = 1.0
    """What each layer's learning rate is multiplied by for every layer above it, 0.3 to 1 (off): early layers of a
    pretrained backbone then change less. RETFound fine-tunes its ViT with 0.65."""

    def __post_init__(self) -> None:
        _check_range("optimizer.learning_rate", self.learning_rate, 1e-8, 10)
        _check_range("optimizer.weight_decay", self.weight_decay, 0, 1)
        _check_range("optimizer.warmup_epochs", self.warmup_epochs, 0, 1000)
        _check_range("optimizer.clip_norm", self.clip_norm, 1e-6, 1e6)
        _check_range("optimizer.ema_decay", self.ema_decay, 0, 0.99999)
        _check_range("optimizer.layer_decay", self.layer_decay, 0.3, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised: cross-entropy, and changes to it that are off by default."""

    label_smoothing: float = 0.0
    """Share of doubt put into every label, 0 to 0.5. 0.1 helps where labels are noisy; probabilities grow timid."""
    focal_gamma: float = 0.0
    """Turns attention to photos that are still wrong, 0 (off) to 5. Calibrate afterwards: probabilities move."""
    positive_weight: float = 1.0
    """What a positive label counts against a negative one, 0.01 to 100; 0 takes their ratio in the training photos for
    each output, so that both weigh the same. Multiclass: 0 weighs classes by how rare they are; else 1."""
    mixup: float = 0.0
    """Photos are blended pairwise, and their labels alike, by shares drawn from Beta(mixup, mixup); 0 (off) to 1."""
    dice: float = 0.5
    """Vessels: share of the soft Dice loss, 0 to 1; cross-entropy has the rest."""

    def __post_init__(self) -> None:
        _check_range("loss.label_smoothing", self.label_smoothing, 0, 0.5)
        _check_range("loss.focal_gamma", self.focal_gamma, 0, 5)
        _check_range("loss.mixup", self.mixup, 0, 1)
        _check_range("loss.dice", self.dice, 0, 1)
        if self.positive_weight != 0:
            _check_range("loss.positive_weight", self.positive_weight, 0.01, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How the training loop runs."""

    epochs: int = 30
    """Passes over the training photos."""
    batch_size: int = 32
    """Photos that go through the model at once, over all processes together."""
    tile: int = 512
    """Vessels: side of the tiles in pixels that are cut out of the photos, a multiple of 32; photos are not shrunk."""
    tiles: int = 8
    """Vessels: tiles of each photo an epoch."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """"shuffle" shows every photo once an epoch; "balanced" as many photos, but of every class equally many: the rarer
    are shown again, the more frequent wait for another epoch. Multilabel counts each photo to its rarest finding."""
    first_size: float = 1.0
    """Side of the photos in the first epoch as a share of the cache's, 0.25 to 1. It grows to the full side over the
    first two thirds of the run, in four steps: early epochs cost less. For convolutional backbones."""
    accumulate: int = 1
    """Batches a step: their gradients are averaged before the weights change, as if they had been one large batch."""
    patience: int = 0
    """Epochs without a better score on validation after which the run ends; 0 runs to the last epoch."""
    amp: bool | Literal["auto"] = "auto"
    """Automatic mixed precision: autocast for the forward pass; weights, loss and optimizer stay float32. "auto" uses
    it where the device computes a 16-bit type natively, and float32 elsewhere; true and false force it. The choice is
    stored with the run, and a resumed run keeps it."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """Type that autocast computes in. "auto" is bfloat16 on GPUs of compute capability 8.0 or higher and on processors
    with AVX-512 BF16 or AMX, float16 on GPUs of 7.0 or higher. float16's gradients are scaled to stay in range."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile; "graphs" with CUDA graphs too ("reduce-overhead"). "auto" takes "graphs" on one GPU, "on" on
    several, and "off" on a CPU, where it costs a minute and gains nothing measured."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout: "auto" means on for convolutional backbones."""
    seed: int = 0
    """Weights, order and augmentation."""

    def __post_init__(self) -> None:
        _check_range("loop.epochs", self.epochs, 1, 100_000)
        _check_range("loop.batch_size", self.batch_size, 2, 65_536)
        _check_range("loop.first_size", self.first_size, 0.25, 1)
        _check_range("loop.tile", self.tile, 32, 4096)
        _check_range("loop.tiles", self.tiles, 1, 10_000)
        if self.tile % 32:
            raise ConfigError(f"loop.tile must be a multiple of 32, got {self.tile}")
        _check_range("loop.accumulate", self.accumulate, 1, 1024)
        _check_range("loop.patience", self.patience, 0, 100_000)
        _check_range("loop.seed", self.seed, 0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    task: Task = "abnormality"
    """What is learned: "abnormality", one probability that the eye is abnormal; "multiclass", one of several classes;
    "multilabel", any of several findings, each known or not; "ordinal", a grade from 0; "vessels", a map."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainConfig:
        """Read plain data, such as parsed TOML.

        Raises:
            ConfigError: a key is unknown, or a value has the wrong type or is out of range.
        """
        return _from_dict(cls, plain, "")

    @classmethod
    def from_stored(cls, plain: dict[str, Any]) -> TrainConfig:
        """Read plain data that a run stored; unlike `from_dict`, this also takes the spelling of version 0.1."""
        return cls.from_dict({"optimizer" if key == "optimiser" else key: value for key, value in plain.items()})

    @classmethod
    def from_run(cls, folder: Path) -> TrainConfig:
        """Read the config.toml of a run folder.

        Raises:
            ConfigError: it is missing, or was edited and is invalid.
        """
        path = folder / "config.toml"
        try:
            return cls.from_stored(read_toml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_toml(cls, path: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """Read a TOML file.

        Args:
            path: the file.
            overrides: values that win over the file's, by dotted name, such as {"loop.epochs": 3}.

        Raises:
            ConfigError: the file is missing, is not TOML, or a key or value is wrong.
        """
        plain = read_toml(path)
        try:
            return cls.from_dict(override(plain, overrides or {}))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        return dataclasses.asdict(self)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file to plain data.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def check_keys(table: Any, names: Iterable[str], prefix: str) -> None:
    """Refuse what is no table, or has a key that nobody reads.

    Args:
        table: plain data.
        names: keys that are read.
        prefix: dotted place of the table, with a dot at its end; empty for the whole.

    Raises:
        ConfigError: with close matches.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a table of settings, got {table!r}")
    for key in table:
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting{close_matches(key, names)}")


def override(plain: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested plain data with values set by dotted name; values that are None are left out."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in plain.items()}
    for dotted, value in values.items():
        if value is None:
            continue
        table = result
        *sections, key = dotted.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return result


def _from_dict(cls: type[_Config], plain: Any, prefix: str) -> _Config:
    check_keys(plain, [entry.name for entry in dataclasses.fields(cls)], prefix)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {key: _read(hints[key], value, prefix + key) for key, value in plain.items()}
    return cls(**values)


def _read(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _from_dict(kind, value, f"{name}.")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{name} must be a list of names, got {value!r}")
        return tuple(value)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _read_union(kind, value, name)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _read_union(kind: Any, value: Any, name: str) -> Any:
    """Read a setting that is a truth value or one of some words."""
    words = [word for part in typing.get_args(kind) for word in typing.get_args(part)]
    if type(value) is bool or value in words:
        return value
    raise ConfigError(f"{name} must be true, false or {' or '.join(map(json.dumps, words))}, got {value!r}")


def to_toml(plain: dict[str, Any]) -> str:
    """Write plain data (one level of tables of strings, numbers, truth values and lists of names) as TOML."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items() if not isinstance(value, dict)]
    for section, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: str | float | bool | tuple[str, ...]) -> str:
    # TOML's strings, truth values, finite numbers and lists are written as JSON's are.
    return json.dumps(value, ensure_ascii=False)
