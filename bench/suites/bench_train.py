"""Training of ResNet-50 on the CPU: `train --amp` against the baseline, interleaved in one run.

    make bench SUITES=train         timed
    make test                       once with tiny inputs

The baseline is what peers usually do: JPEG files, Pillow, torchvision's transforms, a DataLoader with one worker per
core, float32, channels first, and the loss read after every step. Ours uses the loader, step and averaged weights of
the training loop, on a cache of the same photos. Each variant starts its turn with untimed steps, so that loaders are
as full at the end of the turn as at its beginning. The files are twice as wide as the model's input, which favours the
peers: camera files are ten times as wide. Losses are compared: each variant sees its own batches, but one that does not
learn or whose loss is not finite is far off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bench.harness.comparison import Case, Limit, Variant, compare
from bench.harness.limits import matmul_limit
from bench.harness.own_process import OwnProcess
from bench.suites.bench_engine import flops_of
from bench.tables.model_tables import OURS, PEER
from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.models.classifier import uses_channels_last
from fastfundus.photo.memory import keep_memory
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset
from fastfundus.training.optimizer import AveragedModel, build_optimizer
from fastfundus.training.precision import native_dtypes, resolve_precision
from fastfundus.training.step import TrainStep
from fastfundus.training.tasks.classification import ClassificationTask

CASES, TINY = (("resnet50", 224, 16, 3, 7), ("resnet50", 512, 8, 2, 5)), (("resnet18", 32, 4, 1, 1),)
"""Backbone, input size, batch size, steps per turn, rounds."""
LOSS = 2.0
"""About three times the loss of random guessing: in the first steps, losses of different batches differ by less."""
RESIDENT, SINGLE = "its step alone, on one resident batch", "FastFundus, train --no-amp"


class Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """JPEG files and labels, as users of ImageFolder have them."""

    def __init__(self, cache: PhotoCache, size: int) -> None:
        from torchvision import transforms

        self.paths = [cache.source / name for name in cache.manifest["path"]]
        self.labels = cache.manifest["abnormal"].to_list()
        self.change = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.64, 1.0), ratio=(1.0, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.ColorJitter(0.15, 0.15, 0.15, 6 / 360),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.change(image.convert("RGB")), torch.tensor([self.labels[index]])


class Turns:
    """Training steps of one variant; each call takes some of them and returns their mean loss.

    Args:
        step: learns from a batch and returns its loss.
        batches: context with endless batches, entered anew for each turn.
        steps: number of steps per call.
    """

    def __init__(
        self, step: Callable[[Any], torch.Tensor], batches: Callable[[], AbstractContextManager[Iterator[Any]]],
        steps: int,
    ) -> None:  # fmt: skip
        self._step, self._batches, self._steps = step, batches, steps

    def begin(self) -> None:
        """Start the batches and take two untimed steps; the workers' queues are full after the first."""
        self._open = ExitStack()
        self._given = self._open.enter_context(self._batches())
        for _ in range(2):
            self._step(next(self._given))

    def end(self) -> None:
        """Release the batches."""
        self._open.close()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Call `begin` before the body and `end` after it."""
        self.begin()
        yield
        self.end()

    def __call__(self) -> np.ndarray:
        """Take the steps and return their mean loss."""
        return np.array([float(sum(self._step(next(self._given)) for _ in range(self._steps))) / self._steps])


def peer(cache: Path, backbone: str, size: int, batch: int, steps: int) -> Turns:
    """Build the baseline on the files that a cache was made from."""
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of = nn.BCEWithLogitsLoss()
    loader = DataLoader(
        Files(PhotoCache.open(cache), size), batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True
    )

    @contextmanager
    def batches() -> Iterator[Iterator[Any]]:
        def forever() -> Iterator[Any]:
            while True:
                yield from loader

        given = forever()
        yield given
        # End the workers: they must not read ahead while other variants are timed.
        given.close()  # type: ignore[attr-defined]

    def step(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = given
        optimizer.zero_grad()
        loss = loss_of(model(inputs), labels.float())
        loss.backward()
        optimizer.step()
        loss.item()
        return loss.detach()

    return Turns(step, batches, steps)


def ours(cache: PhotoCache, backbone: str, batch: int, steps: int, *, amp: bool, resident: bool) -> Turns:
    """Build a variant from the parts of the training loop: loader, step, averaged weights."""
    settings = {
        "model": {"backbone": backbone, "init": "scratch"},
        "data": {"folds": 3},
        "optimizer": {"learning_rate": 1e-3, "layer_decay": 1.0},
        "loop": {"batch_size": batch},
    }
    cpu, config = torch.device("cpu"), TrainConfig.from_dict(settings)
    loop, _ = resolve_precision(replace(config.loop, amp="auto" if amp else False), cpu)
    config = replace(config, loop=loop)
    task = ClassificationTask(cache, config, lambda text: None)
    model, _ = task.create(config.model)
    model = model.train()
    if uses_channels_last("auto", model):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(model, config.optimizer.ema_decay)
    optimizer = build_optimizer(model, config.optimizer)
    learn = TrainStep(model, model, optimizer, config.loop, task.loss(cpu), clip_norm=1.0, device=cpu)
    task.load(cpu, 0)
    order = np.random.default_rng(0)

    @contextmanager
    def batches() -> Iterator[Iterator[Any]]:
        parts = [order.permutation(len(task.strata))[:batch] for _ in range(1000)]
        given = task.batches(parts, 0, cpu)
        first = next(given)
        yield iter(lambda: first, None) if resident else given
        given.close()  # type: ignore[attr-defined]

    def step(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = learn([given], batch, 1e-4)
        averaged.update(model)
        return loss

    return Turns(step, batches, steps)


def training(
    folder: Path, backbone: str, size: int, batch: int, steps: int, *, photos: int, here: bool
) -> tuple[Case, list[Variant]]:
    """Build the case of one turn and its variants; the baseline runs in this process if `here`."""
    write_dataset(folder / "photos", photos // 2, seed=3, poor_share=0.0, long_sides=(2 * size,))
    listing = list_photos(folder / "photos", labels=folder / "photos" / "labels.csv")
    cache = build_cache(listing.photos, folder / "cache", PreprocessSpec(size=size), source=listing.root)
    flops = 3.0 * flops_of(backbone, size) * steps * batch
    exact = autocast = matmul_limit("fp32", flops, quick=here)
    if native_dtypes(torch.device("cpu")):
        autocast = matmul_limit("bf16", flops, quick=here)
    case = Case(
        f"train, {backbone}, {size} px", f"{steps} steps with batches of {batch}", steps * batch,
        flops=flops, flops_how="three times a forward pass: the backward pass counts twice", limit=RESIDENT,
    )  # fmt: skip
    habit = OwnProcess(peer, folder / "cache", backbone, size, batch, steps, here=here)
    ways: list[tuple[str, Turns | OwnProcess, str, Limit | None]] = [
        (PEER, habit, "float32, channels first, one worker per core", exact),
        (OURS, ours(cache, backbone, batch, steps, amp=True, resident=False), "", None),
        (
            RESIDENT,
            ours(cache, backbone, batch, steps, amp=True, resident=True),
            "upper bound without data loading",
            autocast,
        ),
        (SINGLE, ours(cache, backbone, batch, steps, amp=False, resident=False), "", exact),
    ]
    return case, [
        Variant(name, turns, name == PEER, settings, LOSS, within=turns.within, limit=limit)
        for name, turns, settings, limit in ways
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Use all sizes when timing, and the tiny case otherwise."""
    cases = CASES if metafunc.config.getoption("benchmark_enable") else TINY
    metafunc.parametrize(("backbone", "size", "batch", "steps", "rounds"), cases)


@pytest.mark.filterwarnings("ignore")  # the peers' own warnings
def test_train(benchmark: Any, tmp_path: Path, backbone: str, size: int, batch: int, steps: int, rounds: int) -> None:
    """Measure photos/s of training steps including data loading."""
    keep_memory()
    torch.manual_seed(0)
    job = training(tmp_path, backbone, size, batch, steps, photos=96, here=benchmark.disabled)
    compare(*job, rounds=rounds, benchmark=benchmark)
