"""The training loop, readable from top to bottom: split, model, epochs, validation, checkpoints, resume."""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from fastfundus.config import TrainConfig, to_toml
from fastfundus.data.audit import pair_positions
from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import assign_splits
from fastfundus.errors import CheckpointError, ConfigError, DataError, FastFundusError
from fastfundus.models.classifier import create_model, uses_channels_last
from fastfundus.train.augment import draw_epoch
from fastfundus.train.checkpoint import TrainState, checkpoint, restore, save_atomically
from fastfundus.train.feed import balanced_order, epoch_batches, epoch_order, parts_of
from fastfundus.train.interrupt import Interrupted, stop_requested
from fastfundus.train.loss import binary_loss
from fastfundus.train.run import describe_environment, save_best
from fastfundus.train.schedule import learning_rate, training_size
from fastfundus.train.step import AveragedModel, TrainStep, build_optimiser, predict_logits
from fastfundus.train.targets import OUTPUT_LABELS, abnormality_targets, usable_rows
from fastfundus.train.watch import LossWatch

__all__ = ["EpochResult", "Interrupted", "Observer", "train"]

_METRICS = ("epoch", "learning_rate", "train_loss", "val_loss", "val_auroc", "images_per_s", "seconds")


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One line of metrics.csv."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    train_loss: float
    val_loss: float
    val_auroc: float
    images_per_s: float
    """Training only, validation not counted."""
    seconds: float
    best: bool
    """Whether this is the best epoch so far."""


