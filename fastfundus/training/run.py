"""A run folder: the files that a training run writes, and how to read them.

config.toml          the resolved configuration
splits.parquet       path, sha256, patient, label_<output>, split of every photo that took part
learned_before.parquet  sha256 of the photos that the runs it started from have learned; absent if there are none
metrics.csv          one line per epoch
best.safetensors     averaged weights of the best epoch, with configuration, spec and labels in its header
last.ckpt            the complete training state, for resuming
operating_point.json temperature and threshold, fitted on validation; results on validation and test
predictions.parquet  path, sha256, patient, split, label_<output>, p_<output> of every validation and test photo
run.html             one page with training curves, ROC curves and the worst errors
environment.json     package versions and machine
events.out.*         the metrics for TensorBoard
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastfundus.config import ModelConfig, TrainConfig, to_toml
from fastfundus.errors import CheckpointError, FastFundusError
from fastfundus.files import atomic_write
from fastfundus.machine import usable_cores
from fastfundus.models.classifier import create_model
from fastfundus.models.local_contrast import add_local_contrast
from fastfundus.models.segmenter import create_segmenter
from fastfundus.spec import PreprocessSpec

__all__ = [
    "SCHEMA",
    "Run",
    "begin_run",
    "describe_environment",
    "learned_before",
    "learned_photos",
    "read_table",
    "run_file",
    "save_best",
]

SCHEMA = 2
"""Schema version of the files in a run folder."""


@dataclass(frozen=True, slots=True, repr=False)
class Run:
    """A run with a best checkpoint, opened for reading."""

    path: Path
    config: TrainConfig
    spec: PreprocessSpec
    labels: tuple[str, ...]
    """Names of the model's outputs."""
    caches: tuple[Path, ...]
    """The caches that it was trained on."""
    epoch: int
    """Epoch of the best checkpoint, counted from 1."""
    score: tuple[str, float]
    """Name and value of the best checkpoint's validation score."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Source, origin, licence and SHA-256 of the initial weights, as far as known; empty for runs of version 0.1."""

    def __repr__(self) -> str:
        name, value = self.score
        return f"Run({str(self.path)!r}, {self.config.model.backbone}, epoch {self.epoch}, {name} {value:.3f})"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read the description of a run from its best checkpoint.

        Raises:
            CheckpointError: there is none, or it was not written by this version of FastFundus.
        """
        path = Path(path)
        file = path / "best.safetensors"
        if not file.is_file():
            started = (path / "last.ckpt").is_file()
            hint = "no epoch has finished yet: continue with --resume" if started else "run fastfundus train first"
            raise CheckpointError(f"{path} has no best.safetensors; {hint}")
        try:
            with safe_open(file, "pt") as tensors:
                header = json.loads((tensors.metadata() or {})["fastfundus"])
        except Exception as error:
            # Any error of safetensors or json means that FastFundus did not write the file.
            raise CheckpointError(f"{file} is not a FastFundus checkpoint ({type(error).__name__})") from None
        if header["schema"] != SCHEMA:
            raise CheckpointError(
                f"{file} has schema {header['schema']}, but this FastFundus reads {SCHEMA}; train the model again"
            )
        try:
            config, spec = TrainConfig.from_stored(header["config"]), PreprocessSpec.from_dict(header["spec"])
        except FastFundusError as error:
            raise CheckpointError(f"{file}: {error}") from None
        caches = tuple(map(Path, header["caches"]))
        name, score = header["score"]
        labels, best = tuple(header["labels"]), (name, float(score))
        return cls(path, config, spec, labels, caches, int(header["epoch"]), best, header.get("provenance", {}))

    def load_model(self) -> nn.Module:
        """Build the network with the best weights, in evaluation mode, float32 on the CPU."""
        plain = ModelConfig(backbone=self.config.model.backbone, init="scratch")
        vessels = self.config.task == "vessels"
        create: Callable[..., Any] = create_segmenter if vessels else create_model
        sized = {} if vessels else {"size": self.spec.size}
        model, _ = create(plain, len(self.labels), **sized)
        model.load_state_dict(load_file(self.path / "best.safetensors"))
        # Runs of earlier versions have "auto", and no local contrast.
        if self.config.model.local_contrast is True:
            add_local_contrast(model, self.spec.mean, self.spec.std)
        return model.eval()


def save_best(
    path: Path,
    state: dict[str, Tensor],
    *,
    config: TrainConfig,
    spec: PreprocessSpec,
    labels: tuple[str, ...],
    caches: tuple[Path, ...],
    epoch: int,
    score: tuple[str, float],
    provenance: dict[str, str],
) -> None:
    """Write `best.safetensors` with the description that `Run.open` reads.

    Raises:
        CheckpointError: the file cannot be written, such as on a full disk; an older one is kept.
    """
    header = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "spec": spec.to_dict(),
        "fingerprint": spec.fingerprint,
        "labels": list(labels),
        "caches": [str(cache.absolute()) for cache in caches],
        "epoch": epoch,
        "score": list(score),
        "provenance": provenance,
    }
    # safetensors has a single memory layout: channels-last weights are written in the default order.
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with run_file(path / "best.safetensors") as partial:
        save_file(state, partial, {"fastfundus": json.dumps(header)})


@contextmanager
def run_file(file: Path) -> Iterator[Path]:
    """Write a file of a run atomically, like `atomic_write`, with an error that states how to continue.

    Raises:
        CheckpointError: the file could not be written, such as on a full disk; the old file is kept.
    """
    try:
        with atomic_write(file) as partial:
            yield partial
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer raises RuntimeError on system errors and hides their reason.
        free = shutil.disk_usage(file.parent).free // 2**20
        kept = "the previous file is kept" if file.exists() else "there is no previous file"
        resumable = (file.parent / "last.ckpt").is_file()
        cure = "continue with --resume" if resumable else "start again in another folder: no epoch was saved yet"
        raise CheckpointError(
            f"{file}: cannot be written ({str(error).splitlines()[0]}; {free} MiB are free); {kept}; free disk space "
            f"and {cure}"
        ) from None


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return package versions and properties of the machine, for environment.json."""
    packages = ["fastfundus", "torch", "torchvision", "timm", "triton", "numpy", "polars", "opencv-python-headless"]
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
        "versions": versions,
    }


