"""Train a model on a photo cache, calibrate it, and measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.journal import locked
from fastfundus.data.split import SIDES
from fastfundus.errors import ConfigError
from fastfundus.evaluation.folds import pool_folds
from fastfundus.evaluation.locked_run import is_locked, read_operating_point
from fastfundus.evaluation.operating_point import fit_operating_point
from fastfundus.evaluation.page import write_run_page
from fastfundus.photo.memory import keep_memory
from fastfundus.training.distributed import World, join_processes, was_restarted
from fastfundus.training.observer import Observer
from fastfundus.training.run import Run
from fastfundus.training.trainer import Trainer
from fastfundus.workflow.inputs import open_any_caches

__all__ = ["ThresholdTargets", "read_recipe", "train", "train_folds", "train_run"]


@dataclass(frozen=True, slots=True)
class ThresholdTargets:
    """Target for the selection of thresholds on validation."""

    sensitivity: float = 0.90
    specificity: float | None = None
    """Takes precedence over the sensitivity."""


def read_recipe(name: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a configuration that comes with FastFundus.

    Args:
        name: one of `fastfundus.recipes.RECIPES`.
        overrides: values that take precedence, by dotted name, such as {"loop.epochs": 3}.

    Raises:
        ConfigError: a value is invalid.
    """
    with resources.as_file(resources.files("fastfundus.recipes") / f"{name}.toml") as file:
        return TrainConfig.from_toml(file, overrides)


def train(
    caches: str | Path | PhotoCache | Sequence[str | Path],
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    folds: int | None = None,
    resume: bool = False,
    targets: ThresholdTargets | None = None,
    observer: Observer | None = None,
) -> Run | list[Run]:
    """Train a model, fit its temperature and thresholds on validation, and measure it once on the test patients.

    Args:
        caches: one cache, opened or not, or several to train on together.
        output: the run folder; with `folds`, a folder for one run per fold.
        config: configuration; None uses the defaults. It must be None when resuming: a run keeps its own.
        folds: train this many folds one after the other and pool their predictions.
        resume: continue an interrupted run.
        targets: target for the selection of thresholds.
        observer: receives progress callbacks.

    Returns:
        The run, or with `folds` the runs.

    Raises:
        DataError: the labels or patients do not allow training.
        ConfigError: settings do not match the labels, or each other.
        CheckpointError: `output` already contains a run, or cannot be resumed.
        Interrupted: SIGINT or SIGTERM was received; the run can be resumed.

    Example:
        >>> run = fastfundus.train("cache/", "run/", TrainConfig.from_dict({"model": {"backbone": "resnet18"}}))
    """
    cache, folder, seen = open_any_caches(caches), Path(output), observer or Observer()
    started = folder / "fold0" if folds else folder
    if resume:
        if config is not None:
            raise ConfigError("config cannot change when resuming; omit it, or start a new run")
        config = TrainConfig.from_run(started)
        if folds and config.data.folds != folds:
            raise ConfigError(f"{folder} was started with {config.data.folds} folds, not {folds}; give the same number")
    config = config or TrainConfig()
    # Processes that torchrun restarts run the same call again; the run knows where to continue.
    resume = resume or (was_restarted() and (started / "last.ckpt").is_file())
    with join_processes() as world:
        options: dict[str, Any] = {"resume": resume, "targets": targets, "world": world}
        if folds is None:
            train_run(cache, folder, config, observer=seen, **options)
            world.wait()
            return Run.open(folder)
        train_folds(cache, folder, config, folds, observers=lambda name: seen, **options)
        world.wait()
        return [Run.open(folder / f"fold{number}") for number in range(folds)]


def train_run(
    cache: PhotoCache,
    folder: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    targets: ThresholdTargets | None = None,
    observer: Observer | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train one run; see `train`.

    Args:
        cache: the photos.
        folder: the run folder.
        config: configuration.
        resume: continue an interrupted run.
        targets: target for the selection of thresholds.
        observer: receives progress callbacks.
        world: the processes that train together.

    Returns:
        The content of operating_point.json in the leading process, nothing in the others.
    """
    # Batches need megabytes of fresh memory each; page faults would cost as much as filling it.
    keep_memory()
    world, targets = world or World(), targets or ThresholdTargets()
    # Two trainings in one folder would mix the settings of one with the weights of the other.
    with locked(folder, folder.with_name(folder.name + ".lock"), "trained into") if world.leads else nullcontext():
        Trainer(cache, folder, config, resume=resume, observer=observer, world=world).fit()
        return _finish_run(cache, folder, targets, observer, resume) if world.leads else {}


def _finish_run(
    cache: PhotoCache, folder: Path, targets: ThresholdTargets, observer: Observer | None, resume: bool
) -> dict[str, Any]:
    say = (observer or Observer()).say
    if resume and is_locked(folder):
        # Whoever chose thresholds again after seeing the test results would fit them to the test patients.
        document = read_operating_point(Run.open(folder))
        say("the run is finished: its thresholds are locked and its test patients measured; nothing was changed")
        return document
    say("fitting temperatures, thresholds and the guard on validation; measuring on test")
    run = Run.open(folder)
    document = fit_operating_point(
        run, cache, target_sensitivity=targets.sensitivity, target_specificity=targets.specificity
    )
    if document.get("guard", {}).get("note"):
        say(f"note: {document['guard']['note']}")
    write_run_page(run, cache)
    return document


def train_folds(
    cache: PhotoCache,
    folder: Path,
    config: TrainConfig,
    folds: int,
    *,
    resume: bool = False,
    targets: ThresholdTargets | None = None,
    observers: Callable[[str], Observer] = lambda name: Observer(),
    world: World | None = None,
) -> dict[str, Any]:
    """Train one run per fold into fold0, fold1, ..., and pool the predictions for every photo; see `train`.

    Args:
        cache: the photos.
        folder: folder of the runs.
        config: configuration; its fold settings are replaced.
        folds: number of folds.
        resume: continue: completed folds are kept.
        targets: target for the selection of thresholds.
        observers: called with the name of each fold that is trained, returns its observer.
        world: the processes that train together.

    Returns:
        The pooled metrics, the content of folds.json, in the leading process; nothing in the others.

    Raises:
        ConfigError: the split is fixed already.
    """
    world = world or World()
    if config.data.split_file or set(SIDES) & set(cache.manifest["split"].to_list()):
        raise ConfigError(
            "--folds assigns patients to folds, but the label file or data.split_file fixes a split; omit one of them"
        )
    for number in range(folds):
        fold = folder / f"fold{number}"
        # One process decides for all: the one that writes the file.
        if world.gather(resume and is_locked(fold))[0]:
            continue
        part = replace(config, data=replace(config.data, split="folds", folds=folds, fold=number))
        observer = observers(f"fold {number} of {folds}") if world.leads else Observer()
        resumed = resume and (fold / "last.ckpt").is_file()
        train_run(cache, fold, part, resume=resumed, targets=targets, observer=observer, world=world)
    if not world.leads:
        return {}
    return pool_folds(folder, [Run.open(folder / f"fold{number}") for number in range(folds)], cache)
