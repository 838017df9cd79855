"""Screening of camera JPEGs on the CPU, against a typical PyTorch loop and its own stages, interleaved in one run.

    make bench SUITES=screen        timed; needs FASTFUNDUS_DATA
    make test-long                  once with tiny synthetic photos

In the typical loop, a DataLoader with one worker per core decodes with PIL and resizes and normalises with torchvision,
and torch runs the model eagerly in float32 in batches of 16. The photos are camera JPEGs of 10 megapixels. The model is
ResNet-50 at 512 px with random weights, because speed does not depend on them. The peers have their own process, as
their users run them; they do not find the field, check quality, or hash files. Every answer of ours is compared with
torch's in float32 on the same prepared photos.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.harness.comparison import Case, Variant, compare
from bench.harness.own_process import OwnProcess
from bench.harness.real_photos import DATA, need
from bench.suites.bench_engine import BATCH, by_torch, drawn, flops_of, random_model
from bench.tables.model_tables import DECODING, SCREEN_BEST, SCREEN_PEERS
from fastfundus.data import list_photos
from fastfundus.engines.build import build_bundle
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.openvino_backend import precisions
from fastfundus.engines.parity import GATES
from fastfundus.engines.runtime import Engine
from fastfundus.engines.select_precision import ParityData
from fastfundus.errors import GateRefused
from fastfundus.photo.memory import keep_memory
from fastfundus.records import SourcePhoto
from fastfundus.screening.decode_pool import DecodePool
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo


def bundle_of(backbone: str, size: int, precision: str, folder: Path) -> tuple[Bundle, ScreeningModel]:
    """Build a bundle with random weights; return it and its model."""
    model = random_model(backbone, size)
    photos = drawn(size, 24)
    # The threshold is far from the outputs of random weights, so no decision depends on the last digit.
    point = {
        "temperature": 1.0,
        "threshold": 0.9,
        "finding": True,
        "target_sensitivity": None,
        "note": "random weights",
    }
    bundle, _ = build_bundle(
        model, PreprocessSpec(size=size), {"abnormal": point | {"test": None}},
        ParityData(photos[:8], None, photos[8:]),
        folder, provenance={"backbone": backbone}, precision=precision,
    )  # fmt: skip
    return bundle, model


class PeerPhotos(Dataset[torch.Tensor]):
    """Photos, read and transformed as the peers do."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        spec = PreprocessSpec(size=size)
        self.transform = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def by_peers(backbone: str, paths: list[Path], size: int, batch: int, workers: int) -> Callable[[], np.ndarray]:
    """Return a job that scores photos as the peers do; float32 [N, 1]."""
    network = random_model(backbone, size).network

    def job() -> np.ndarray:
        loader = DataLoader(PeerPhotos(paths, size), batch_size=batch, num_workers=workers)
        with torch.inference_mode():
            return torch.cat([torch.sigmoid(network(batch)) for batch in loader]).numpy()

    return job


def prepared(photos: list[SourcePhoto], spec: PreprocessSpec) -> np.ndarray:
    """Read and prepare photos on all cores without an engine; uint8 [N, S, S, 3]."""
    decode_pool = DecodePool(spec)
    pending = [decode_pool.begin(photo) for photo in photos]
    images = [decode_pool.take(photo).image for photo in pending]
    decode_pool.close()
    assert all(image is not None for image in images), "not every photo was prepared"
    return np.stack([image for image in images if image is not None])


