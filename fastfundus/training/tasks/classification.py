"""Tasks with one answer per photo: abnormality, multiclass, multilabel, ordinal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.config import ModelConfig, TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.errors import ConfigError, DataError
from fastfundus.models.activation import ACTIVATIONS, probabilities
from fastfundus.models.classifier import create_model, first_outputs, set_prior
from fastfundus.models.initial import InitReport
from fastfundus.training.augment import draw_epoch
from fastfundus.training.distributed import World
from fastfundus.training.loader import PhotoLoader, prefetch
from fastfundus.training.metrics import validation_scores
from fastfundus.training.precision import autocast_dtype
from fastfundus.training.predict import predict_logits
from fastfundus.training.schedule import training_size
from fastfundus.training.tasks.base import Batch, assign_split
from fastfundus.training.tasks.losses import LOSSES, binary_loss, known_labels, prior_bias, rarity_weight
from fastfundus.training.tasks.targets import finding_outputs, read_auxiliary, read_targets, usable_rows

__all__ = ["ClassificationTask"]


class ClassificationTask:
    """Tasks with one answer per photo: abnormality, multiclass, multilabel, ordinal.

    Args:
        cache: the photos.
        config: configuration of the run.
        say: receives notes for the user.

    Raises:
        DataError: labels or patients are not sufficient for training.
        ConfigError: settings do not match the labels.
    """

    def __init__(self, cache: PhotoCache, config: TrainConfig, say: Callable[[str], None]) -> None:
        targets = read_targets(cache.manifest, config.task, config.data.labels)
        finding_outputs(targets.outputs, config.data.findings)
        rows = usable_rows(cache.manifest, targets)
        if not len(rows):
            raise DataError(
                "no photo has both status ok and a label; check these columns of the manifest", path=cache.path
            )
        self._cache, self._config, self._kind, self.spec = cache, config, ACTIVATIONS[config.task], cache.spec
        self.outputs, self.summary = targets.outputs, targets.summary
        auxiliary, names = read_auxiliary(cache.manifest, config.data.auxiliary, used=targets.outputs)
        if names:
            self.summary += f" (and, in training only, {', '.join(names)})"
        self.selection_metric = "qwk" if config.task == "ordinal" else "auroc"
        truth, strata = targets.truth[rows], targets.strata[rows]
        columns = dict(zip(targets.outputs, truth.T, strict=True))
        self.splits = assign_split(cache, rows, strata, config, columns, say)
        train, val = ((self.splits["split"] == name).to_numpy() for name in ("train", "val"))
        self._rows, self._truth, self.strata = rows[train], truth[train], strata[train]
        self._auxiliary = auxiliary[self._rows]
        self._val_rows, self._val_truth = rows[val], truth[val]
        for name, column in zip(targets.outputs, self._truth.T, strict=True):
            if not (column == 1).any():
                say(f"note: no training photo is labelled {name!r}; this output cannot be learned")

    def create(self, config: ModelConfig) -> tuple[nn.Module, InitReport]:
        """Build the network."""
        count = len(self.outputs) + self._auxiliary.shape[1]
        model, init = create_model(config, count, size=self._cache.spec.size)
        if init.fresh or init.source == "scratch":
            set_prior(model, torch.from_numpy(self._prior()))
        first = self._config.loop.first_size
        if first < 1 and hasattr(model, "patch_embed"):
            raise ConfigError(
                f"loop.first_size is {first}, but {config.backbone} accepts only one photo size; set it to 1"
            )
        return model, init

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of the network, without the outputs of auxiliary labels."""
        return first_outputs(model, len(self.outputs)) if self._auxiliary.size else model.state_dict()

    def _prior(self) -> NDArray[np.float32]:
        own, auxiliary = prior_bias(self._truth, self._kind), prior_bias(self._auxiliary, "sigmoid")
        # Weights and a balanced sampler make rare outputs as frequent as others.
        if self._config.loss.positive_weight != 1 or self._config.loop.sampler == "balanced":
            own = np.zeros_like(own)
        return np.concatenate([own, auxiliary])

    def loss(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss of the head; a weight of 0 is replaced by one computed from the training photos."""
        config = self._config.loss
        weight: Tensor | float = config.positive_weight
        if weight == 0:
            weight = torch.from_numpy(rarity_weight(self._truth, self._kind)).to(device)
        elif self._kind == "softmax" and weight != 1:
            raise ConfigError(f"loss.positive_weight is {weight}, but classes have no positive label; set it to 0 or 1")
        own = partial(
            LOSSES[self._kind],
            smoothing=config.label_smoothing,
            gamma=config.focal_gamma,
            weight=weight,
            known=known_labels(self._truth, self._kind),
        )
        if not self._auxiliary.size:
            return own
        known, count = known_labels(self._auxiliary, "sigmoid"), len(self.outputs)

        def both(logits: Tensor, truth: Tensor) -> Tensor:
            auxiliary = binary_loss(logits[:, count:], truth[:, count:], known=known)
            return own(logits[:, :count], truth[:, :count]) + config.auxiliary * auxiliary

        return both

    def load(self, device: torch.device, free_bytes: int) -> bool:
        """Create the loader."""
        self._loader = PhotoLoader(self._cache.photos, self._rows, device, free_bytes=free_bytes)
        return self._loader.resident

    def batches(self, parts: list[NDArray[np.int64]], epoch: int, device: torch.device) -> Generator[Batch]:
        """Yield batches, and prefetch the next one while the model trains."""
        config, spec = self._config, self.spec
        seed, count = config.loop.seed, len(self._rows)
        transforms = draw_epoch(config.augment, spec, count, seed=seed, epoch=epoch)
        size = training_size(epoch, epochs=config.loop.epochs, size=spec.size, first=config.loop.first_size)
        transforms = transforms.scaled(spec.size / size)
        alpha, labels = config.loss.mixup, np.concatenate([self._truth, self._auxiliary], axis=1)
        shares = np.random.default_rng([seed, epoch, 0x31]).beta(alpha, alpha, count) if alpha else None

        def make(batch: NDArray[np.int64]) -> Callable[[], Batch]:
            finish = self._loader.begin(self._rows[batch], transforms[batch], size)
            truth = torch.from_numpy(labels[batch]).float()
            # The larger share is always the photo's own, so that every photo is learned once per epoch.
            share = None if shares is None else torch.from_numpy(np.maximum(shares, 1 - shares)[batch]).float()
            return lambda: _blended(finish(), truth.to(device, non_blocking=True), share)

        for finish in prefetch(make, parts):
            yield finish()

    def validate(self, model: nn.Module, world: World) -> tuple[float, dict[str, float]]:
        """Return loss and scores on the validation photos, each counted once for any number of processes."""
        world.align(model)
        mine = np.arange(world.rank, len(self._val_rows), world.size)
        dtype = autocast_dtype(self._config.loop)
        own = predict_logits(model, self._cache.photos, self._val_rows[mine], self.spec, dtype=dtype)
        logits = np.empty((len(self._val_rows), len(self.outputs)))
        for rank, values in enumerate(world.gather(own)):
            logits[rank :: world.size] = values[:, : len(self.outputs)]
        loss = LOSSES[self._kind](
            torch.from_numpy(logits), torch.from_numpy(self._val_truth), known=known_labels(self._val_truth, self._kind)
        )
        return float(loss), validation_scores(self._config.task, probabilities(logits, self._kind), self._val_truth)


def _blended(inputs: Tensor, truth: Tensor, share: Tensor | None) -> Batch:
    """Blend each photo with the next one of the batch (mixup). Source: Zhang et al., ICLR 2018."""
    if share is None:
        return inputs, truth
    share = share.to(inputs.device, non_blocking=True)[:, None]
    truth = share * truth + (1 - share) * truth.roll(-1, 0)
    # In place: only this step uses the batch.
    return inputs.lerp_(inputs.roll(-1, 0), (1 - share)[:, :, None, None]), truth
