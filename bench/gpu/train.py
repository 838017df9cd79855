"""Training on a GPU: eager and compiled steps and the loader, alone and together; called by `gpu_suite.sh`.

    python -m bench.gpu.train --output FOLDER [--dry-run]

Photos are random and kept in memory as a cache would be. Four variants of one step are interleaved: eager with autocast
and channels first (the baseline, as peers do), and compiled with channels last as in the training loop, each on one
resident batch; then the compiled step with photos from GPU memory, and with photos through pinned memory. Needs torch,
timm and NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from bench.gpu.part import measured, started, write_part
from bench.harness.comparison import Case, Variant, compare
from bench.harness.limits import matmul_limit
from fastfundus.config import AugmentConfig, LoopConfig, OptimizerConfig
from fastfundus.models.flops import count_flops
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import Transforms, draw_epoch
from fastfundus.training.loader import PhotoLoader, epoch_order, prefetch
from fastfundus.training.optimizer import AveragedModel, build_optimizer
from fastfundus.training.step import TrainStep
from fastfundus.training.tasks.losses import binary_loss

EAGER, COMPILED, RESIDENT, PINNED = (
    "eager, autocast, channels first, one batch",
    "compiled, channels last, one batch",
    "compiled, photos in GPU memory",
    "compiled, photos through pinned memory",
)
UPSTREAM_PHOTOS = 57_803
"""Number of photos in the paper's upstream set, for the time of an epoch."""
Batch = tuple[Tensor, Tensor]
LOSS = 2.0
"""About three times the loss of random guessing; a model that does not learn or a non-finite loss is further off."""


def stepper(
    backbone: str, size: int, device: torch.device, *, compiled: bool, channels_last: bool, dry_run: bool
) -> tuple[Callable[[Batch], Tensor], nn.Module]:
    """Build one step of the training loop, including its averaged weights; return it and its model."""
    torch.manual_seed(0)
    options = {"img_size": size} if "vit" in backbone else {}
    model = timm.create_model(backbone, num_classes=1, **options).to(device).train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    forward: Any = model
    if compiled:
        how: dict[str, str] = {"backend": "aot_eager"} if dry_run else {"mode": "reduce-overhead"}
        forward = torch.compile(model, fullgraph=True, dynamic=False, **how)  # type: ignore[call-overload]
    averaged = AveragedModel(model, 0.999)
    graphs = compiled and not dry_run
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, layer_decay=1.0))
    step = TrainStep(
        model, forward, optimizer, LoopConfig(amp=True, amp_dtype="bfloat16"),
        binary_loss,
        clip_norm=1.0, device=device, graphs=graphs,
    )  # fmt: skip

    def one(batch: Batch) -> Tensor:
        loss = step([batch], len(batch[0]), 1e-5)
        averaged.update(model)
        return loss

    return one, model


def fed(
    loader: PhotoLoader, count: int, spec: PreprocessSpec, batch: int, device: torch.device, channels_last: bool
) -> Iterator[Batch]:
    """Yield batches without end, as the training loop loads them."""
    truth = torch.zeros(batch, 1)
    epoch = 0
    while True:
        transforms = draw_epoch(AugmentConfig(), spec, count, seed=0, epoch=epoch)

        def make(rows: np.ndarray, transforms: Transforms = transforms) -> Callable[[], Tensor]:
            return loader.begin(rows, transforms[rows], spec.size)

        for finish in prefetch(make, epoch_order(count, batch, seed=0, epoch=epoch)):
            inputs = finish()
            yield inputs if channels_last else inputs.contiguous(), truth.to(device, non_blocking=True)
        epoch += 1