class Screening:
    """The engine of one precision, alone and as a stage of `screen`; it is loaded around each call."""

    def __init__(self, bundle: Bundle, photos: list[SourcePhoto], images: np.ndarray) -> None:
        self.bundle, self.photos, self.images = bundle, photos, images
        self.engine: Engine | None = None
        self.timing = Timing()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Keep the engine loaded within the context."""
        with self.bundle.load() as self.engine:
            yield

    def alone(self) -> np.ndarray:
        """Run the engine on prepared photos."""
        assert self.engine is not None
        parts = range(0, len(self.images), BATCH)
        return np.concatenate([self.engine.infer(self.images[row : row + BATCH]) for row in parts])

    def whole(self) -> np.ndarray:
        """Screen from files to answers; a photo without an answer gives NaN, which no tolerance allows."""
        self.timing = Timing()
        rows = screen_photos(self.photos, self.bundle, self.timing, engine=self.engine)
        nothing = np.full(1, np.nan, np.float32)
        return np.stack([nothing if row.answer is None else row.answer for row in rows])


def screening(
    folder: Path, paths: list[Path], backbone: str, size: int, kinds: Sequence[str], *, here: bool
) -> tuple[Case, list[Variant], dict[str, Screening]]:
    """Build the case, its variants, and our screening by precision; the peers run in this process if `here`."""
    listing = list_photos(paths, adapter="folder").photos
    made: dict[str, Bundle] = {}
    for precision in kinds:
        try:
            made[precision], model = bundle_of(backbone, size, precision, folder / precision)
        except GateRefused as error:
            print(f"{precision}: {error}", flush=True)
    spec = PreprocessSpec(size=size)
    images = prepared(listing, spec)
    exact = by_torch(model)(images)
    ways = {precision: Screening(bundle, listing, images) for precision, bundle in made.items()}

    def from_torch(got: np.ndarray, _: Any) -> float:
        return float(np.abs(got - exact).max()) if got.shape == exact.shape else np.inf

    read = sum(path.stat().st_size for path in paths)
    case = Case(
        f"screen, {backbone}, {size} px",
        f"{len(paths)} camera JPEGs of {read / len(paths) / 1e6:.1f} MB, from file to decision",
        len(paths), read, "the files read", flops_of(backbone, size) * len(paths), "those of the network",
    )  # fmt: skip
    variants = [
        # The peers squeeze photos instead of cropping them, so their scores are comparable only with each other.
        Variant(
            SCREEN_PEERS,
            OwnProcess(by_peers, backbone, paths, size, BATCH, os.cpu_count(), here=here),
            True,
            f"batches of {BATCH}, one worker per core",
        ),
        # Less memory is allocated from and returned to the system between layers.
        Variant(
            SCREEN_BEST,
            OwnProcess(by_peers, backbone, paths, size, 1, 0, here=here),
            False,
            "no batches, no workers; its fastest setting here",
            1e-3,
        ),
        Variant(DECODING, lambda: prepared(listing, spec), distance=lambda got, _: float(np.abs(got - images).max())),
    ]
    for precision, way in ways.items():
        jobs: dict[str, Callable[[], np.ndarray]] = {"engine alone": way.alone, "screen": way.whole}
        variants += [
            Variant(f"{what}, {precision}", job, False, "", GATES[precision].probability, from_torch, way.loaded)
            for what, job in jobs.items()
        ]
    return case, variants, ways


def some_photos(folder: Path, *, tiny: bool) -> list[Path]:
    """Return 64 links to the real photos, repeated as needed, or two synthetic photos if `tiny`."""
    if tiny:
        for seed in range(2):
            image = draw_photo(seed, long_side=320).image
            cv2.imwrite(str(folder / f"{seed}.jpg"), image[..., ::-1])
        return sorted(folder.glob("*.jpg"))
    need(DATA / "fullres_dr")
    originals = sorted((DATA / "fullres_dr").rglob("*.jp*g"))
    for number in range(64):
        (folder / f"{number:03d}.jpg").symlink_to(originals[number % len(originals)].resolve())
    return sorted(folder.glob("*.jpg"))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the exporters' own warnings
def test_screen(benchmark: Any, tmp_path: Path) -> None:
    """Measure the path from files to answers, and each stage alone."""
    keep_memory()
    tiny = benchmark.disabled
    (tmp_path / "photos").mkdir()
    paths = some_photos(tmp_path / "photos", tiny=tiny)
    job = ("resnet18", 64, ["fp32"]) if tiny else ("resnet50", 512, precisions())
    case, variants, ways = screening(tmp_path, paths, *job, here=tiny)
    compare(case, variants, rounds=3, benchmark=benchmark)
    busy = {precision: way.timing.busy | {"cores": way.timing.cores_busy} for precision, way in ways.items()}
    benchmark.extra_info["busy"] = busy
    benchmark.extra_info["mean_bytes"] = case.bytes / case.units