class Observer:
    """Hears what happens; the command line draws a progress bar from it."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """A step was taken; `epoch` from 1, `step` from 1 to `steps`."""

    def epoch(self, result: EpochResult) -> None:
        """An epoch and its validation are over."""


def train(
    cache: PhotoCache,
    output: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    observer: Observer | None = None,
) -> float:
    """Train a model on a cache and leave a run folder.

    Args:
        cache: the photos.
        output: the run folder; must not hold a run unless `resume`.
        config: the run's configuration.
        resume: go on from `last.ckpt`; on a CPU the result is bit for bit that of a run without a stop.
        device: None takes the GPU if there is one.
        observer: hears of progress.

    Returns:
        The best AUROC on validation.

    Raises:
        DataError: the labels or patients do not allow training.
        CheckpointError: `output` holds a run, or resuming does not fit.
        Interrupted: SIGINT or SIGTERM came; `last.ckpt` was written.
    """
    observer = observer or Observer()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (output / "last.ckpt").exists() and not resume:
        raise CheckpointError(f"{output}: holds a run already; add --resume to go on, or choose another --output")
    if resume and not (output / "last.ckpt").exists():
        raise CheckpointError(f"{output}: has no last.ckpt to resume; leave --resume away to start")
    targets, label = abnormality_targets(cache.manifest, config.data.label)
    rows = usable_rows(cache.manifest, targets)
    if not len(rows):
        raise DataError(
            "no photo is ok and labelled; see the status and label columns of the manifest", path=cache.path
        )
    splits = _splits(cache, rows, targets, config, observer)
    train_rows, val_rows = (rows[(splits["split"] == name).to_numpy()] for name in ("train", "val"))
    observer.say(
        f"learning {label!r}: {len(rows)} of {len(cache.manifest)} photos are ok and labelled; "
        + ", ".join(f"{name} {int((splits['split'] == name).sum())}" for name in ("train", "val", "test"))
        + f"; {splits['patient'].n_unique()} patients"
    )

    torch.manual_seed(config.loop.seed)
    model, init = create_model(config.model, len(OUTPUT_LABELS[config.task]))
    if config.loop.first_size < 1 and hasattr(model, "patch_embed"):
        raise ConfigError(
            f"loop.first_size is {config.loop.first_size}, but {config.model.backbone} takes photos of one size; "
            "set it to 1"
        )
    channels_last = uses_channels_last(config.loop.channels_last, model)
    model = model.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimiser = build_optimiser(model, config.optimiser)
    averaged = AveragedModel(model, config.optimiser.ema_decay)
    state = TrainState()
    if resume:
        state = restore(output, cache, config, splits, model, averaged, optimiser)
        observer.say(f"resuming after epoch {state.epoch}, step {state.step}")
    else:
        _begin(output, config, splits, device)
        observer.say(f"{config.model.backbone} {init}; {_layout(config, channels_last)}")
    forward: Any = model
    if _compiles(config, device, observer):
        # One graph for each size of the photos, rather than one for any size.
        forward = torch.compile(model, fullgraph=True, dynamic=False)
    loss_of = _loss(config, targets[train_rows])
    step = TrainStep(
        model, forward, optimiser, config.loop, loss_of, clip_norm=config.optimiser.clip_norm, device=device
    )
    if resume:
        step.scaler.load_state_dict(state.scaler)
    together = config.loop.batch_size * config.loop.accumulate

    def order_of(epoch: int) -> list[NDArray[np.int64]]:
        if config.loop.sampler == "balanced":
            return balanced_order(targets[train_rows], together, seed=config.loop.seed, epoch=epoch)
        return epoch_order(len(train_rows), together, seed=config.loop.seed, epoch=epoch)

    steps = len(order_of(0))
    total, warmup = steps * config.loop.epochs, round(steps * config.optimiser.warmup_epochs)

    def rate_at(number: int) -> float:
        return learning_rate(number, peak=config.optimiser.learning_rate, warmup=warmup, total=total)

    def save(name: str = "last.ckpt") -> None:
        state.loss_sum, state.scaler = watch.total(), step.scaler.state_dict()
        save_atomically(checkpoint(cache, config, state, model, averaged, optimiser), output / name)

    with stop_requested() as stop, _events(output) as events:
        while state.epoch < config.loop.epochs and not _patience_is_over(config, state):
            watch = LossWatch(device, state.loss_sum)
            began = time.perf_counter()
            model.train()
            seed, epoch = config.loop.seed, state.epoch
            order = order_of(epoch)[state.step :]
            parts = [parts_of(batch, config.loop.accumulate) for batch in order]
            matrices = draw_epoch(config.augment, cache.spec, len(train_rows), seed=seed, epoch=epoch)
            batches = epoch_batches(
                cache.photos,
                train_rows,
                targets[train_rows],
                list(chain.from_iterable(parts)),
                *matrices,
                size=training_size(
                    epoch, epochs=config.loop.epochs, size=cache.spec.size, first=config.loop.first_size
                ),
                device=device,
                channels_last=channels_last,
            )
            taken = 0
            for batch, shares in zip(order, parts, strict=True):
                watch.add(step(islice(batches, len(shares)), len(batch), rate_at(epoch * steps + state.step)))
                averaged.update(model)
                state.step += 1
                taken += len(batch)
                if watch.failed():
                    break
                observer.step(epoch + 1, state.step, steps)
                if stop.is_set():
                    save()
                    raise Interrupted(f"stopped in epoch {epoch + 1} after step {state.step} of {steps}")
            if not np.isfinite(watch.total()):
                save("failed.ckpt")
                kept = f"last.ckpt is of the end of epoch {epoch}, " if epoch else ""
                raise FastFundusError(
                    f"{output}: the loss of epoch {epoch + 1} is {watch.total()}, seen after step {state.step} of "
                    f"{steps}; lower optimiser.learning_rate and start again ({kept}failed.ckpt is of now)"
                )
            state.loss_sum = watch.total()
            train_s = time.perf_counter() - began
            rate = rate_at(epoch * steps + state.step - 1)
            result = _validate(cache, val_rows, targets, averaged, config, device, state, rate, taken / train_s, began)
            if result.best:
                about = {"config": config, "spec": cache.spec, "labels": OUTPUT_LABELS[config.task]}
                best = {"epoch": result.epoch, "auroc": result.val_auroc, "cache": cache.path}
                save_best(output, averaged.module, **about, **best)  # type: ignore[arg-type]
                state.best_auroc, state.best_epoch = result.val_auroc, result.epoch
            state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
            watch = LossWatch(device)
            state.history.append({name: getattr(result, name) for name in _METRICS})
            _write_metrics(output, state.history)
            for name in _METRICS[1:-1]:
                events.add_scalar(name, getattr(result, name), result.epoch)
            save()
            observer.epoch(result)
            if stop.is_set() and state.epoch < config.loop.epochs:
                raise Interrupted(f"stopped after epoch {state.epoch} of {config.loop.epochs}")
        if state.epoch < config.loop.epochs:
            observer.say(
                f"stopped after epoch {state.epoch}: no better validation AUROC since epoch {state.best_epoch} "
                f"(loop.patience is {config.loop.patience})"
            )
    return state.best_auroc


def _loss(config: TrainConfig, targets: NDArray[np.float64]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of the config; a weight of 0 is worked out from the training photos."""
    weight = config.loss.positive_weight or float((targets == 0).sum() / (targets == 1).sum())
    return partial(
        binary_loss,
        smoothing=config.loss.label_smoothing,
        gamma=config.loss.focal_gamma,
        positive_weight=weight,
    )


