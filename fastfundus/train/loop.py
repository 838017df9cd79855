"""The training loop, readable from top to bottom: problem, model, epochs, validation, checkpoints, resume."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.config import TrainConfig, to_toml
from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import side_counts
from fastfundus.errors import CheckpointError, ConfigError, FastFundusError
from fastfundus.files import replaced
from fastfundus.models.classifier import set_training, uses_channels_last
from fastfundus.train.ancestry import note_ancestry
from fastfundus.train.checkpoint import TrainState, checkpoint, restore, save_atomically
from fastfundus.train.distributed import World, limit_threads
from fastfundus.train.feed import balanced_order, epoch_order, parts_of
from fastfundus.train.interrupt import Interrupted, stop_requested
from fastfundus.train.observer import EpochResult, Observer
from fastfundus.train.overlap import Overlap, measure_overlap
from fastfundus.train.plan import memory_warnings, room_for_photos
from fastfundus.train.precision import resolve_precision
from fastfundus.train.problem import Batch, Grading, Problem
from fastfundus.train.run import describe_environment, run_file, save_best
from fastfundus.train.schedule import learning_rate
from fastfundus.train.step import AveragedModel, TrainStep, build_optimiser
from fastfundus.train.vessels import VesselMaps
from fastfundus.train.watch import LossWatch

__all__ = ["Interrupted", "problem_of", "train"]


def problem_of(cache: PhotoCache, config: TrainConfig, observer: Observer) -> Problem:
    """What a config learns from a cache; raises as `train`."""
    kind = VesselMaps if config.task == "vessels" else Grading
    return kind(cache, config, observer.say)


def train(
    cache: PhotoCache,
    output: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    observer: Observer | None = None,
    world: World | None = None,
) -> float:
    """Train a model on a cache and leave a run folder.

    Args:
        cache: the photos.
        output: the run folder; must not hold a run unless `resume`.
        config: the run's configuration.
        resume: go on from `last.ckpt`; on a CPU the result is bit for bit that of a run without a stop.
        device: None takes the GPU if there is one.
        observer: hears of progress.
        world: the processes that train together, from `distributed.joined`; None trains alone.

    Returns:
        The best score on validation.

    Raises:
        DataError: the labels or patients do not allow training.
        ConfigError: settings do not fit the labels, or each other.
        CheckpointError: `output` holds a run, or resuming does not fit.
        Interrupted: SIGINT or SIGTERM came; `last.ckpt` was written.
    """
    world = world or World()
    observer = observer if observer and world.leads else Observer()
    device = torch.device(device) if device else world.device()
    if (output / "last.ckpt").exists() and not resume:
        raise CheckpointError(f"{output}: holds a run already; add --resume to go on, or choose another --output")
    if resume and not (output / "last.ckpt").exists():
        raise CheckpointError(f"{output}: has no last.ckpt to resume; leave --resume away to start")
    limit_threads()
    config, precision = _with_precision(output, config, resume, device, world)
    problem = problem_of(cache, config, observer)
    sides = [f"{name} {count}" for name, count in side_counts(problem.splits["split"]).items()]
    observer.say(
        f"learning {problem.told}: {len(problem.splits)} of {len(cache.manifest)} photos are ok and labelled; "
        f"{', '.join(sides)}; {problem.splits['patient'].n_unique()} patients"
    )

    torch.manual_seed(config.loop.seed)
    model, init = problem.create(config.model)
    channels_last = uses_channels_last(config.loop.channels_last, model)
    model = model.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    set_training(model, freeze=config.model.freeze)
    optimiser = build_optimiser(model, config.optimiser)
    averaged = AveragedModel(model, config.optimiser.ema_decay)
    # Dropout differs between processes; the first weights do not.
    torch.manual_seed(config.loop.seed + world.rank)
    state = TrainState()
    if resume:
        state = restore(output, cache, config, problem.splits, model, averaged, optimiser, world)
        observer.say(f"resuming after epoch {state.epoch}, step {state.step}")
    else:
        world.wait()
        if world.leads:
            _begin(output, config, problem, device, observer)
        observer.say(f"{config.model.backbone} {init}; {'channels-last' if channels_last else 'channels-first'}")
    observer.say(f"training in {precision}")
    mode = _compile_mode(config, device, world, observer)
    # One graph for each size of the photos, rather than one for any size.
    compiled: Any = model if mode == "off" else torch.compile(
        model, fullgraph=True, dynamic=False, mode="reduce-overhead" if mode == "graphs" else "default"
    )  # fmt: skip
    step = TrainStep(
        model, world.spread(model, compiled), optimiser, config.loop, problem.loss(device),
        clip_norm=config.optimiser.clip_norm, device=device, world=world, graphs=mode == "graphs",
    )  # fmt: skip
    if resume:
        step.scaler.load_state_dict(state.scaler)
    together = config.loop.batch_size * config.loop.accumulate

    def order_of(epoch: int) -> list[NDArray[np.int64]]:
        if config.loop.sampler == "balanced":
            return balanced_order(problem.strata, together, seed=config.loop.seed, epoch=epoch)
        return epoch_order(len(problem.strata), together, seed=config.loop.seed, epoch=epoch)

    steps = len(order_of(0))
    total, warmup = steps * config.loop.epochs, round(steps * config.optimiser.warmup_epochs)

    def rate_at(number: int) -> float:
        return learning_rate(number, peak=config.optimiser.learning_rate, warmup=warmup, total=total)

    def save(name: str = "last.ckpt") -> None:
        state.loss_sum, state.scaler = sum(world.gather(watch.total())), step.scaler.state_dict()
        state.rng = world.gather(torch.get_rng_state())
        if world.leads:
            save_atomically(checkpoint(cache, config, state, model, averaged, optimiser), output / name)

    for warning in memory_warnings(config, model, cache.spec.size, device):
        observer.say(warning)
    room = room_for_photos(config, model, cache.spec.size, device)
    if problem.load(device, room):
        observer.say("the training photos lie in the GPU's memory")
    speed = Overlap()
    with stop_requested() as stop, _events(output) if world.leads else nullcontext() as events:
        while state.epoch < config.loop.epochs and not _patience_is_over(config, state):
            # Of a resumed epoch, rank 0 takes over what all had summed.
            watch = LossWatch(device, state.loss_sum if world.leads else 0.0)
            set_training(model, freeze=config.model.freeze)
            epoch = state.epoch
            order = order_of(epoch)[state.step :]
            parts = [parts_of(world.share(batch), config.loop.accumulate) for batch in order]
            batches: Iterator[Batch] = problem.batches(list(chain.from_iterable(parts)), epoch, device)
            if not channels_last:
                batches = _channels_first(batches)
            began, taken = time.perf_counter(), 0
            for batch, shares in zip(order, parts, strict=True):
                rate = rate_at(epoch * steps + state.step)
                watch.add(step(islice(batches, len(shares)), len(batch), rate, pieces=len(shares)))
                averaged.update(model)
                state.step += 1
                taken += len(batch)
                observer.step(epoch + 1, state.step, steps)
                failed, stopping = world.any(watch.failed(), stop.is_set())
                if failed:
                    break
                if stopping:
                    save()
                    raise Interrupted(f"stopped in epoch {epoch + 1} after step {state.step} of {steps}")
            state.loss_sum = sum(world.gather(watch.total()))
            if not math.isfinite(state.loss_sum):
                save("failed.ckpt")
                kept = f"last.ckpt is of the end of epoch {epoch}, " if epoch else ""
                raise FastFundusError(
                    f"{output}: the loss of epoch {epoch + 1} is {state.loss_sum}, seen after step {state.step} of "
                    f"{steps}; lower optimiser.learning_rate and start again ({kept}failed.ckpt is of now)"
                )
            speed.epoch(time.perf_counter() - began, steps=len(order), photos=taken)
            val_loss, scores = problem.validate(averaged.module, device, world)
            score = scores[problem.chooses]
            result = EpochResult(
                epoch=epoch + 1,
                learning_rate=rate_at(epoch * steps + state.step - 1),
                train_loss=state.loss_sum / state.step,
                val_loss=val_loss,
                scores=scores,
                images_per_s=speed.images_per_s,
                seconds=time.perf_counter() - began,
                # A score that cannot be estimated is no better than any other.
                best=score > state.best_score or not math.isfinite(state.best_score) or state.best_epoch == 0,
            )
            if result.best:
                state.best_score, state.best_epoch = score, result.epoch
                if world.leads:
                    save_best(
                        output, averaged.module, config=config, spec=cache.spec, labels=problem.outputs,
                        caches=cache.paths, epoch=result.epoch, score=(problem.chooses, score),
                    )  # fmt: skip
            state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
            watch = LossWatch(device)
            state.history.append(result.line())
            if events is not None:
                _record(output, state.history, events)
            save()
            observer.epoch(result)
            (stopping,) = world.any(stop.is_set())
            if stopping and state.epoch < config.loop.epochs:
                raise Interrupted(f"stopped after epoch {state.epoch} of {config.loop.epochs}")
        if state.epoch < config.loop.epochs:
            observer.say(
                f"stopped after epoch {state.epoch}: no better validation {problem.chooses} since epoch "
                f"{state.best_epoch} (loop.patience is {config.loop.patience})"
            )
        if speed.images_per_s:

            def one_step(batch: Batch) -> None:
                step([batch], len(batch[0]) * world.size, 0.0)
                averaged.update(model)

            # Rank 0's clock decides how often, or processes would wait for each other.
            speed.step_s = world.gather(speed.step_s)[0]
            first = parts_of(world.share(order_of(epoch)[0]), config.loop.accumulate)
            with closing(problem.batches(first[:1], epoch, device)) as again:
                batch_again = next(again if channels_last else _channels_first(again))
            measure_overlap(one_step, batch_again, speed, processes=world.size)
            observer.say(speed.told(device))
    return state.best_score


def _with_precision(
    output: Path, config: TrainConfig, resume: bool, device: torch.device, world: World
) -> tuple[TrainConfig, str]:
    """Make the precision definite: that of the run that is resumed, else what rank 0's device computes fastest."""
    if resume and config.loop.amp == "auto":
        kept = TrainConfig.from_toml(output / "config.toml").loop
        config = replace(config, loop=replace(config.loop, amp=kept.amp, amp_dtype=kept.amp_dtype))
    loop, described = world.gather(resolve_precision(config.loop, device))[0]
    return replace(config, loop=loop), described


