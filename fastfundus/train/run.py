"""A run folder: the files that a training run writes, and how to read them.

config.toml          the resolved configuration
splits.parquet       path, sha256, patient, label_<output>, split of every photo that took part
learned_before.parquet  see `train.ancestry`
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastfundus.config import ModelConfig, TrainConfig
from fastfundus.errors import CheckpointError, FastFundusError
from fastfundus.files import replaced
from fastfundus.machine import usable_cores
from fastfundus.models.classifier import create_model
from fastfundus.models.segmenter import create_segmenter
from fastfundus.spec import PreprocessSpec

__all__ = ["SCHEMA", "Run", "describe_environment", "run_file", "save_best"]

SCHEMA = 2
"""Schema version of the files in a run folder."""


@dataclass(frozen=True, slots=True)
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

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read the description of a run from its best checkpoint.

        Raises:
            CheckpointError: there is none, or it was not written by this version of FastFundus.
        """
        file = path / "best.safetensors"
        if not file.is_file():
            started = (path / "last.ckpt").is_file()
            hint = "no epoch has finished yet: continue with --resume" if started else "run fastfundus train first"
            raise CheckpointError(f"{path} has no best.safetensors; {hint}")
        try:
            with safe_open(file, "pt") as tensors:
                about = json.loads((tensors.metadata() or {})["fastfundus"])
        except Exception as error:
            # Any error of safetensors or json means that FastFundus did not write the file.
            raise CheckpointError(f"{file} is not a FastFundus checkpoint ({type(error).__name__})") from None
        if about["schema"] != SCHEMA:
            raise CheckpointError(
                f"{file} has schema {about['schema']}, but this FastFundus reads {SCHEMA}; train the model again"
            )
        try:
            config, spec = TrainConfig.from_dict(about["config"]), PreprocessSpec.from_dict(about["spec"])
        except FastFundusError as error:
            raise CheckpointError(f"{file}: {error}") from None
        caches = tuple(map(Path, about["caches"]))
        name, score = about["score"]
        return cls(path, config, spec, tuple(about["labels"]), caches, int(about["epoch"]), (name, float(score)))

    def load_model(self) -> nn.Module:
        """Build the network with the best weights, in evaluation mode, float32 on the CPU."""
        plain = ModelConfig(backbone=self.config.model.backbone)
        create = create_segmenter if self.config.task == "vessels" else create_model
        model, _ = create(plain, len(self.labels))
        model.load_state_dict(load_file(self.path / "best.safetensors"))
        return model.eval()


def save_best(
    path: Path,
    module: nn.Module,
    *,
    config: TrainConfig,
    spec: PreprocessSpec,
    labels: tuple[str, ...],
    caches: tuple[Path, ...],
    epoch: int,
    score: tuple[str, float],
) -> None:
    """Write `best.safetensors` with the description that `Run.open` reads.

    Raises:
        CheckpointError: the file cannot be written, such as on a full disk; an older one is kept.
    """
    about = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "spec": spec.to_dict(),
        "fingerprint": spec.fingerprint,
        "labels": list(labels),
        "caches": [str(cache.absolute()) for cache in caches],
        "epoch": epoch,
        "score": list(score),
    }
    # safetensors has a single memory layout: channels-last weights are written in the default order.
    state: dict[str, Tensor] = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with run_file(path / "best.safetensors") as partial:
        save_file(state, partial, {"fastfundus": json.dumps(about)})


@contextmanager
def run_file(file: Path) -> Iterator[Path]:
    """Write a file of a run atomically, like `replaced`, with an error that tells how to continue.

    Raises:
        CheckpointError: the file could not be written, such as on a full disk; the old file is kept.
    """
    try:
        with replaced(file) as partial:
            yield partial
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer raises RuntimeError on system errors and hides their reason.
        free = shutil.disk_usage(file.parent).free // 2**20
        kept = "the previous file is kept" if file.exists() else "there is no previous file"
        raise CheckpointError(
            f"{file}: cannot be written ({str(error).splitlines()[0]}; {free} MiB are free); {kept}; free disk space "
            "and continue with --resume"
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
