"""The trainer: one model, trained in epochs of steps, validated after each, and saved so that it can resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import side_counts
from fastfundus.errors import CheckpointError, FastFundusError
from fastfundus.models.classifier import set_training, uses_channels_last
from fastfundus.training.checkpoint import TrainState, device_rng, make_checkpoint, restore_checkpoint, save_checkpoint
from fastfundus.training.compilation import compile_mode, compile_model
from fastfundus.training.distributed import World, limit_threads
from fastfundus.training.interrupt import Interrupted, stop_requested
from fastfundus.training.loader import balanced_order, epoch_order, split_batch
from fastfundus.training.memory import free_gpu_bytes, memory_warnings
from fastfundus.training.metrics import MetricsWriter, RunningLoss, Throughput, measure_resident_throughput
from fastfundus.training.observer import EpochResult, Observer
from fastfundus.training.optimizer import AveragedModel, build_optimizer, peak_rate
from fastfundus.training.precision import depthwise_in_float32
from fastfundus.training.run import begin_run, save_best
from fastfundus.training.schedule import learning_rate
from fastfundus.training.settings import resolve_settings, settings_of_run
from fastfundus.training.step import TrainStep
from fastfundus.training.tasks.base import Batch
from fastfundus.training.tasks.registry import create_task

__all__ = ["Interrupted", "Trainer"]


class Trainer:
    """Trains a model on a cache and writes a run folder.

    Args:
        cache: photos, labels and, if fixed, their split.
        output: the run folder; it must not contain a run unless `resume` is set.
        config: configuration of the run.
        resume: continue from `last.ckpt`. On a CPU the result equals that of an uninterrupted run bit for bit.
        device: device to train on; None selects the GPU if there is one.
        observer: receives progress callbacks.
        world: the processes that train together, from `distributed.join_processes`; None trains in this process alone.

    Raises:
        DataError: the labels or patients do not allow training.
        ConfigError: settings do not match the labels, or each other.
        CheckpointError: `output` already contains a run, or cannot be resumed with these settings and photos.
    """

    def __init__(
        self,
        cache: PhotoCache,
        output: Path,
        config: TrainConfig,
        *,
        resume: bool = False,
        device: torch.device | str | None = None,
        observer: Observer | None = None,
        world: World | None = None,
    ) -> None:
        if (output / "last.ckpt").exists() and not resume:
            raise CheckpointError(
                f"{output} already contains a run; add --resume to continue it, or choose another --output"
            )
        if resume and not (output / "last.ckpt").exists():
            raise CheckpointError(f"{output} has no last.ckpt to resume from; omit --resume to start a new run")
        self.cache, self.output, self.world = cache, output, world or World()
        self.observer = observer if observer and self.world.leads else Observer()
        self.device = torch.device(device) if device else self.world.device()
        self.state, self.throughput = TrainState(), Throughput()
        self.running_loss = RunningLoss(self.device)
        limit_threads()
        self.config, notes = self._resolve(config, resume)
        self.task = create_task(cache, self._task_config(resume), self.observer.say)
        counts = ", ".join(f"{name} {count}" for name, count in side_counts(self.task.splits["split"]).items())
        self.observer.say(
            f"learning {self.task.summary}: {len(self.task.splits)} of {len(cache.manifest)} photos are ok and "
            f"labelled; {counts}; {self.task.splits['patient'].n_unique()} patients"
        )
        self._build_model(resume)
        if resume:
            self.resume()
        else:
            self._begin()
        self.task.spec = replace(cache.spec, mean=self.state.mean, std=self.state.std)
        for note in notes:
            self.observer.say(note)
        self._build_step()

    def _resolve(self, config: TrainConfig, resume: bool) -> tuple[TrainConfig, list[str]]:
        """Make automatic settings definite: those of the resumed run, else what suits rank 0's machine and weights."""
        if resume:
            return settings_of_run(config, self.output, self.device)
        return self.world.gather(resolve_settings(config, self.device))[0]

    def _task_config(self, resume: bool) -> TrainConfig:
        """Return the configuration for the task: a resumed run keeps its split, whatever deals patients by now."""
        if not resume:
            return self.config
        file = str(self.output / "splits.parquet")
        return replace(self.config, data=replace(self.config.data, split_file=file, label_fraction=1.0))

    def _build_model(self, resume: bool) -> None:
        config = self.config
        torch.manual_seed(config.loop.seed)
        # A resumed run has its weights in its checkpoint; their source may be gone.
        initial = replace(config.model, init="scratch") if resume else config.model
        model, self.init = self.task.create(initial)
        if self.device.type == "cpu":
            depthwise_in_float32(model)
        self.channels_last = uses_channels_last(config.loop.channels_last, model)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=layout)
        set_training(self.model, freeze=config.model.freeze)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.averaged = AveragedModel(self.model, config.optimizer.ema_decay)
        # The initial weights are the same in every process; dropout is not.
        torch.manual_seed(config.loop.seed + self.world.rank)

    def _begin(self) -> None:
        self.state.mean, self.state.std = self.init.normalisation.mean, self.init.normalisation.std
        self.state.provenance = self.init.provenance()
        self.world.wait()
        if self.world.leads:
            begin_run(self.output, self.config, self.task.splits, self.device, self.observer.say)
        layout = "channels-last" if self.channels_last else "channels-first"
        self.observer.say(f"{self.config.model.backbone} {self.init}; {layout}")

    def _build_step(self) -> None:
        config, world = self.config, self.world
        mode = compile_mode(config.loop, self.device, world, self.observer.say)
        self.step = TrainStep(
            self.model,
            world.spread(self.model, compile_model(self.model, mode)),
            self.optimizer,
            config.loop,
            self.task.loss(self.device),
            clip_norm=config.optimizer.clip_norm,
            device=self.device,
            world=world,
            graphs=mode == "graphs",
        )
        if self.state.scaler:
            self.step.scaler.load_state_dict(self.state.scaler)
        self.steps = len(self.epoch_batches(0))
        for warning in memory_warnings(config, self.model, self.cache.spec.size, self.device):
            self.observer.say(warning)
        if self.task.load(self.device, free_gpu_bytes(config, self.model, self.cache.spec.size, self.device)):
            self.observer.say("the training photos are in GPU memory")

    def resume(self) -> None:
        """Restore model, optimizer, averaged weights, random numbers and position from `last.ckpt`."""
        self.state = restore_checkpoint(
            self.output,
            self.cache,
            self.config,
            self.task.splits,
            self.model,
            self.averaged,
            self.optimizer,
            self.world,
        )
        self.observer.say(f"resuming after epoch {self.state.epoch}, step {self.state.step}")

    def save(self, name: str = "last.ckpt") -> None:
        """Write everything that resuming needs, atomically; every process must call this."""
        state, world = self.state, self.world
        state.loss_sum, state.scaler = sum(world.gather(self.running_loss.total())), self.step.scaler.state_dict()
        state.rng = world.gather(torch.get_rng_state())
        state.device_rng = world.gather(device_rng(world.device()))
        if world.leads:
            checkpoint = make_checkpoint(self.cache, self.config, state, self.model, self.averaged, self.optimizer)
            save_checkpoint(checkpoint, self.output / name)

    def fit(self) -> float:
        """Train to the last epoch, or until patience runs out.

        Returns:
            The best validation score.

        Raises:
            Interrupted: SIGINT or SIGTERM was received; `last.ckpt` was written.
            FastFundusError: the loss is not finite; `failed.ckpt` was written.
        """
        state, epochs = self.state, self.config.loop.epochs
        with stop_requested() as stop, MetricsWriter(self.output) if self.world.leads else nullcontext() as writer:
            while state.epoch < epochs and not self._out_of_patience():
                began = time.perf_counter()
                self.train_epoch(stop)
                result = self.validate(began)
                state.history.append(result.line())
                if writer is not None:
                    writer.write(state.history)
                self.save()
                self.observer.epoch(result)
                (stopping,) = self.world.any(stop.is_set())
                if stopping and state.epoch < epochs:
                    raise Interrupted(f"stopped after epoch {state.epoch} of {epochs}")
            if state.epoch < epochs:
                self.observer.say(
                    f"stopped after epoch {state.epoch}: validation {self.task.selection_metric} has not improved "
                    f"since epoch {state.best_epoch} (loop.patience is {self.config.loop.patience})"
                )
            self._report_throughput()
        return state.best_score

    def train_epoch(self, stop: Event) -> None:
        """Take the remaining steps of the current epoch.

        Args:
            stop: set when the run should be saved and interrupted after the current step.
        """
        state, epoch, accumulate = self.state, self.state.epoch, self.config.loop.accumulate
        # On resume, rank 0 continues the sum over all processes.
        self.running_loss = RunningLoss(self.device, state.loss_sum if self.world.leads else 0.0)
        set_training(self.model, freeze=self.config.model.freeze)
        order = self.epoch_batches(epoch)[state.step :]
        parts = [split_batch(self.world.share(batch), accumulate) for batch in order]
        batches = self._batches(list(chain.from_iterable(parts)), epoch)
        began, photos = time.perf_counter(), 0
        for batch, shares in zip(order, parts, strict=True):
            self.train_step(islice(batches, len(shares)), len(batch), len(shares))
            photos += len(batch)
            failed, stopping = self.world.any(self.running_loss.failed(), stop.is_set())
            if failed:
                break
            if stopping:
                self.save()
                raise Interrupted(f"stopped in epoch {epoch + 1} after step {state.step} of {self.steps}")
        state.loss_sum = sum(self.world.gather(self.running_loss.total()))
        if not math.isfinite(state.loss_sum):
            self._fail()
        self.throughput.epoch(time.perf_counter() - began, steps=len(order), photos=photos)

    def train_step(self, parts: Iterator[Batch], count: int, pieces: int) -> None:
        """Take one step.

        Args:
            parts: parts of this process's share of the batch, whose gradients are accumulated.
            count: number of photos of the batch, over all processes.
            pieces: number of these parts.
        """
        state = self.state
        self.running_loss.add(self.step(parts, count, self.rate(state.epoch * self.steps + state.step), pieces=pieces))
        self.averaged.update(self.model)
        state.step += 1
        self.observer.step(state.epoch + 1, state.step, self.steps)

    def validate(self, began: float) -> EpochResult:
        """Validate the averaged weights, keep them if they are the best so far, and advance to the next epoch.

        Args:
            began: `time.perf_counter` at the start of the epoch.
        """
        state, metric = self.state, self.task.selection_metric
        val_loss, scores = self.task.validate(self.averaged.module, self.world)
        score = scores[metric]
        result = EpochResult(
            epoch=state.epoch + 1,
            learning_rate=self.rate(state.epoch * self.steps + state.step - 1),
            train_loss=state.loss_sum / state.step,
            val_loss=val_loss,
            scores=scores,
            images_per_s=self.throughput.images_per_s,
            seconds=time.perf_counter() - began,
            # While no score could be estimated, the latest epoch counts as the best.
            best=score > state.best_score or not math.isfinite(state.best_score) or state.best_epoch == 0,
        )
        if result.best:
            state.best_score, state.best_epoch = score, result.epoch
            if self.world.leads:
                save_best(
                    self.output,
                    self.task.state(self.averaged.module),
                    config=self.config,
                    spec=self.task.spec,
                    provenance=state.provenance,
                    labels=self.task.outputs,
                    caches=self.cache.paths,
                    epoch=result.epoch,
                    score=(metric, score),
                )
        state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
        self.running_loss = RunningLoss(self.device)
        return result

    def epoch_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the batches of an epoch, over all processes, as positions of training examples."""
        loop, strata = self.config.loop, self.task.strata
        together = loop.batch_size * loop.accumulate
        if loop.sampler == "balanced":
            return balanced_order(strata, together, seed=loop.seed, epoch=epoch)
        return epoch_order(len(strata), together, seed=loop.seed, epoch=epoch)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the whole run."""
        config = self.config.optimizer
        total, warmup = self.steps * self.config.loop.epochs, round(self.steps * config.warmup_epochs)
        return learning_rate(step, peak=peak_rate(config), warmup=warmup, total=total)

    def _batches(self, parts: list[NDArray[np.int64]], epoch: int) -> Iterator[Batch]:
        batches = self.task.batches(parts, epoch, self.device)
        # The kernels write channels-last.
        return batches if self.channels_last else ((inputs.contiguous(), truth) for inputs, truth in batches)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.loop.patience <= self.state.epoch - self.state.best_epoch

    def _fail(self) -> None:
        state, epoch = self.state, self.state.epoch
        self.save("failed.ckpt")
        kept = f"last.ckpt is from the end of epoch {epoch}, " if epoch else ""
        raise FastFundusError(
            f"{self.output}: the loss of epoch {epoch + 1} is {state.loss_sum}, detected after step {state.step} of "
            f"{self.steps}; reduce optimizer.learning_rate and start again ({kept}failed.ckpt is the present state)"
        )

    def _report_throughput(self) -> None:
        """Measure the step alone on a resident batch, and report what data loading costs."""
        if not self.throughput.images_per_s:
            return

        def one_step(batch: Batch) -> None:
            self.step([batch], len(batch[0]) * self.world.size, 0.0)
            self.averaged.update(self.model)

        # Rank 0's clock decides the number of steps, or processes would wait for each other.
        self.throughput.step_s = self.world.gather(self.throughput.step_s)[0]
        epoch = self.state.epoch - 1
        first = split_batch(self.world.share(self.epoch_batches(epoch)[0]), self.config.loop.accumulate)
        with closing(self.task.batches(first[:1], epoch, self.device)) as batches:
            inputs, truth = next(batches)
            batch = (inputs if self.channels_last else inputs.contiguous(), truth)
        measure_resident_throughput(one_step, batch, self.throughput, processes=self.world.size)
        self.observer.say(self.throughput.summary(self.device))