def measure(backbone: str, size: int, batch: int, device: torch.device, *, dry_run: bool) -> dict[str, Any]:
    """Measure and compare all variants on some training steps."""
    rounds, steps, count = (1, 1, 2 * batch) if dry_run else (5, 10, max(4 * batch, 1024))
    spec = PreprocessSpec(size=size)
    photos = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    rows = np.arange(count)
    loaders = {
        RESIDENT: PhotoLoader(photos, rows, device, free_bytes=photos.nbytes),
        PINNED: PhotoLoader(photos, rows, device),
    }
    channels_last = "vit" not in backbone
    streams = {name: fed(loader, count, spec, batch, device, channels_last) for name, loader in loaders.items()}
    still = next(streams[RESIDENT])
    eager, _ = stepper(backbone, size, device, compiled=False, channels_last=False, dry_run=dry_run)
    ours, model = stepper(backbone, size, device, compiled=True, channels_last=channels_last, dry_run=dry_run)
    jobs: dict[str, Callable[[], Tensor]] = {
        EAGER: partial(eager, (still[0].contiguous(), still[1])),
        COMPILED: partial(ours, still),
        RESIDENT: lambda: ours(next(streams[RESIDENT])),
        PINNED: lambda: ours(next(streams[PINNED])),
    }

    def several(job: Callable[[], Tensor]) -> Tensor:
        for _ in range(steps):
            loss = job()
        return loss

    @contextmanager
    def warmed(job: Callable[[], Tensor]) -> Iterator[None]:
        job()  # loaders refill, graphs are captured
        yield

    inputs = torch.zeros(1, 3, size, size, device=device)
    flops = 3.0 * count_flops(model.eval(), inputs)[1] * batch * steps
    model.train()
    matmul = matmul_limit("bf16", flops, device=device.type, side=64 if dry_run else 8192)
    case = Case(
        f"train: {backbone}, {size} px, batch {batch}", f"{steps} steps", batch * steps, flops=flops,
        flops_how="three times a forward pass: the backward pass counts twice", limit=COMPILED,
    )  # fmt: skip
    variants = [
        Variant(
            name, partial(several, job), name == EAGER, "", LOSS,
            lambda got, want: abs(float(got) - float(want)), partial(warmed, job),
            matmul if name in (EAGER, COMPILED) else None,
        )
        for name, job in jobs.items()
    ]  # fmt: skip
    found = compare(case, variants, rounds=rounds, device=device.type)
    for stream in streams.values():
        stream.close()  # type: ignore[attr-defined]
    return found | {"epoch_of_57803_s": UPSTREAM_PHOTOS / found["variants"][RESIDENT]["photos_per_s"]}


def run_cases(
    theme: str, measure: Callable[..., dict[str, Any]], cases: list[tuple[str, int, int]], tiny: tuple[str, int, int]
) -> None:
    """Measure and print each case and write the JSON, as the command line requests.

    Args:
        theme: first part of the file name.
        measure: function of backbone, size, batch, device and `dry_run`.
        cases: backbone, size and batch of each case, the most informative first.
        tiny: the only case of a dry run.
    """
    options, device, metadata = started()
    dry_run: bool = options.dry_run
    todo = [tiny] if dry_run else cases
    parts: list[dict[str, Any]] = [
        {"case": {"name": f"{theme}: {backbone}, {size} px, batch {batch}"}, "failed": "not measured: no time was left"}
        for backbone, size, batch in todo
    ]
    for index, case in enumerate(todo):
        parts[index] = measured(parts[index]["case"]["name"], partial(measure, *case, device, dry_run=dry_run))
        print(json.dumps(parts[index]), flush=True)
        write_part(options.output, theme, metadata, parts)


def main() -> None:
    """Measure the training steps."""
    cases = [
        ("resnet50", 512, 64),
        ("resnet50", 224, 256),
        ("convnext_tiny", 512, 64),
        ("vit_small_patch16_224", 224, 256),
        ("resnet50", 1024, 16),
        ("convnext_tiny", 224, 256),
        ("vit_small_patch16_224", 512, 64),
        ("convnext_tiny", 1024, 16),
        ("vit_small_patch16_224", 1024, 16),
    ]
    run_cases("train", measure, cases, ("test_resnet", 32, 4))


if __name__ == "__main__":
    main()
