"""The whole workflow on synthetic photographs, in minutes on a CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfundus.errors import ConfigError

if TYPE_CHECKING:
    from fastfundus.training.observer import Observer

__all__ = ["EPOCHS", "PATIENTS", "DemoResult", "run_demo"]

# The command line reads these settings for its help, so this module imports heavy packages only when the demo runs.
PATIENTS = 300
"""Synthetic patients to train on, with two photos each."""
CLINIC_PATIENTS = 30
"""Synthetic patients to screen, with two photos each."""
SIZE_PX = 112
BACKBONE = "tf_efficientnet_lite0"
"""Starts from the ImageNet weights that the extra "train" installs."""
EPOCHS = 3
LEARNING_RATE = 1e-3
MIN_AUROC = 0.9
"""The demo fails if its model reaches less than this on held-out synthetic patients."""
_STAMP = ".fastfundus-demo"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Outcome of the demo."""

    times: list[tuple[str, float]]
    """Stages in order, and their seconds."""
    auroc: dict[str, Any]
    """AUROC on held-out synthetic patients, with its interval."""
    largest_difference: float
    """Largest difference in any probability between engine and model."""
    speedup: float
    """Throughput of the engine, relative to the model in torch float32."""
    inputs: int
    """Number of files to screen."""
    statuses: dict[str, int]
    """Number of result rows by status, the most frequent first."""
    images_per_s: float
    """Throughput of screening, end to end."""
    run_page: Path
    report: Path

    @property
    def rows(self) -> int:
        """Number of result rows."""
        return sum(self.statuses.values())

    @property
    def fault(self) -> str | None:
        """What the demo's own check found; None if it passed."""
        if self.auroc["value"] < MIN_AUROC:
            return f"AUROC {self.auroc['value']:.3f} is below {MIN_AUROC}: the demo's own check failed"
        if self.rows != self.inputs:
            return "some inputs have no row: the demo's own check failed"
        return None


def run_demo(
    output: str | Path,
    *,
    overwrite: bool = False,
    patients: int = PATIENTS,
    epochs: int = EPOCHS,
    observe: Callable[[], AbstractContextManager[Observer | None]] = nullcontext,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> DemoResult:
    """Run the whole workflow on synthetic photos: prepare, train, build-engine, screen, report.

    Args:
        output: folder to create.
        overwrite: replace the output of an earlier demo.
        patients: patients to train on.
        epochs: number of epochs.
        observe: called when training begins; returns a context manager whose value receives progress callbacks.
        on_stage: called with the description of each stage before it begins.

    Raises:
        ConfigError: `output` is not empty, and is not the output of a demo or may not be replaced.
    """
    from fastfundus.config import TrainConfig
    from fastfundus.data.source import list_photos
    from fastfundus.screening.run import screen_to_folder
    from fastfundus.workflow.build_engine import build_engine
    from fastfundus.workflow.prepare import prepare
    from fastfundus.workflow.train import train_run

    folder = Path(output)
    _begin_folder(folder, overwrite)
    photos, clinic, run = folder / "photos", folder / "clinic", folder / "run"
    stages = _Stages(on_stage)
    with stages.timed(f"drawing {2 * patients} photos to train on, and {2 * CLINIC_PATIENTS} to screen"):
        _draw_photos(photos, clinic, patients)
    with stages.timed("prepare"):
        cache = prepare(photos, folder / "cache", labels=photos / "labels.csv", size=SIZE_PX, backend="cpu")
    with stages.timed("train --amp"), observe() as observer:
        config = TrainConfig.from_dict(_settings(epochs))
        point = train_run(cache, run, config, observer=observer)["labels"]["abnormal"]
    with stages.timed("build-engine"):
        # Trying 8 bits takes two minutes with this network: its layers are quantised one by one.
        bundle, parity = build_engine(run, folder / "bundle", precision="fp32")
    with stages.timed("screen"):
        listing = list_photos(clinic, adapter="folder")
        screened = screen_to_folder(listing, bundle, folder / "screening", sources=[clinic])
    return DemoResult(
        times=stages.times,
        auroc=point["test"]["auroc"],
        largest_difference=parity.largest_difference,
        speedup=parity.images_per_s / parity.torch_images_per_s,
        inputs=len(listing.photos),
        statuses=dict(screened.results["status"].value_counts(sort=True).iter_rows()),
        images_per_s=screened.timing.images_per_s,
        run_page=run / "run.html",
        report=screened.report,
    )


class _Stages:
    """Announces and times the stages of the demo."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self.times: list[tuple[str, float]] = []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self._on_stage(stage)
        began = time.perf_counter()
        yield
        self.times.append((stage, time.perf_counter() - began))


def _settings(epochs: int) -> dict[str, Any]:
    return {
        "model": {"backbone": BACKBONE},
        "loop": {"epochs": epochs},
        "optimizer": {"learning_rate": LEARNING_RATE},
    }


def _begin_folder(folder: Path, overwrite: bool) -> None:
    """Create the output folder, and mark it as that of a demo."""
    if folder.exists() and any(folder.iterdir()):
        # Only delete folders that a demo created.
        if not (overwrite and (folder / _STAMP).is_file()):
            raise ConfigError(
                f"{folder} is not empty; add --overwrite if it is the output of a demo, or choose another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STAMP).touch()


def _draw_photos(photos: Path, clinic: Path, patients: int) -> None:
    """Draw photos to train on into one folder, and photos to screen, some of them broken, into another."""
    from fastfundus.synthetic import write_dataset

    write_dataset(photos, patients, seed=1, long_sides=(512, 640, 768))
    write_dataset(clinic, CLINIC_PATIENTS, seed=6, abnormal_share=0.3, poor_share=0.12, long_sides=(1024, 1536, 2048))
    _break_some(clinic / "images")


def _break_some(folder: Path) -> None:
    """Add an empty file, a text file named as a JPEG, and half a JPEG."""
    whole = next(iter(sorted(folder.glob("*.jpg")))).read_bytes()
    (folder / "broken_empty.jpg").write_bytes(b"")
    (folder / "broken_text.jpg").write_text("not a photograph\n")
    (folder / "broken_truncated.jpg").write_bytes(whole[: len(whole) // 2])
