"""Configuration of a training run: one TOML file, read into frozen dataclasses that validate themselves.

    task = "abnormality"
    [model]
    backbone = "resnet50"
    [loop]
    epochs = 30

Unknown keys are errors that name close matches. The resolved configuration is stored with the run, the checkpoint and
the bundle. Uses the standard library only.
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

TaskName = Literal["abnormality", "multiclass", "multilabel", "ordinal", "vessels"]
TASKS: tuple[str, ...] = typing.get_args(TaskName)
"""Names of the tasks."""
_Config = TypeVar("_Config")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Network and initial weights."""

    backbone: str = "resnet50"
    """timm model name. The paper uses ResNet-50; "resnet18" trains four times faster."""
    init: str = "auto"
    """Initial weights: "scratch"; "imagenet", weights on this machine or from timm's hub; "hf_hub:owner/name", a timm
    model on the Hugging Face hub; or the path of a run or weights file. "auto" is "imagenet" if this machine has such
    weights, and "scratch" otherwise; it never downloads. The choice is stored with the run."""
    normalisation: Literal["auto", "imagenet", "inception", "clip"] = "auto"
    """Mean and standard deviation that the initial weights expect, by their name in timm ("inception": 0.5 and 0.5).
    "auto" takes those of the weights, which timm and earlier runs state; other files are taken to expect "imagenet"."""
    local_contrast: bool | Literal["auto"] = "auto"
    """Begin the network with the local contrast of the photo: its difference from a blurred copy. It helps features
    that were learned on everyday photos (see docs/training.md). "auto" does what an earlier run given as `init` did,
    and otherwise uses it for pretrained weights, but not from scratch and not for vessels."""
    drop_rate: float = 0.0
    """Dropout before the head, 0 to 0.9. Increase it if the validation loss rises while the training loss falls."""
    freeze: bool = False
    """Train the head only (a linear probe); the backbone, including its normalisation layers, stays as initialised."""

    def __post_init__(self) -> None:
        _check_range("model.drop_rate", self.drop_rate, 0, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Labels, and the patient-grouped split."""

    labels: tuple[str, ...] = ()
    """Manifest columns to learn. Multilabel needs one column of 0 and 1 per finding, the other tasks one column. By
    default, abnormality uses `abnormal` (1 = abnormal) or else `normal` (inverted), multiclass `class`, ordinal
    `dr_grade`, and vessels the masks `mask_vessels`."""
    findings: tuple[str, ...] = ()
    """Outputs that make a photo positive in screening. By default all outputs, except a class or label named normal or
    similar."""
    auxiliary: tuple[str, ...] = ()
    """Further manifest columns of 0 and 1, or patterns such as "eye_*", that the network learns during training only,
    with `loss.auxiliary`. Knowing which diseases a photo shows helps it to tell normal from abnormal."""
    split: Literal["folds", "holdout"] = "folds"
    """"folds": k-fold cross-validation by `folds` and `fold`; "holdout": one split by `test_share` and `val_share`. A
    split fixed by the label file or `split_file` takes precedence."""
    folds: int = 5
    """Number of folds that patients are assigned to: one tests, the next validates, the others train."""
    fold: int = 0
    """The test fold, 0 to folds - 1. Cross-validation runs each of them once."""
    test_share: float = 0.2
    """Share of the photos for testing, with "holdout"."""
    val_share: float = 0.1
    """Share of the photos for validation, with "holdout"."""
    split_seed: int = 0
    """Seed of the assignment of patients to folds. Keep it constant when comparing runs."""
    split_file: str = ""
    """CSV or Parquet file with the columns `path` and `split`, as written by `fastfundus cache split` and by every run;
    photos that are not in it are left out."""
    label_fraction: float = 1.0
    """Share of the training patients whose labels are used, 0.01 to 1, for studies of label efficiency. It is the same
    in each class, and a smaller share is a subset of any larger one."""
    duplicates: Literal["together", "ignore"] = "together"
    """"together": duplicates and near duplicates of different patients stay on one side of the split. "ignore": split
    by patient only."""

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
    """Random augmentation of each training photo, composed into one geometry matrix and one colour matrix."""

    scale: float = 0.8
    """Smallest random crop: its longer side as a share of the photo's side; 1 disables cropping."""
    aspect: float = 1.0
    """Largest aspect ratio of the crop, in either orientation; the crop is stretched to a square."""
    zoom: float = 0.0
    """Largest relative zoom about the centre after the crop, in or out; zooming out adds black borders."""
    shear_degrees: float = 0.0
    """Largest shear of the columns, in either direction."""
    rotate_degrees: float = 15.0
    """Largest rotation, in either direction."""
    flip_horizontal: bool = True
    """Flip half of the photos horizontally, which turns a right eye into a left one."""
    flip_vertical: bool = False
    """Flip half of the photos vertically; no retina looks like that, but lesions do."""
    brightness: float = 0.15
    """Largest relative change, in either direction."""
    contrast: float = 0.15
    """Largest relative change about mid-grey, in either direction."""
    saturation: float = 0.15
    """Largest relative change about each pixel's luma, in either direction."""
    hue_degrees: float = 6.0
    """Largest hue rotation, in either direction."""

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
    """AdamW with linear warm-up and cosine decay to zero, and a moving average of the weights."""

    learning_rate: float | Literal["auto"] = "auto"
    """Peak learning rate. "auto" is 1e-3 from scratch, and 3e-4 from pretrained weights."""
    weight_decay: float = 0.02
    """Decoupled weight decay; not applied to biases and normalisation layers."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises from zero to its peak."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down."""
    ema_decay: float = 0.995
    """Decay per step of the averaged weights, which are validated and saved as best; 0 disables averaging."""
    layer_decay: float | Literal["auto"] = "auto"
    """Factor by which each layer's learning rate is lower than that of the layer above it, 0.3 to 1 (off), so that
    early layers of a pretrained backbone change less. RETFound fine-tunes its ViT with 0.65."""

    def __post_init__(self) -> None:
        if self.learning_rate != "auto":
            _check_range("optimizer.learning_rate", self.learning_rate, 1e-8, 10)
        _check_range("optimizer.weight_decay", self.weight_decay, 0, 1)
        _check_range("optimizer.warmup_epochs", self.warmup_epochs, 0, 1000)
        _check_range("optimizer.clip_norm", self.clip_norm, 1e-6, 1e6)
        _check_range("optimizer.ema_decay", self.ema_decay, 0, 0.99999)
        if self.layer_decay != "auto":
            _check_range("optimizer.layer_decay", self.layer_decay, 0.3, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Cross-entropy, and modifications of it that are off by default."""

    label_smoothing: float = 0.0
    """Label smoothing, 0 to 0.5. 0.1 helps with noisy labels, but makes probabilities less confident."""
    focal_gamma: float = 0.0
    """Exponent of the focal loss, which emphasises misclassified photos, 0 (off) to 5. It shifts probabilities."""
    positive_weight: float = 1.0
    """Weight of a positive label relative to a negative one, 0.01 to 100. 0 balances both by their ratio in the
    training photos, for each output. Multiclass: 0 weights classes by their rarity; otherwise 1."""
    mixup: float = 0.0
    """Mixup: photos and labels are blended pairwise with shares drawn from Beta(mixup, mixup), 0 (off) to 1."""
    auxiliary: float = 0.3
    """Weight of the mean loss of the labels of `data.auxiliary`, 0.01 to 10."""
    dice: float = 0.5
    """Vessels: share of the soft Dice loss, 0 to 1; the rest is cross-entropy."""

    def __post_init__(self) -> None:
        _check_range("loss.label_smoothing", self.label_smoothing, 0, 0.5)
        _check_range("loss.focal_gamma", self.focal_gamma, 0, 5)
        _check_range("loss.mixup", self.mixup, 0, 1)
        _check_range("loss.auxiliary", self.auxiliary, 0.01, 10)
        _check_range("loss.dice", self.dice, 0, 1)
        if self.positive_weight != 0:
            _check_range("loss.positive_weight", self.positive_weight, 0.01, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Epochs, batches, precision and compilation."""

    epochs: int = 30
    """Passes over the training photos."""
    batch_size: int = 32
    """Photos per batch, over all processes."""
    tile: int = 512
    """Vessels: side of the tiles cut from the photos at full resolution, in pixels, a multiple of 32."""
    tiles: int = 8
    """Vessels: tiles per photo and epoch."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """"shuffle" uses every photo once per epoch. "balanced" uses as many photos, but equally many of each class: rare
    ones are repeated, frequent ones are left for another epoch. In multilabel, a photo counts as its rarest finding."""
    first_size: float = 1.0
    """Side of the photos in the first epoch as a share of that in the cache, 0.25 to 1. It grows to the full size over
    the first two thirds of the run in four steps, which makes early epochs cheaper. For convolutional backbones."""
    accumulate: int = 1
    """Batches per step: their gradients are averaged before the weights are updated, as for one large batch."""
    patience: int = 0
    """Epochs without a better validation score after which the run stops; 0 disables early stopping."""
    amp: bool | Literal["auto"] = "auto"
    """Automatic mixed precision: autocast for the forward pass; weights, loss and optimizer stay float32. "auto" uses
    it where the device computes a 16-bit type natively, and float32 elsewhere; true and false force it. The choice is
    stored with the run, and a resumed run keeps it."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """Type that autocast computes in. "auto" is bfloat16 on GPUs of compute capability 8.0 or higher and on processors
    with AVX-512 BF16 or AMX, float16 on GPUs of 7.0 or higher. float16's gradients are scaled to stay in range."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile; "graphs" adds CUDA graphs ("reduce-overhead"). "auto" is "graphs" on one GPU, "on" on several, and
    "off" on a CPU, where it costs a minute and gained nothing when measured."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout: "auto" is "on" for convolutional backbones."""
    seed: int = 0
    """Seed of initial weights, order and augmentation."""

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
    """Configuration of a training run."""

    task: TaskName = "abnormality"
    """"abnormality": probability that the eye is abnormal; "multiclass": one of several classes; "multilabel": any of
    several findings, each with known or unknown labels; "ordinal": a grade from 0; "vessels": a map of the vessels."""
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
    def from_run(cls, folder: str | Path) -> TrainConfig:
        """Read the config.toml of a run folder.

        Raises:
            ConfigError: it is missing, or was edited and is invalid.
        """
        path = Path(folder) / "config.toml"
        try:
            return cls.from_stored(read_toml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """Read a TOML file.

        Args:
            path: the file.
            overrides: values that take precedence over the file, by dotted name, such as {"loop.epochs": 3}.

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


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file to plain data.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def check_keys(table: Any, names: Iterable[str], prefix: str) -> None:
    """Check that a value is a table without unknown keys.

    Args:
        table: plain data.
        names: known keys.
        prefix: dotted path of the table with a final dot; empty for the top level.

    Raises:
        ConfigError: it is not a table, or has an unknown key; names close matches.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a table of settings, got {table!r}")
    for key in table:
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting{close_matches(key, names)}")


def override(plain: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested plain data with values set by dotted name; None values are skipped."""
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
        return _read_choice(kind, value, name)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _read_choice(kind: Any, value: Any, name: str) -> Any:
    """Read a setting that is one of several words, or else a boolean or a number."""
    words = [word for part in typing.get_args(kind) for word in typing.get_args(part)]
    number = float in typing.get_args(kind)
    if (type(value) is bool and not number) or (type(value) is str and value in words):
        return value
    if number and type(value) in (int, float):
        return float(value)
    others = "a number" if number else "true, false"
    raise ConfigError(f"{name} must be {others} or {' or '.join(map(json.dumps, words))}, got {value!r}")


def to_toml(plain: dict[str, Any]) -> str:
    """Write plain data (one level of tables of strings, numbers, booleans and lists of strings) as TOML."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items() if not isinstance(value, dict)]
    for section, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: str | float | bool | tuple[str, ...]) -> str:
    # Strings, booleans, finite numbers and lists are written alike in TOML and JSON.
    return json.dumps(value, ensure_ascii=False)
