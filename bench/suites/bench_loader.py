"""Loaders of augmented, normalised training batches from JPEG files or a cache, against loaders in common use.

    make bench SUITES=loader        timed
    make test                       once with tiny inputs

The files are squares around the field, twice as wide as the model's input, as other projects prepare them once by hand.
This favours file-based loaders: camera files are ten times as wide. All cores are used, with one worker per core where
there are workers. Each peer has its own process, as its users run it. Mean and standard deviation of each channel over
an epoch are compared, because every loader draws its own augmentations.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch.utils.data import DataLoader, Dataset

from bench.harness.comparison import Case, Clock, Limit, Variant, compare
from bench.harness.own_process import OwnProcess
from bench.tables.targets import CACHE_LOADER
from fastfundus.config import TrainConfig
from fastfundus.dali.decode import DaliDecoder
from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset
from fastfundus.training.augment import draw_epoch
from fastfundus.training.loader import PhotoLoader, epoch_order, prefetch
from fastfundus.training.stream import CameraPhoto, CameraStream

BATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, TURN, TINT, HUE = (0.64, 1.0), 15, 0.15, 6 / 360
# Tolerance of the channel statistics of a synthetic set, in units of the normalised input. With a hundred photos, the
# choice of crops moves them by 0.1; with 32 photos it was 0.25.
TOLERANCE = 0.25
Batches = Iterable[torch.Tensor]
HABIT = "torchvision v2, DataLoader"


def channel_statistics(batches: Batches, photos: int) -> np.ndarray:
    """Return mean and standard deviation of each channel over an epoch, or infinity if photos were lost."""
    count, sums, squares = 0, torch.zeros(3, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    for batch in batches:
        assert batch.shape[1] == 3, batch.shape
        count += len(batch)
        # A subset of the pixels suffices and keeps the cost of this check out of the measurement.
        some = batch[:, :, ::8, ::8].double()
        sums += some.mean((2, 3)).sum(0)
        squares += some.square().mean((2, 3)).sum(0)
    if count < photos // BATCH * BATCH:
        return np.full(6, np.inf)
    mean = sums / count
    return torch.cat([mean, (squares / count - mean.square()).sqrt()]).numpy()


class Files(Dataset[torch.Tensor]):
    """JPEG files, read and augmented by a function."""

    def __init__(self, paths: list[Path], read: Callable[[Path], torch.Tensor]) -> None:
        self._paths, self._read = paths, read

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(self._paths[index])


class TorchvisionRead:
    """The setup of RETFound and most repositories: Pillow, transforms v2 on uint8, then float."""

    def __init__(self, size: int) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self._change = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(size, scale=SCALE, ratio=(1.0, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomRotation(TURN, interpolation=InterpolationMode.BILINEAR),
                v2.ColorJitter(TINT, TINT, TINT, HUE),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, path: Path) -> torch.Tensor:
        """Read and augment a photo."""
        with Image.open(path) as image:
            return self._change(image.convert("RGB"))


class AlbumentationsRead:
    """Reading with OpenCV and augmentation with Albumentations, the winner of most library comparisons."""

    def __init__(self, size: int) -> None:
        # Otherwise it checks the network for a newer version of itself.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as A

        cv2.setNumThreads(0)
        self._change = A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=SCALE, ratio=(1.0, 1.0)),
                A.HorizontalFlip(p=0.5),
                A.Rotate(TURN, border_mode=cv2.BORDER_CONSTANT, p=1.0),
                A.ColorJitter((1 - TINT, 1 + TINT), (1 - TINT, 1 + TINT), (1 - TINT, 1 + TINT), (-HUE, HUE), p=1.0),
                A.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, path: Path) -> torch.Tensor:
        """Read and augment a photo."""
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return torch.from_numpy(self._change(image=image)["image"]).permute(2, 0, 1)


def by_workers(read: type[TorchvisionRead | AlbumentationsRead], paths: list[Path], size: int) -> Callable[[], Batches]:
    """Return a function that starts an epoch of a DataLoader with persistent workers."""
    loader = DataLoader(
        Files(paths, read(size)),
        BATCH,
        shuffle=True,
        num_workers=os.cpu_count() or 1,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: loader


def by_timm(paths: list[Path], size: int) -> Callable[[], Batches]:
    """Return a function that starts an epoch of timm's own training loader."""
    from timm.data import create_loader
    from timm.data.dataset import ImageDataset

    folder = paths[0].parent
    dataset = ImageDataset(str(folder))
    loader = create_loader(
        dataset, (3, size, size), BATCH, is_training=True, use_prefetcher=False, scale=SCALE, ratio=(1.0, 1.0),
        color_jitter=TINT, hflip=0.5, interpolation="bilinear", mean=MEAN, std=STD, num_workers=os.cpu_count() or 1,
        persistent_workers=True, device=torch.device("cpu"), pin_memory=False,
    )  # fmt: skip
    return lambda: (batch for batch, _ in loader)


