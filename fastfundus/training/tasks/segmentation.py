"""The vessel segmentation task: trained on tiles at full resolution, validated on whole photos."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfundus.config import ModelConfig, TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.masks import MASK_COLUMN, crop_transform, native_masks, photos_with_masks
from fastfundus.data.store import PhotoArray
from fastfundus.errors import ConfigError
from fastfundus.kernels.ops import sample
from fastfundus.models.initial import InitReport
from fastfundus.models.segmenter import STRIDE_PX, create_segmenter
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import Transforms, draw_epoch
from fastfundus.training.distributed import World
from fastfundus.training.loader import PhotoLoader, prefetch
from fastfundus.training.precision import autocast_dtype
from fastfundus.training.predict import forward_batches
from fastfundus.training.tasks.base import Batch, assign_split
from fastfundus.training.tasks.losses import vessel_loss

__all__ = ["SegmentationTask", "binned", "binned_auroc", "mask_column", "masks_in_cache", "vessel_maps"]

_BINS = 1 << 16
_KEEP = np.eye(4, dtype=np.float32)[:3]
"""The identity colour matrix."""


class SegmentationTask:
    """Vessel segmentation. Photos are not shrunk: prepare the cache at the side of the field.

    Args:
        cache: the photos; the manifest names their masks.
        config: configuration of the run.
        say: receives notes for the user.

    Raises:
        DataError: there are no masks, a mask does not fit its photo, or there are too few patients.
        ConfigError: settings do not apply to vessels.
    """

    outputs: tuple[str, ...] = ("vessel",)
    selection_metric = "auroc"

    def __init__(self, cache: PhotoCache, config: TrainConfig, say: Callable[[str], None]) -> None:
        for name, value, allowed in (
            ("loop.first_size", config.loop.first_size, 1.0),
            ("loss.mixup", config.loss.mixup, 0.0),
            ("loss.focal_gamma", config.loss.focal_gamma, 0.0),
            ("loss.label_smoothing", config.loss.label_smoothing, 0.0),
        ):
            if value != allowed:
                raise ConfigError(f"{name} is {value}, but does not apply to vessels; set it to {allowed:g}")
        column = mask_column(config)
        rows = photos_with_masks(cache.manifest, column)
        if config.loop.tile > cache.spec.size:
            raise ConfigError(
                f"loop.tile is {config.loop.tile}, but the photos are {cache.spec.size} pixels wide; lower it, or "
                "prepare larger photos"
            )
        if config.loss.positive_weight == 0:
            raise ConfigError("loss.positive_weight is 0, which vessels do not support; set it to a positive number")
        self._cache, self._config, self.spec, self.summary = cache, config, cache.spec, f"vessels from {column!r}"
        self.splits = assign_split(cache, rows, None, config, {}, say)
        train, val = (rows[(self.splits["split"] == name).to_numpy()] for name in ("train", "val"))
        largest = int(cache.manifest["window_side_px"].gather(rows).max())  # type: ignore[arg-type]
        if cache.spec.size < largest:
            say(
                f"note: the photos were shrunk from up to {largest} to {cache.spec.size} pixels, which loses thin "
                f"vessels; prepare --size {largest} keeps them"
            )
        self._rows, self._val_rows = train, val
        self._masks, self._val_masks = (masks_in_cache(cache, part, column) for part in (train, val))
        self.strata = np.zeros(len(train) * config.loop.tiles, np.int64)

    def create(self, config: ModelConfig) -> tuple[nn.Module, InitReport]:
        """Build the network."""
        return create_segmenter(config, 1)

    def loss(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the weighted sum of cross-entropy and Dice loss."""
        return partial(vessel_loss, dice=self._config.loss.dice, weight=self._config.loss.positive_weight)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of the network."""
        return model.state_dict()

    def load(self, device: torch.device, free_bytes: int) -> bool:
        """Create the loaders of photos and masks."""
        # Masks take as much memory as photos.
        self._loader = PhotoLoader(self._cache.photos, self._rows, device, free_bytes=free_bytes // 2)
        places = np.arange(len(self._rows))
        self._mask_loader = PhotoLoader(self._masks, places, device, free_bytes=free_bytes // 2)
        return self._loader.resident

    def batches(self, parts: list[NDArray[np.int64]], epoch: int, device: torch.device) -> Generator[Batch]:
        """Yield batches of tiles, and prefetch the next one while the model trains."""
        config, spec, tile = self._config, self.spec, self._config.loop.tile
        seed, count = config.loop.seed, len(self.strata)
        transforms = draw_epoch(config.augment, spec, count, seed=seed, epoch=epoch)
        # Output positions are first shifted to the tile's random place in the augmented photo.
        corner = np.random.default_rng([seed, epoch, 0x71]).uniform(0, spec.size - tile, (count, 2)).astype(np.float32)
        transforms = transforms.shifted(corner)
        masked = Transforms(transforms.geometry, np.tile(_KEEP, (count, 1, 1)))

        def make(batch: NDArray[np.int64]) -> Callable[[], Batch]:
            photo = batch // config.loop.tiles
            inputs = self._loader.begin(self._rows[photo], transforms[batch], tile)
            masks = self._mask_loader.begin(photo, masked[batch], tile, nearest=True)
            return lambda: (inputs(), _truth(masks()))

        for finish in prefetch(make, parts):
            yield finish()

    def validate(self, model: nn.Module, world: World) -> tuple[float, dict[str, float]]:
        """Return cross-entropy and AUROC of all pixels within the field, and the mean Dice per photo at 0.5."""
        world.align(model)
        mine = np.arange(world.rank, len(self._val_rows), world.size)
        dtype = autocast_dtype(self._config.loop)
        maps = vessel_maps(model, self._cache.photos, self._val_rows[mine], self.spec, dtype=dtype)
        counts, entropy, dices = np.zeros((2, _BINS), np.int64), 0.0, []
        for place, probabilities in zip(mine, maps, strict=True):
            vessels, inside = (self._val_masks[place, :, :, channel] > 127 for channel in (0, 1))
            yes, probability = vessels[inside], probabilities[inside].astype(np.float64)
            counts += binned(probability, yes)
            entropy -= np.log(np.clip(np.where(yes, probability, 1 - probability), 1e-7, 1)).sum()
            dices.append(2 * (yes & (probability >= 0.5)).sum() / max(1, yes.sum() + (probability >= 0.5).sum()))
        gathered = world.gather((counts, entropy, dices))
        total = np.sum([entry[0] for entry in gathered], axis=0)
        loss = float(sum(entry[1] for entry in gathered) / max(1, int(total.sum())))
        return loss, {"auroc": binned_auroc(total), "dice": float(np.mean([d for entry in gathered for d in entry[2]]))}


def mask_column(config: TrainConfig) -> str:
    """Return the manifest column that names the masks.

    Raises:
        ConfigError: several columns are given.
    """
    if len(config.data.labels) > 1:
        raise ConfigError(f"data.labels has {len(config.data.labels)} columns; vessels takes one")
    return config.data.labels[0] if config.data.labels else MASK_COLUMN


def _truth(masks: Tensor) -> Tensor:
    """Convert sampled masks [N, 3, S, S] to ground truth [N, 1, S, S], NaN outside the field."""
    return torch.where(masks[:, 1:2] > 127, (masks[:, :1] > 127).float(), torch.nan)


def masks_in_cache(cache: PhotoCache, rows: NDArray[np.int64], column: str) -> NDArray[np.uint8]:
    """Return masks [N, S, S, 3] in the frame of the cache, 0 or 255; the channels are vessels, field and zeros."""
    size = cache.spec.size
    result = np.zeros((len(rows), size, size, 3), np.uint8)
    for place, row in enumerate(rows):
        vessels, field = native_masks(cache, int(row), column)
        pixels = np.stack([vessels, field, np.zeros_like(field)], axis=2).astype(np.uint8) * 255
        geometry = crop_transform(cache.manifest.row(int(row), named=True), size).astype(np.float32)
        matrices = torch.from_numpy(geometry)[None], torch.from_numpy(_KEEP)[None]
        taken = sample(torch.from_numpy(pixels)[None], *matrices, size, nearest=True)
        result[place] = taken[0].permute(1, 2, 0).to(torch.uint8).numpy()
    return result


def vessel_maps(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Yield a vessel probability map [S, S] for each row of a cache, one photo at a time since photos may be large."""
    # The network halves its input five times: the photo is padded, and the map is cropped again.
    padded = -(-spec.size // STRIDE_PX) * STRIDE_PX
    for logits in forward_batches(model, photos, rows, spec, size=padded, batch_size=1, dtype=dtype):
        yield torch.sigmoid(logits[0, 0, : spec.size, : spec.size]).cpu().numpy()


def binned(probabilities: NDArray[np.floating], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return histograms [2, bins] of the probabilities of background and of vessel pixels."""
    place = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    return np.stack([np.bincount(place[truth == side], minlength=_BINS) for side in (False, True)])


def binned_auroc(counts: NDArray[np.int64]) -> float:
    """Return the AUROC of `binned` counts; exact, except that probabilities closer than 2^-16 may count as ties."""
    no, yes = counts.astype(np.float64)
    pairs = no.sum() * yes.sum()
    return float((yes * (np.cumsum(no) - no / 2)).sum() / pairs) if pairs else float("nan")