def _patience_is_over(config: TrainConfig, state: TrainState) -> bool:
    return 0 < config.loop.patience <= state.epoch - state.best_epoch


def _splits(
    cache: PhotoCache,
    rows: NDArray[np.int64],
    targets: NDArray[np.float64],
    config: TrainConfig,
    observer: Observer,
) -> pl.DataFrame:
    part = cache.manifest[rows]
    split = assign_splits(part, targets[rows], config.data, pair_positions(cache, rows))
    for note in split.notes:
        observer.say(f"note: {note}")
    return part.select("path", "sha256", "patient").with_columns(
        pl.Series("label", targets[rows]), pl.Series("split", split.names)
    )


def _layout(config: TrainConfig, channels_last: bool) -> str:
    numbers = f"{config.loop.amp_dtype} AMP" if config.loop.amp else "float32"
    return f"{numbers}, {'channels-last' if channels_last else 'channels-first'}"


def _compiles(config: TrainConfig, device: torch.device, observer: Observer) -> bool:
    if config.loop.compile == "auto" and device.type == "cpu":
        observer.say(
            "torch.compile is off: on a CPU it costs a minute and gained nothing when measured; loop.compile=on"
        )
        return False
    on = config.loop.compile != "off"
    observer.say(f"torch.compile is {'on: the first step takes a minute' if on else 'off by loop.compile'}")
    return on


def _validate(
    cache: PhotoCache,
    rows: NDArray[np.int64],
    targets: NDArray[np.float64],
    averaged: AveragedModel,
    config: TrainConfig,
    device: torch.device,
    state: TrainState,
    rate: float,
    images_per_s: float,
    began: float,
) -> EpochResult:
    logits = predict_logits(averaged.module, cache.photos, rows, cache.spec, amp=config.loop.amp, device=device)[
        :, 0
    ].astype(np.float64)
    auroc = float(roc_auc_score(targets[rows], logits))
    return EpochResult(
        epoch=state.epoch + 1,
        learning_rate=rate,
        train_loss=state.loss_sum / max(1, state.step),
        val_loss=float(log_loss(targets[rows], 1 / (1 + np.exp(-logits)))),
        val_auroc=auroc,
        images_per_s=images_per_s,
        seconds=time.perf_counter() - began,
        best=auroc > state.best_auroc,
    )


def _begin(output: Path, config: TrainConfig, splits: pl.DataFrame, device: torch.device) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(to_toml(config.to_dict()))
    (output / "environment.json").write_text(json.dumps(describe_environment(device), indent=1) + "\n")
    splits.write_parquet(output / "splits.parquet")


def _write_metrics(output: Path, history: list[dict[str, float]]) -> None:
    with (output / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _METRICS)
        writer.writeheader()
        writer.writerows(history)


@contextmanager
def _events(output: Path) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside tensorboard's own protobuf code
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(output))
    try:
        yield writer
    finally:
        writer.close()