_SEEN_FILE = "learned_before.parquet"


def read_table(run: Path, name: str) -> pl.DataFrame:
    """Read `splits.parquet` or `predictions.parquet` of a run.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = run / name
    try:
        if not file.is_file():
            raise ValueError("it is missing")
        table = pl.read_parquet(file)
        for column in ("path", "sha256", "patient", "split"):
            if table.schema.get(column) != pl.String or table[column].null_count():
                raise ValueError(f"its column {column!r} is missing or incomplete")
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: cannot be read ({reason}); finish the run with --resume, or train again"
        ) from None
    return table


def learned_before(run: Path) -> set[str]:
    """Return the hashes of the photos that earlier runs learned from before this one started from their weights."""
    file = run / _SEEN_FILE
    return set(pl.read_parquet(file)["sha256"]) if file.is_file() else set()


def learned_photos(run: Path) -> set[str]:
    """Return the hashes of all photos that a run learned from, those of the runs before it included."""
    splits = read_table(run, "splits.parquet")
    return set(splits.filter(pl.col("split").is_in(["train", "val"]))["sha256"]) | learned_before(run)


def record_seen_photos(run: Path, init: str, splits: pl.DataFrame) -> int:
    """Record the photos that a run inherits knowledge of through its starting weights.

    Args:
        run: folder of the run.
        init: value of `ModelConfig.init`. A run folder, or a checkpoint in one, is followed; other weights files do
            not tell what they were trained on.
        splits: split table of the run: path, sha256, split.

    Returns:
        Number of test photos of the run that earlier runs learned from.
    """
    start = Path(init)
    start = start if start.is_dir() else start.parent
    if init in ("scratch", "imagenet") or not (start / "splits.parquet").is_file():
        return 0
    seen = learned_photos(start)
    pl.DataFrame({"sha256": sorted(seen)}, schema={"sha256": pl.String}).write_parquet(run / _SEEN_FILE)
    return len(splits.filter((pl.col("split") == "test") & pl.col("sha256").is_in(list(seen))))


def begin_run(
    folder: Path, config: TrainConfig, splits: pl.DataFrame, device: torch.device, say: Callable[[str], None]
) -> None:
    """Create a run folder with the files that do not change: configuration, environment, splits.

    Args:
        folder: the run folder.
        config: the resolved configuration.
        splits: path, sha256, patient, labels and split of every photo that takes part.
        device: where the model trains.
        say: receives a warning if test photos were seen by the run that this one starts from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.toml") as partial:
        partial.write_text(to_toml(config.to_dict()))
    with atomic_write(folder / "environment.json") as partial:
        partial.write_text(json.dumps(describe_environment(device), indent=1) + "\n")
    with atomic_write(folder / "splits.parquet") as partial:
        splits.write_parquet(partial)
    seen = record_seen_photos(folder, config.model.init, splits)
    if seen:
        say(
            f"WARNING: {seen} test photos were learned by {config.model.init}, from which this run starts: its results "
            "will be too good; keep patients apart with fastfundus cache split --holdout"
        )
