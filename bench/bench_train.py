"""Training ResNet-50 on the CPU: `train --amp` against the peers' habit, in turns in one run.

    python -m bench.bench_train [--output bench/results/train_cpu_YYYYMM.json]

The peers' habit: JPEG files, Pillow, torchvision's transforms, a DataLoader with a worker a core, float32, channels
first, the loss read after every step. Ours: the loop's own feed, step and averaged weights, on a cache of the same
photos. Each variant starts with untimed steps, so that loaders are as full at the end of a turn as at its beginning.
Files are twice as wide as the model's input, which favours the peers: cameras' are ten times as wide.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bench.paired import environment
from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.models.classifier import uses_channels_last
from fastfundus.photo.memory import keep_memory
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset
from fastfundus.train.problem import Grading
from fastfundus.train.step import AveragedModel, TrainStep, build_optimiser

Turn = Callable[[int], float]
"""Takes a number of steps, returns the seconds they took."""
PEER, OURS, RESIDENT, SINGLE = (
    "Pillow + torchvision + DataLoader, float32, channels first",
    "FastFundus, train --amp",
    "its step alone, on one resident batch",
    "FastFundus, train --no-amp",
)


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


def peer(cache: PhotoCache, backbone: str, size: int, batch: int) -> Turn:
    """The peers' habit."""
    model = timm.create_model(backbone, num_classes=1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of = nn.BCEWithLogitsLoss()
    workers = os.cpu_count() or 1
    loader = DataLoader(Files(cache, size), batch, shuffle=True, num_workers=workers, drop_last=True)

    def forever() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    def turn(steps: int) -> float:
        batches = forever()
        began = 0.0
        # The workers' queues are full after the first of these.
        for number in range(steps + 2):
            if number == 2:
                began = time.perf_counter()
            inputs, labels = next(batches)
            optimiser.zero_grad()
            loss = loss_of(model(inputs), labels.float())
            loss.backward()
            optimiser.step()
            loss.item()
        seconds = time.perf_counter() - began
        batches.close()  # type: ignore[attr-defined]
        return seconds

    return turn


@contextmanager
def ours(cache: PhotoCache, backbone: str, batch: int, *, amp: bool, resident: bool) -> Iterator[Turn]:
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
    step = TrainStep(model, model, optimiser, config.loop, problem.loss(cpu), clip_norm=1.0, device=cpu)
    problem.load(cpu, 0)
    order = np.random.default_rng(0)

    def parts() -> list[np.ndarray]:
        return [order.permutation(len(problem.strata))[:batch] for _ in range(1000)]

    batches = problem.batches(parts(), 0, cpu)
    first = next(batches)

    def turn(steps: int) -> float:
        began = 0.0
        for number in range(steps + 1):
            if number == 1:
                began = time.perf_counter()
            step([first if resident else next(batches)], batch, 1e-4)
            averaged.update(model)
        return time.perf_counter() - began

    yield turn
    batches.close()


def measure(backbone: str, size: int, batch: int, *, steps: int, rounds: int, photos: int) -> dict[str, Any]:
    """Milliseconds a photo of each variant, medians over rounds, and the ratios round by round."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_dataset(folder / "photos", photos // 2, seed=3, poor_share=0.0, long_sides=(2 * size,))
        listing = list_photos(folder / "photos", labels=folder / "photos" / "labels.csv")
        cache = build_cache(listing.photos, folder / "cache", PreprocessSpec(size=size), source=listing.root)
        turns = {PEER: peer(cache, backbone, size, batch)}
        for label, amp, resident in ((OURS, True, False), (RESIDENT, True, True), (SINGLE, False, False)):
            turns[label] = stack.enter_context(ours(cache, backbone, batch, amp=amp, resident=resident))
        times: dict[str, list[float]] = {label: [] for label in turns}
        for number in range(rounds + 1):
            for label, turn in turns.items():
                seconds = turn(steps) / (steps * batch)
                if number:  # the first round warms up
                    times[label].append(1000 * seconds)
            print(number, {label: f"{values[-1]:.1f}" for label, values in times.items() if values}, flush=True)

    def ratio(left: str, right: str) -> dict[str, float]:
        values = np.array(times[left]) / np.array(times[right])
        return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}

    return {
        "backbone": backbone,
        "size": size,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "ms": {label: float(np.median(values)) for label, values in times.items()},
        "speedup": ratio(PEER, OURS),
        "of_step": ratio(RESIDENT, OURS),
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / "results" / f"train_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    keep_memory()
    about = environment(("torch", "torchvision", "timm", "pillow", "numpy"))
    parts = [
        measure("resnet50", 224, 16, steps=3, rounds=7, photos=96),
        measure("resnet50", 512, 8, steps=2, rounds=5, photos=96),
    ]
    options.output.write_text(json.dumps({**about, "parts": parts}, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
