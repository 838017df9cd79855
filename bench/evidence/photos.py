"""Accuracy of field detection and quality checks, on synthetic photos with known truth and on real photos.

    python -m bench.evidence.photos [--output bench/results/photos_YYYYMM.json]        `make photos`

Synthetic photos: error of the field circle, and number of refused photos per fault. Real photos (FASTFUNDUS_DATA):
statuses by folder, agreement with DRIVE's field masks, and refusals among photos with and without an ODIR quality flag.
Pictures of other things: those that scientific packages install, and those in the folder FASTFUNDUS_EVERYDAY, if set.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import skimage
import sklearn
from PIL import Image

from bench import RESULTS
from bench.harness.machine import environment
from bench.harness.real_photos import DATA, need
from fastfundus.machine import usable_cores
from fastfundus.photo.prepare import PreparedPhoto, prepare_bytes, prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import CAMERAS, LESIONS, QUALITIES, draw_photo

SPEC = PreprocessSpec(size=512)
FOLDERS = (
    "odir/images", "odir_more/images", "dr/images", "fullres_dr", "dme", "drive/images", "drishti/images", "hrf/images",
    "idrid/images", "rfmid", "eyepacs", "hard", "exif", "dicom",
)  # fmt: skip
PHOTOS = 120


def prepared(rgb: np.ndarray) -> PreparedPhoto:
    """Encode pixels as a JPEG, as a camera does, and prepare it."""
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return prepare_bytes(data.tobytes(), SPEC)


def labelled(rgb: np.ndarray) -> np.ndarray:
    """Add burned-in text."""
    rgb = rgb.copy()
    cv2.putText(rgb, "PATIENT 42  OD", (12, 50), 0, 1.4, (255, 255, 255), 3)
    return rgb


def barred(rgb: np.ndarray) -> np.ndarray:
    """Add bars at two edges."""
    rgb = rgb.copy()
    rgb[:, :16], rgb[-12:] = (240, 240, 240), (90, 90, 200)
    return rgb


def margined(rgb: np.ndarray) -> np.ndarray:
    """Add a white margin around the photo."""
    return cv2.copyMakeBorder(rgb, 60, 60, 60, 60, cv2.BORDER_CONSTANT, value=(255, 255, 255))


FRAMES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "unmodified": (lambda rgb: rgb, 0),
    "dark (15% of the brightness)": (lambda rgb: (rgb * 0.15).astype(np.uint8), 0),
    "haze over frame and field": (lambda rgb: (30 + rgb * 0.6).astype(np.uint8), 0),
    "burned-in text": (labelled, 0),
    "bars at two edges": (barred, 0),
    "white margin": (margined, 60),
}


def circle_errors() -> dict[str, Any]:
    """Measure the errors of centre and radius in percent of the radius, over cameras and frames."""
    found = {}
    for name, (change, offset) in FRAMES.items():
        centre, radius, missed = [], [], 0
        for seed in range(PHOTOS):
            lesions = () if seed % 2 else (LESIONS[seed // 2 % len(LESIONS)],)
            photo = draw_photo(1000 + seed, camera=CAMERAS[seed % len(CAMERAS)], lesions=lesions, long_side=1400)
            truth, circle = photo.field, prepared(change(photo.image)).field
            if circle is None:
                missed += 1
                continue
            away = np.hypot(circle.x_px - truth.x_px - offset, circle.y_px - truth.y_px - offset)
            centre.append(100 * away / truth.radius_px)
            radius.append(100 * (circle.radius_px - truth.radius_px) / truth.radius_px)
        found[name] = {
            "photos": PHOTOS,
            "no_circle": missed,
            "centre_mean": float(np.mean(centre)),
            "centre_95": float(np.percentile(centre, 95)),
            "centre_most": float(np.max(centre)),
            "radius_mean": float(np.mean(radius)),
            "radius_most": float(np.max(np.abs(radius))),
        }
    return found


def refused_faults() -> dict[str, Any]:
    """Count the refused photos of each fault, and their reasons."""
    found = {}
    for quality in QUALITIES:
        reasons: Counter[str] = Counter()
        for seed in range(PHOTOS):
            lesions = () if seed % 2 else (LESIONS[seed // 2 % len(LESIONS)],)
            camera = CAMERAS[seed % len(CAMERAS)]
            photo = draw_photo(2000 + seed, camera=camera, lesions=lesions, quality=quality, long_side=1024)
            result = prepared(photo.image)
            reasons[result.reason or "ok"] += 1
        found[quality] = {"photos": PHOTOS, "passed": reasons["ok"], "reasons": dict(reasons.most_common())}
    return found


def real_statuses() -> dict[str, Any]:
    """Count statuses, reasons and field shapes of all real photos, by folder."""
    sets = {folder: sorted(path for path in (DATA / folder).iterdir() if path.suffix != ".csv") for folder in FOLDERS}
    found = {}
    for folder, paths in (sets | everyday_photos()).items():
        with ThreadPoolExecutor(usable_cores()) as pool:
            results = list(pool.map(lambda path: prepare_photo(path, SPEC), paths))
        found[folder] = {
            "photos": len(results),
            "status": dict(Counter(result.status.value for result in results).most_common()),
            "reasons": dict(Counter(result.reason for result in results if result.reason).most_common()),
            "shapes": dict(Counter(result.field_shape or "whole frame" for result in results).most_common()),
            "named": {
                path.name: result.reason or str(result.field_shape)
                for path, result in zip(paths, results, strict=True)
                if len(results) < 60 and (result.reason or result.field_shape != "round")
            },
        }
        if folder == "odir/images":
            found["odir by flag"] = _by_flag({path.name: result for path, result in zip(paths, results, strict=True)})
    return found


def everyday_photos() -> dict[str, list[Path]]:
    """Return pictures of animals, people, buildings and other things that are not retinas, by origin."""
    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
        Path(mpl.get_data_path()) / "sample_data",
    ]
    pictures = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".png", ".jpg")]
    # These two show retinas.
    found = {"other things, packages": [path for path in pictures if path.stem not in ("retina", "microaneurysms")]}
    if folder := os.environ.get("FASTFUNDUS_EVERYDAY"):
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        found[f"other things, {Path(folder).name}"] = files
    return found


def _by_flag(results: dict[str, PreparedPhoto]) -> dict[str, Any]:
    with (DATA / "odir" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table: dict[str, Counter[str]] = {}
    for row in rows:
        groups = [row["quality_flags"] or "no flag", "normal" if row["normal"] == "1" else "abnormal"]
        groups += ["cataract"] if row["eye_C"] == "1" else []
        for group in groups:
            table.setdefault(group, Counter())[results[Path(row["file"]).name].status.value] += 1
    return {group: dict(counts) for group, counts in table.items()}


def drive_masks() -> dict[str, float]:
    """Return the Dice score of the detected circles against the field masks shipped with DRIVE."""
    scores = []
    for path in sorted((DATA / "drive" / "images").glob("*_training.tif")):
        with Image.open(DATA / "drive" / "mask" / f"{path.stem}_mask.gif") as stored:
            mask = np.array(stored) > 0
        circle = prepare_photo(path, SPEC).field
        assert circle is not None
        rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
        covered = np.hypot(columns + 0.5 - circle.x_px, rows + 0.5 - circle.y_px) < circle.radius_px
        scores.append(2 * (covered & mask).sum() / (covered.sum() + mask.sum()))
    return {"photos": len(scores), "dice_mean": float(np.mean(scores)), "dice_least": float(np.min(scores))}


def main() -> None:
    """Run the measurements and write the JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"photos_{time.strftime('%Y%m')}.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    need(DATA / "odir" / "labels.csv")
    cv2.setNumThreads(1)
    result = {
        "what": "field and quality",
        **environment(("opencv-python-headless", "simplejpeg", "pillow", "pydicom", "numpy")),
        "circle": circle_errors(),
        "faults": refused_faults(),
        "drive": drive_masks(),
        "real": real_statuses(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("circle", "faults", "drive", "real")}, indent=1))


if __name__ == "__main__":
    main()
