"""The photos shown in a report: the highest-scored ones, and the first of those without a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.errors import PhotoError
from fastfundus.machine import usable_cores
from fastfundus.photo.file import read_photo
from fastfundus.photo.isolation import prepare_isolated
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.pictures import blend, thumbnail, with_heat
from fastfundus.records import Status
from fastfundus.screening.policy import NEGATIVE
from fastfundus.screening.results import makes_maps

__all__ = ["MAX_SHOWN", "ShownPhoto", "others", "worst"]

MAX_SHOWN = 60
"""Maximum number of photos in each of the report's two tables; `results.csv` lists all."""
_THUMB_PX = 144
_VESSELS = (60, 255, 160)
"""A green that does not occur in retinas."""


@dataclass(frozen=True, slots=True)
class ShownPhoto:
    """One photo of the report."""

    row: dict[str, Any]
    """The photo's row in the results."""
    finding: str
    """The finding whose probability exceeds its threshold by most."""
    score: float
    """Probability of that finding, or the share of a map's pixels."""
    thumb: str
    """Data URL of the photo; empty if the file no longer exists as it was screened."""
    overlay: str = ""
    """Data URL of the photo with its mask or heatmap drawn over it. Negatives get no heatmap: it would mislead."""


def worst(results: pl.DataFrame, bundle: Bundle, paths: Mapping[str, Path], output: Path) -> list[ShownPhoto]:
    """Return the scored photos that exceed a threshold by most, in descending order.

    Args:
        results: one row per input.
        bundle: the bundle they were screened with.
        paths: file of each input, by its name.
        output: results folder, from which masks are read.
    """
    labels = list(bundle.findings or bundle.labels)
    column = "share" if makes_maps(bundle) else "p"
    above = {
        name: pl.col(f"{column}_{name}") - (0.0 if makes_maps(bundle) else bundle.threshold_of(name)) for name in labels
    }
    ranked = (
        results.filter(pl.col("status") == Status.OK.value)
        .with_columns(pl.max_horizontal(*above.values()).alias("_above"))
        .sort("_above", descending=True, maintain_order=True)
        .head(MAX_SHOWN)
    )
    which = ranked.select(pl.concat_list(*above.values()).list.arg_max()).to_series().to_list() if len(ranked) else []
    rows = ranked.drop("_above").to_dicts()
    mapper = Heatmapper(bundle) if rows and Heatmapper.available(bundle) else None
    shown = []
    for row, number, photo in zip(rows, which, _prepared(rows, paths, bundle), strict=True):
        name = labels[number]
        thumb = overlay = ""
        if photo is not None and photo.image is not None:
            thumb = thumbnail(photo.image, _THUMB_PX)
            if makes_maps(bundle):
                overlay = _with_mask(photo, output / row[f"mask_{name}"])
            elif mapper is not None and row["decision"] != NEGATIVE:
                heat = mapper.heat(photo.image)[bundle.labels.index(name)]
                overlay = thumbnail(with_heat(photo.image, heat), _THUMB_PX)
        shown.append(ShownPhoto(row, name, float(row[f"{column}_{name}"]), thumb, overlay))
    return shown


def others(results: pl.DataFrame, bundle: Bundle, paths: Mapping[str, Path]) -> list[ShownPhoto]:
    """Return the first photos without a score."""
    rows = results.filter(pl.col("status") != Status.OK.value).head(MAX_SHOWN).to_dicts()
    photos = _prepared(rows, paths, bundle)
    return [
        ShownPhoto(row, "", 0.0, "" if photo is None or photo.image is None else thumbnail(photo.image, _THUMB_PX))
        for row, photo in zip(rows, photos, strict=True)
    ]


def _prepared(rows: Iterable[dict[str, Any]], paths: Mapping[str, Path], bundle: Bundle) -> list[PreparedPhoto | None]:
    """Prepare the photos again; None for those without pixels to show or whose file changed since the screening.

    Keeping images during the screening would cost memory, and a resumed run does not have those of its earlier part.
    """

    def again(row: dict[str, Any]) -> PreparedPhoto | None:
        if row["status"] not in (Status.OK.value, Status.UNGRADABLE.value, Status.FAILED.value):
            return None
        try:
            photo = prepare_isolated(read_photo(paths[row["path"]]), bundle.spec)
        except PhotoError:
            return None
        return photo if photo.sha256 == row["sha256"] else None

    with ThreadPoolExecutor(usable_cores()) as threads:
        return list(threads.map(again, rows))


def _with_mask(photo: PreparedPhoto, file: Path) -> str:
    """Draw a mask, a PNG in the coordinates of the original photo, over a prepared photo."""
    mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    if mask is None or photo.image is None or photo.window is None:
        return ""
    left, top, side = photo.window
    size = len(photo.image)
    # Map pixel centres of the crop to pixel centres of the mask.
    step = side / size
    matrix = np.array([[step, 0, left + step / 2 - 0.5], [0, step, top + step / 2 - 0.5]])
    seen = cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return thumbnail(blend(photo.image, seen.astype(np.float32) / 255, np.array(_VESSELS)), _THUMB_PX)