def _patience_is_over(config: TrainConfig, state: TrainState) -> bool:
    return 0 < config.loop.patience <= state.epoch - state.best_epoch


def _channels_first(batches: Iterator[Batch]) -> Iterator[Batch]:
    for inputs, truth in batches:
        yield inputs.contiguous(), truth


def _compile_mode(config: TrainConfig, device: torch.device, world: World, observer: Observer) -> str:
    mode = config.loop.compile
    if mode == "graphs" and device.type == "cpu":
        raise ConfigError('loop.compile is "graphs", which needs a GPU; use "on", "off" or "auto"')
    if mode == "auto" and device.type == "cpu":
        observer.say(
            "torch.compile is off: on a CPU it costs a minute and gained nothing when measured; loop.compile=on"
        )
        return "off"
    if mode == "auto":
        # Gradients that are exchanged while the backward pass runs do not go into a CUDA graph.
        mode = "graphs" if world.size == 1 and config.loop.accumulate == 1 else "on"
    observer.say(f"torch.compile is {'off by loop.compile' if mode == 'off' else 'on: the first step takes a minute'}")
    return mode


def _begin(output: Path, config: TrainConfig, problem: Problem, device: torch.device, observer: Observer) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with replaced(output / "config.toml") as partial:
        partial.write_text(to_toml(config.to_dict()))
    with replaced(output / "environment.json") as partial:
        partial.write_text(json.dumps(describe_environment(device), indent=1) + "\n")
    with replaced(output / "splits.parquet") as partial:
        problem.splits.write_parquet(partial)
    known = note_ancestry(output, config.model.init, problem.splits)
    if known:
        observer.say(
            f"WARNING: {known} test photos were learned from by {config.model.init}, where this run starts: its "
            "results will be too good; keep patients apart: fastfundus cache split --holdout"
        )


def _record(output: Path, history: list[dict[str, float]], events: Any) -> None:
    """Write metrics.csv, and the last epoch for TensorBoard."""
    with run_file(output / "metrics.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    for name, value in history[-1].items():
        if name not in ("epoch", "seconds"):
            events.add_scalar(name, value, history[-1]["epoch"])


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