def by_dali(paths: list[Path], size: int) -> Callable[[], Batches]:
    """Return a function that starts an epoch of DALI's CPU operators, from file to normalised batch."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    # Prefetch one batch only, as the others do: it must not work ahead while other variants are timed.
    @pipeline_def(  # type: ignore[misc]
        batch_size=BATCH, num_threads=os.cpu_count() or 1, device_id=None, prefetch_queue_depth=1, seed=1
    )
    def pipeline() -> Any:
        files, _ = fn.readers.file(files=[str(path) for path in paths], random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            files, device="cpu", output_type=types.RGB, random_area=SCALE, random_aspect_ratio=(1.0, 1.0)
        )
        images = fn.resize(images, size=[size, size], antialias=True)
        images = fn.rotate(images, angle=fn.random.uniform(range=(-TURN, TURN)), keep_size=True, fill_value=0)
        near = {"range": (1 - TINT, 1 + TINT)}
        images = fn.color_twist(
            images, brightness=fn.random.uniform(**near), contrast=fn.random.uniform(**near),
            saturation=fn.random.uniform(**near), hue=fn.random.uniform(range=(-HUE * 360, HUE * 360)),
        )  # fmt: skip
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD],
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        iterator = DALIGenericIterator(
            pipeline(), ["images"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
        )
    return lambda: (entry[0]["images"] for entry in iterator)


def by_cache(cache: PhotoCache) -> Callable[[], Batches]:
    """Return a function that starts an epoch as `train` does: photos from a cache, augmented by one kernel."""
    count, size = len(cache.manifest), cache.spec.size
    loader = PhotoLoader(cache.photos, np.arange(count), torch.device("cpu"))
    epochs = itertools.count()

    def batches() -> Iterator[torch.Tensor]:
        epoch = next(epochs)
        transforms = draw_epoch(TrainConfig().augment, cache.spec, count, seed=0, epoch=epoch)

        def make(batch: np.ndarray) -> Callable[[], torch.Tensor]:
            return loader.begin(batch, transforms[batch], size)

        for finish in prefetch(make, epoch_order(count, BATCH, seed=0, epoch=epoch)):
            yield finish()

    return batches


def by_stream(cache: PhotoCache, decoder: DaliDecoder | None) -> Callable[[], Batches]:
    """Return a function that starts an epoch read from the files, augmented by the same kernel."""
    photos = CameraPhoto.of_cache(cache, np.arange(len(cache.manifest)))
    stream = CameraStream(photos, cache.spec, TrainConfig().augment, decoder, BATCH)
    return lambda: (batch for batch, _ in stream)


def decoding(paths: list[Path]) -> Limit:
    """Measure the limit of file-based loaders: libjpeg-turbo alone on all cores, with the files in memory."""
    files, clock = [path.read_bytes() for path in paths], Clock()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        times = [clock.time(lambda: sum(pool.map(lambda data: decode_jpeg(data).shape[0], files)))[0] for _ in range(4)]
    return Limit("decoding the files alone", min(times))


def peer(make: Callable[..., Callable[[], Batches]], arguments: Sequence[Any], photos: int) -> Callable[[], np.ndarray]:
    """Build a loader in the process where this is called, and return a job that calls `channel_statistics`."""
    way = make(*arguments)
    return lambda: channel_statistics(way(), photos)


def loader_case(folder: Path, size: int, photos: int, *, here: bool) -> tuple[Case, list[Variant]]:
    """Build the case and its variants; peers run in this process if `here`."""
    keep_memory()
    write_dataset(folder / "photos", photos // 2, seed=3, poor_share=0.0, long_sides=(3 * size,))
    (folder / "squares").mkdir()
    for path in sorted((folder / "photos" / "images").iterdir()):
        square = prepare_photo(path, PreprocessSpec(size=2 * size)).image
        assert square is not None, path
        cv2.imwrite(str(folder / "squares" / path.name), square[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    listing = list_photos(folder / "squares")
    cache = build_cache(listing.photos, folder / "cache", PreprocessSpec(size=size), source=listing.root)
    paths = [cache.source / name for name in cache.manifest["path"]]

    def own(make: Callable[..., Callable[[], Batches]], *arguments: Any) -> OwnProcess:
        return OwnProcess(peer, make, (*arguments, paths, size), photos, here=here)

    loader, stream = by_cache(cache), by_stream(cache, None)
    by_dali_too = by_stream(cache, DaliDecoder(device_id=None, batch_size=BATCH))
    ways: list[tuple[str, Callable[[], Any], str]] = [
        (CACHE_LOADER, lambda: channel_statistics(loader(), photos), "as in `train`, prepared once"),
        (
            "FastFundus, from files",
            lambda: channel_statistics(stream(), photos),
            "libjpeg-turbo, same augmentation kernel",
        ),
        (
            "FastFundus, from files by DALI",
            lambda: channel_statistics(by_dali_too(), photos),
            "DALI's CPU decoder, same augmentation kernel",
        ),
        (HABIT, own(by_workers, TorchvisionRead), "Pillow, uint8 until normalisation, one worker per core"),
        ("timm, create_loader", own(by_timm), "bilinear, one worker per core, no rotation (unsupported)"),
        (
            "Albumentations, DataLoader",
            own(by_workers, AlbumentationsRead),
            "OpenCV, one single-threaded worker per core",
        ),
        ("DALI CPU", own(by_dali), "fused decode and random crop, one thread per core"),
    ]
    case = Case(
        name=f"loader, {size} px",
        what=f"{photos} square JPEG files {2 * size} pixels wide to float32 batches [{BATCH}, 3, {size}, {size}]",
        units=photos // BATCH * BATCH,
        bytes=photos // BATCH * BATCH * 15 * size * size,
        bytes_how="3 bytes read and 12 written per output pixel",
        limit=decoding(paths[: photos // BATCH * BATCH]),
    )
    variants = [Variant(name, job, name == HABIT, settings, TOLERANCE) for name, job, settings in ways]
    return case, variants


@pytest.mark.parametrize("size", [224, 512])
@pytest.mark.filterwarnings("ignore")  # the peers' own warnings
def test_loader(benchmark: Any, tmp_path: Path, size: int) -> None:
    """Measure photos/s of an epoch."""
    timed = not benchmark.disabled
    # Loaders draw the order and the augmentations from torch's generator.
    torch.manual_seed(0)
    threads = cv2.getNumThreads()
    try:
        case, variants = loader_case(
            tmp_path, size if timed else size // 4, 256 if timed else 6 * BATCH, here=not timed
        )
        found = compare(case, variants, rounds=5, benchmark=benchmark)
    finally:
        cv2.setNumThreads(threads)
    assert len(found["variants"]) == 7
