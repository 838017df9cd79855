"""Screening with DALI: photos are decoded, cropped and scored on one device; only finished crops reach the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fastfundus.dali.decode import DaliDecoder
from fastfundus.dali.prepare import DaliPreparer
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.errors import ConfigError
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import SourcePhoto, Status
from fastfundus.screening.output import Store
from fastfundus.screening.pipeline import Timing, cpu_s, make_result
from fastfundus.screening.run import BlockMaker, row_of
from fastfundus.screening.scorer import Answer, Scorer

__all__ = ["GROUP", "dali_blocks"]

_ON_DEVICE = ("tensorrt", "tensorrt-rtx", "aoti")
GROUP = 32
"""Photos that are decoded and scored together. A group never spans more than one block."""

_Prepared = tuple[list[PreparedPhoto], dict[int, torch.Tensor]]


def dali_blocks(device_id: int | None) -> BlockMaker:
    """Return a block maker that decodes with DALI; see `run.BlockMaker`.

    Each group is decoded while the previous one is scored. Crops stay on the device for the engine and are also copied
    to the host, where their quality is assessed. Files that DALI does not accept go to the CPU decoder. DALI's grey
    levels differ from the CPU's by half a level (docs/kernels.md), so results may differ in their last digits.

    Args:
        device_id: index of the GPU; None decodes on the CPU.

    Raises:
        ConfigError: raised by the returned function if the bundle's engine accepts photos only from the host.
    """

    def make(
        store: Store, missing: Sequence[int], timing: Timing, on_rows: Callable[[int], None]
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        bundle = store.bundle
        if bundle.backend not in _ON_DEVICE:
            raise ConfigError(
                f"{bundle.path}: the backend {bundle.backend} accepts photos only from the host; build it with "
                f"--backend {', '.join(_ON_DEVICE[:-1])} or {_ON_DEVICE[-1]}, or decode with --decode cpu"
            )
        began, began_cpu = time.perf_counter(), cpu_s()
        with bundle.load() as engine, ThreadPoolExecutor(1, "decoding") as ahead:
            device = _Device(engine, bundle, DaliDecoder(device_id=device_id, batch_size=GROUP))
            timing.workers = timing.readers = 1
            parts = [
                (block, photos[first : first + GROUP])
                for block in missing
                for photos in [store.inputs_of(block)]
                for first in range(0, len(photos), GROUP)
            ]
            rows: list[dict[str, Any]] = []
            following = ahead.submit(device.prepare, parts[0][1])
            for number, (block, photos) in enumerate(parts):
                prepared, images = following.result()
                if number + 1 < len(parts):
                    following = ahead.submit(device.prepare, parts[number + 1][1])
                answers = device.score(prepared, images)
                for source, photo, answer in zip(photos, prepared, answers, strict=True):
                    rows.append(row_of(make_result(source, photo, answer, bundle, store.policy), bundle, store.output))
                timing.photos += len(photos)
                timing.decode, timing.engine = device.decode_s, device.scorer.seconds
                timing.wall, timing.cpu = time.perf_counter() - began, cpu_s() - began_cpu
                on_rows(len(photos))
                if len(rows) == len(store.inputs_of(block)):
                    yield block, rows
                    rows = []

    return make


class _Device:
    """A decoder and an engine on one device."""

    def __init__(self, engine: Engine, bundle: Bundle, decoder: DaliDecoder) -> None:
        self._preparer, self._device = DaliPreparer(bundle.spec, decoder), decoder.device
        self._engine = engine
        self.scorer = Scorer(engine.name, self._infer)
        self.decode_s = 0.0

    def prepare(self, photos: list[SourcePhoto]) -> _Prepared:
        """Read, decode and crop a group of photos."""
        began = time.perf_counter()
        there = {n: photo.path for n, photo in enumerate(photos) if photo.issue is None}
        found, on_device = self._preparer.prepare(list(there.values()))
        positions = list(there)
        known = dict(zip(positions, found, strict=True))
        prepared = [
            known.get(n) or PreparedPhoto(Status.UNREADABLE, photo.issue or "") for n, photo in enumerate(photos)
        ]
        self.decode_s += time.perf_counter() - began
        return prepared, {positions[place]: image for place, image in on_device.items()}

    def score(self, prepared: list[PreparedPhoto], images: dict[int, torch.Tensor]) -> Iterator[Answer | None]:
        """Return the answer for each photo of a group, or None if the photo was not scored."""
        scored = [n for n, photo in enumerate(prepared) if photo.status is Status.OK and photo.image is not None]
        given = [images[n] if n in images else torch.from_numpy(prepared[n].image).to(self._device) for n in scored]
        answers = iter(self.scorer.score(given)) if given else iter(())
        asked = set(scored)
        return iter([next(answers) if n in asked else None for n in range(len(prepared))])

    def _infer(self, images: Sequence[torch.Tensor]) -> Any:
        batch = torch.stack(list(images))
        if batch.is_cuda:
            # The engine uses another stream than torch.
            torch.cuda.current_stream(self._device).synchronize()
        return self._engine.infer_on_device(batch, guard=True)
