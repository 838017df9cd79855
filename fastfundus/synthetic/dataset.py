"""Complete synthetic datasets: patients, eyes, labels and files."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from fastfundus.errors import ConfigError
from fastfundus.machine import usable_cores
from fastfundus.synthetic.draw import SyntheticPhoto, draw_photo
from fastfundus.synthetic.optics import CAMERAS, QUALITIES
from fastfundus.synthetic.pathology import LESIONS

__all__ = ["LABEL_COLUMNS", "PhotoPlan", "plan_dataset", "write_dataset"]

LABEL_COLUMNS = ("file", "patient", "eye", "abnormal", *LESIONS, "image_quality", "camera")
"""Columns of the `labels.csv` that `write_dataset` writes."""


@dataclass(frozen=True, slots=True)
class PhotoPlan:
    """All parameters of one photo, small enough to send between processes."""

    patient: str
    seed: int
    patient_seed: int
    eye: str
    lesions: tuple[str, ...]
    camera: int
    quality: str
    long_side: int

    @property
    def stem(self) -> str:
        """File name without its extension."""
        return f"{self.patient}_{'left' if self.eye == 'L' else 'right'}"

    def draw(self) -> SyntheticPhoto:
        """Draw the photo."""
        return draw_photo(
            self.seed,
            patient_seed=self.patient_seed,
            eye=self.eye,
            lesions=self.lesions,
            camera=CAMERAS[self.camera],
            quality=self.quality,
            long_side=self.long_side,
        )


def plan_dataset(
    patients: int,
    *,
    seed: int = 0,
    abnormal_share: float = 0.5,
    poor_share: float = 0.06,
    long_sides: Sequence[int] = (768, 1024, 1280),
) -> list[PhotoPlan]:
    """Plan the photos of both eyes of every patient.

    Args:
        patients: Number of patients, at least 1.
        seed: Seed of the whole dataset; a larger dataset with the same seed begins with the same patients.
        abnormal_share: Probability that a patient is diseased. With probability 0.7 both eyes of a diseased patient are
            abnormal, otherwise one.
        poor_share: Probability that a photo is blurred, dark or cut.
        long_sides: Frame widths to choose from, in pixels.

    Raises:
        ConfigError: `patients` is below 1 or a share is outside 0 to 1.
    """
    if patients < 1:
        raise ConfigError(f"number of synthetic patients must be at least 1, got {patients}")
    for name, share in [("abnormal_share", abnormal_share), ("poor_share", poor_share)]:
        if not 0 <= share <= 1:
            raise ConfigError(f"synthetic {name} must be 0 to 1, got {share}")
    plans = []
    for index in range(patients):
        rng = np.random.default_rng([seed, index])
        patient_seed = int(rng.integers(2**31))
        # A clinic has one camera, and a patient visits one clinic.
        camera = int(rng.integers(len(CAMERAS)))
        long_side = int(rng.choice(np.asarray(long_sides)))
        diseased = rng.uniform() < abnormal_share
        affected = {"L", "R"} if rng.uniform() < 0.7 else {str(rng.choice(["L", "R"]))}
        # The eyes of one patient share their diseases; one eye in three has a second finding.
        shared = [str(kind) for kind in rng.choice(LESIONS, 2, replace=False)]
        for eye in ("L", "R"):
            count = 1 + int(rng.uniform() < 1 / 3)
            lesions = tuple(shared[:count]) if diseased and eye in affected else ()
            quality = str(rng.choice(QUALITIES[1:])) if rng.uniform() < poor_share else "good"
            plans.append(
                PhotoPlan(
                    patient=f"p{index:05d}",
                    seed=int(rng.integers(2**31)),
                    patient_seed=patient_seed,
                    eye=eye,
                    lesions=lesions,
                    camera=camera,
                    quality=quality,
                    long_side=long_side,
                )
            )
    return plans


def _write_photo(plan: PhotoPlan, folder: Path, masks: bool) -> None:
    cv2.setNumThreads(1)  # there is one process per core; OpenCV threads would compete for them
    photo = plan.draw()
    path = folder / "images" / f"{plan.stem}.jpg"
    cv2.imwrite(str(path), cv2.cvtColor(photo.image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    if masks:
        for name, mask in [("vessels", photo.vessel_mask), ("disc", photo.disc_mask), ("cup", photo.cup_mask)]:
            cv2.imwrite(str(folder / "masks" / name / f"{plan.stem}.png"), mask)


def write_dataset(
    folder: str | os.PathLike[str],
    patients: int,
    *,
    seed: int = 0,
    abnormal_share: float = 0.5,
    poor_share: float = 0.06,
    long_sides: Sequence[int] = (768, 1024, 1280),
    masks: bool = False,
    workers: int | None = None,
) -> list[PhotoPlan]:
    """Draw a dataset into a folder: `images/*.jpg`, `labels.csv` and optionally `masks/{vessels,disc,cup}/*.png`.

    Args:
        folder: Output folder, created if missing; existing files of the same names are overwritten.
        patients: See `plan_dataset`.
        seed: See `plan_dataset`.
        abnormal_share: See `plan_dataset`.
        poor_share: See `plan_dataset`.
        long_sides: See `plan_dataset`.
        masks: Write the masks as well.
        workers: Number of processes; None uses one per usable core.

    Returns:
        The plan of every photo, in the order of `labels.csv`.

    Raises:
        ConfigError: See `plan_dataset`.
    """
    folder = Path(folder)
    plans = plan_dataset(
        patients, seed=seed, abnormal_share=abnormal_share, poor_share=poor_share, long_sides=long_sides
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if masks:
        for name in ("vessels", "disc", "cup"):
            (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LABEL_COLUMNS)
        for plan in plans:
            flags = [int(kind in plan.lesions) for kind in LESIONS]
            abnormal = int(bool(plan.lesions))
            row = [f"images/{plan.stem}.jpg", plan.patient, plan.eye, abnormal, *flags]
            writer.writerow([*row, plan.quality, CAMERAS[plan.camera].name])
    workers = min(workers or usable_cores(), len(plans))
    if workers == 1:
        for plan in plans:
            _write_photo(plan, folder, masks)
    else:
        # Forking a process that runs threads (a progress bar, torch) can deadlock, so spawn new processes.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_photo, plans, [folder] * len(plans), [masks] * len(plans), chunksize=8))
    return plans
