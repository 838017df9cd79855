"""HTML page for visual inspection of a cache: a thumbnail of each photo with its field circle, next to the crop."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import PhotoError
from fastfundus.pages import write_page
from fastfundus.photo.file import read_photo
from fastfundus.photo.prepare import decode_at

__all__ = ["MAX_TILES", "write_preview"]

MAX_TILES = 400
_TILE_PX = 200


def write_preview(cache: PhotoCache, path: Path, *, limit: int = MAX_TILES) -> int:
    """Write one self-contained HTML file that shows the photos most in need of inspection first.

    These are the photos that could not be used, followed by those with the least certain field circles and the lowest
    quality. The remaining places are filled with a random sample, so that the page also shows typical photos.

    Args:
        cache: the cache to show.
        path: the file to write.
        limit: maximum number of photos on the page.

    Returns:
        The number of photos shown.
    """
    rows = _chosen(cache.manifest, limit)
    tiles = [_tile(cache, int(row)) for row in rows]
    statuses = cache.manifest["status"].value_counts(sort=True).rows()
    write_page(
        path,
        "data/preview.html",
        cache=cache.path.name,
        tiles=tiles,
        total=len(cache.manifest),
        statuses=statuses,
        size=cache.spec.size,
    )
    return len(tiles)


def _chosen(manifest: pl.DataFrame, limit: int) -> NDArray[np.int64]:
    table = manifest.select("status", "field_confidence", "field_shape", "quality").with_row_index("row")
    doubt = pl.min_horizontal(pl.col("field_confidence").fill_null(0.0), pl.col("quality").fill_null(0.0))
    odd = (pl.col("status") != "ok") | (pl.col("field_shape").fill_null("none") != "round")
    sure = pl.col("field_confidence").fill_null(0.0) >= 0.9
    table = table.with_columns(doubt=doubt, odd=odd | ~sure).sort(
        "odd", "doubt", "row", descending=[True, False, False]
    )
    rows = table["row"].to_numpy().astype(np.int64)
    if len(rows) <= limit:
        return rows
    # At least a quarter of the page shows typical photos.
    first = min(int(table["odd"].sum()), limit - limit // 4)
    rest = np.random.default_rng(0).choice(rows[first:], limit - first, replace=False)
    return np.concatenate([rows[:first], np.sort(rest)])


def _tile(cache: PhotoCache, row: int) -> dict[str, Any]:
    record = cache.manifest.row(row, named=True)
    shown = {"name": record["path"], "status": record["status"], "reason": record["reason"]}
    shown["facts"] = ", ".join(
        f"{word} {record[column]:.2f}"
        for word, column in (("field", "field_confidence"), ("quality", "quality"))
        if record[column] is not None
    )
    if record["field_shape"] not in (None, "round"):
        shown["facts"] += f", {record['field_shape']}"
    if record["status"] == "ok" and record["field_shape"] is None:
        shown["facts"] += ", whole frame"
    try:
        shown["photo"] = _encoded(_with_circle(decode_at(read_photo(cache.source / record["path"]), _TILE_PX), record))
    except PhotoError:
        # The reason is shown below the empty tile.
        shown["photo"] = None
    shown["crop"] = _encoded(_shrunk(np.asarray(cache.photos[row]))) if record["pixels_crc32"] is not None else None
    return shown


def _with_circle(rgb: NDArray[np.uint8], record: dict[str, Any]) -> NDArray[np.uint8]:
    full_width = record["width_px"] or rgb.shape[1]
    small = _shrunk(rgb)
    if record["field_x_px"] is not None:
        scale = small.shape[1] / full_width
        x, y, radius = (record[name] * scale for name in ("field_x_px", "field_y_px", "field_radius_px"))
        # The centre of pixel 0 is at 0.5; 1/16 pixel precision keeps the line on the circle.
        centre = (round((x - 0.5) * 16), round((y - 0.5) * 16))
        cv2.circle(small, centre, round(radius * 16), (0, 255, 90), 1, cv2.LINE_AA, shift=4)
    return small


def _shrunk(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = min(1.0, _TILE_PX / max(rgb.shape[:2]))
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def _encoded(rgb: NDArray[np.uint8]) -> str:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
