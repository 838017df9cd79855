"""Training ResNet-50 on the CPU: `train --amp` against the peers' habit, in turns in one run.

    make bench SUITES=train         timed
    make test                       once, tiny

The peers' habit: JPEG files, Pillow, torchvision's transforms, a DataLoader with a worker a core, float32, channels
first, the loss read after every step. Ours: the loop's own feed, step and averaged weights, on a cache of the same
photos. Each variant starts with untimed steps, so that loaders are as full at the end of a turn as at its beginning.
Files are twice as wide as the model's input, which favours the peers: cameras' are ten times as wide.
What is compared is the loss: each sees batches of its own, but one that does not learn, or not a number, is far off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bench.bench_engine import flops_of
from bench.harness import Case, Limit, Variant, compare
from bench.limits import matmul_limit
from bench.model_tables import OURS, PEER
from bench.own_process import OwnProcess
from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.models.classifier import uses_channels_last
from fastfundus.photo.memory import keep_memory
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset
from fastfundus.train.problem import Grading
from fastfundus.train.step import AveragedModel, TrainStep, build_optimiser

CASES, TINY = (("resnet50", 224, 16, 3, 7), ("resnet50", 512, 8, 2, 5)), (("resnet18", 32, 4, 1, 1),)
"""Backbone, size, batch, steps of a turn, rounds."""
LOSS = 2.0
"""Three times a coin's: losses of different batches of the first steps lie within."""
RESIDENT, SINGLE = "its step alone, on one resident batch", "FastFundus, train --no-amp"


class Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """JPEG files and labels, as ImageFolder users have them."""

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
    """Steps of one variant: one call takes some of them, and gives the mean loss.

    Args:
        step: learns from a batch, gives its loss.
        batches: without end, begun anew for each turn.
        steps: of a call.
    """

    def __init__(
        self, step: Callable[[Any], torch.Tensor], batches: Callable[[], AbstractContextManager[Iterator[Any]]],
        steps: int,
    ) -> None:  # fmt: skip
        self._step, self._batches, self._steps = step, batches, steps

    def begin(self) -> None:
        """The workers' queues are full after the first of these steps."""
        self._open = ExitStack()
        self._given = self._open.enter_context(self._batches())
        for _ in range(2):
            self._step(next(self._given))

    def end(self) -> None:
        """Let go of the batches."""
        self._open.close()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Both, around a call."""
        self.begin()
        yield
        self.end()

    def __call__(self) -> np.ndarray:
        """Take the steps."""
        return np.array([float(sum(self._step(next(self._given)) for _ in range(self._steps))) / self._steps])


def peer(cache: Path, backbone: str, size: int, batch: int, steps: int) -> Turns:
    """The peers' habit, on the files that a cache was made from."""
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
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
        # Ends the workers: they must not read ahead in the turns of others.
        given.close()  # type: ignore[attr-defined]

    def step(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = given
        optimiser.zero_grad()
        loss = loss_of(model(inputs), labels.float())
        loss.backward()
        optimiser.step()
        loss.item()
        return loss.detach()

    return Turns(step, batches, steps)


def ours(cache: PhotoCache, backbone: str, batch: int, steps: int, *, amp: bool, resident: bool) -> Turns:
    """The loop's own parts: feed, step, averaged weights."""
    settings = {"model": {"backbone": backbone}, "data": {"folds": 3}, "loop": {"batch_size": batch, "amp": amp}}
    config = TrainConfig.from_dict(settings)
    cpu = torch.device("cpu")
    problem = Grading(cache, config, lambda text: None)
    model, _ = problem.create(config.model)
    model = model.train()
    if uses_channels_last("auto", model):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(model, config.optimiser.ema_decay)
    optimiser = build_optimiser(model, config.optimiser)
    learn = TrainStep(model, model, optimiser, config.loop, problem.loss(cpu), clip_norm=1.0, device=cpu)
    problem.load(cpu, 0)
    order = np.random.default_rng(0)

    @contextmanager
    def batches() -> Iterator[Iterator[Any]]:
        parts = [order.permutation(len(problem.strata))[:batch] for _ in range(1000)]
        given = problem.batches(parts, 0, cpu)
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
    """The job of a turn, and everyone's way to do it; the peers in this process where `here`."""
    write_dataset(folder / "photos", photos // 2, seed=3, poor_share=0.0, long_sides=(2 * size,))
    listing = list_photos(folder / "photos", labels=folder / "photos" / "labels.csv")
    cache = build_cache(listing.photos, folder / "cache", PreprocessSpec(size=size), source=listing.root)
    flops = 3.0 * flops_of(backbone, size) * steps * batch
    exact, autocast = (matmul_limit(kind, flops, quick=here) for kind in ("fp32", "bf16"))
    case = Case(
        f"train, {backbone}, {size} px", f"{steps} steps with batches of {batch}", steps * batch,
        flops=flops, flops_how="three times those of a forward pass: backward is two", limit=RESIDENT,
    )  # fmt: skip
    habit = OwnProcess(peer, folder / "cache", backbone, size, batch, steps, here=here)
    ways: list[tuple[str, Turns | OwnProcess, str, Limit | None]] = [
        (PEER, habit, "float32, channels first, a worker a core", exact),
        (OURS, ours(cache, backbone, batch, steps, amp=True, resident=False), "", None),
        (RESIDENT, ours(cache, backbone, batch, steps, amp=True, resident=True), "the limit of feeding", autocast),
        (SINGLE, ours(cache, backbone, batch, steps, amp=False, resident=False), "", exact),
    ]
    return case, [
        Variant(name, turns, name == PEER, settings, LOSS, within=turns.within, limit=limit)
        for name, turns, settings, limit in ways
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All sizes where it is timed."""
    cases = CASES if metafunc.config.getoption("benchmark_enable") else TINY
    metafunc.parametrize(("backbone", "size", "batch", "steps", "rounds"), cases)


@pytest.mark.filterwarnings("ignore")  # of the peers, about themselves
def test_train(benchmark: Any, tmp_path: Path, backbone: str, size: int, batch: int, steps: int, rounds: int) -> None:
    """Photos/s of steps with data."""
    keep_memory()
    torch.manual_seed(0)
    job = training(tmp_path, backbone, size, batch, steps, photos=96, here=benchmark.disabled)
    compare(*job, rounds=rounds, benchmark=benchmark)
