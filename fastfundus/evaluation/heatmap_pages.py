"""Pages of heatmaps: of single photos in their original frame, and of a cache's test patients by outcome."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.csv_cells import csv_text
from fastfundus.data.cache import PhotoCache
from fastfundus.data.masks import native_map
from fastfundus.errors import PhotoError
from fastfundus.evaluation.explain import Explainer, faithfulness
from fastfundus.evaluation.locked_run import rows_to_measure
from fastfundus.evaluation.metrics import mean_with_interval
from fastfundus.evaluation.sheets import Shown, outcome_rows, write_sheet
from fastfundus.photo.file import read_photo
from fastfundus.photo.prepare import decode_at, prepare_bytes
from fastfundus.pictures import thumbnail, with_heat
from fastfundus.records import SourcePhoto, interval_text
from fastfundus.training.run import Run
from fastfundus.training.tasks.targets import read_targets, usable_rows

__all__ = ["explain_cache", "explain_photos"]

_LONGEST_PX = 1024
_SHOWN_PX = 288
_MAX_SHOWN = 200
_CURVES = ("deletion", "insertion", "random_deletion", "random_insertion")


def explain_photos(
    run: Run,
    explainer: Explainer,
    photos: Sequence[SourcePhoto],
    output: Path,
    name: str,
    on_photo: Callable[[int, int], None],
) -> Path:
    """Write a heatmap of each photo in its original frame, explain.csv and explain.html; return the page.

    Args:
        run: the run.
        explainer: its explainer.
        photos: the photos.
        output: folder of the page, created if need be.
        name: output to explain.
        on_photo: called with the number of photos explained and their total.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    shown: list[Shown] = []
    for number, source in enumerate(photos):
        row, overlay, photo, heat = _explain_photo(run, explainer, source.path, name)
        rows.append({"path": source.name, **row})
        if overlay is not None:
            # Numbered, because photos of different folders may have the same name.
            file = output / f"{number:05d}_{Path(source.name).stem[:80]}.jpg"
            cv2.imwrite(str(file), overlay[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
            rows[-1]["heatmap"] = file.name
            if len(shown) < _MAX_SHOWN:
                pictures = thumbnail(photo, _SHOWN_PX), thumbnail(with_heat(photo, heat), _SHOWN_PX)
                shown.append(Shown(source.name, f"p({name}) = {row[f'p_{name}']:.3f}", *pictures))
        on_photo(number + 1, len(photos))
    order = ["path", "status", "reason", f"p_{name}", "hottest_x_px", "hottest_y_px", "heatmap"]
    table = pl.DataFrame([dict.fromkeys(order) | row for row in rows], infer_schema_length=None).select(order)
    (output / "explain.csv").write_text(csv_text(table), encoding="utf-8", newline="")
    left = sum(row["status"] != "ok" for row in rows)
    facts = [
        f"{name}, by {explainer.method}; {len(rows)} photos, of which {left} cannot be scored (reasons in explain.csv)"
    ]
    write_sheet(output / "explain.html", "Where the network looks", facts, [("Photos", shown)])
    return output / "explain.html"


def _explain_photo(run: Run, explainer: Explainer, path: Path, name: str) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return the row, the heatmap over the photo in its original frame, the crop, and the heat of the crop."""
    try:
        data = read_photo(path)
    except PhotoError as error:
        return {"status": error.status.value, "reason": error.reason}, None, None, None
    known = prepare_bytes(data, run.spec)
    row: dict[str, Any] = {"status": known.status.value, "reason": known.reason or None}
    if known.status != "ok" or known.image is None or known.window is None:
        return row, None, None, None
    place = run.labels.index(name)
    found = explainer.explain(known.image[None])
    heat = found.heat[0, place]
    whole = decode_at(data, min(_LONGEST_PX, known.width_px, known.height_px))
    scale = whole.shape[1] / known.width_px
    left, top, side = (value * scale for value in known.window)
    square = cv2.resize(heat, (run.spec.size, run.spec.size), interpolation=cv2.INTER_CUBIC).clip(0)
    frame = {
        "window_x_px": left,
        "window_y_px": top,
        "window_side_px": side,
        "width_px": whole.shape[1],
        "height_px": whole.shape[0],
    }
    spread = native_map(square, frame)
    row[f"p_{name}"] = float(found.probabilities[0, place])
    if spread.max() > 0:
        y, x = np.unravel_index(int(spread.argmax()), spread.shape)
        row |= {"hottest_x_px": round((x + 0.5) / scale), "hottest_y_px": round((y + 0.5) / scale)}
    else:
        row["reason"] = f"no region raises the probability of {name}: the heatmap is empty"
    return row, with_heat(whole, spread), known.image, heat


def explain_cache(run: Run, explainer: Explainer, cache: PhotoCache, output: Path, name: str, max_photos: int) -> Path:
    """Write a page of heatmaps by outcome, with a faithfulness test of those of the true positives; return the page.

    Args:
        run: the run.
        explainer: its explainer.
        cache: photos with labels; those the run has not learned from are used.
        output: folder of the page, created if need be.
        name: output to explain.
        max_photos: maximum number of photos per outcome.
    """
    targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    rows, which = rows_to_measure(run, cache, usable_rows(cache.manifest, targets))
    place = run.labels.index(name)
    probabilities = explainer.probabilities(cache.photos[rows])[:, place]
    chosen = outcome_rows(probabilities, targets.truth[rows, place], explainer.thresholds[place], limit=max_photos)
    groups: list[tuple[str, list[Shown]]] = []
    document: dict[str, Any] = {}
    for outcome, numbers in chosen.items():
        photos = np.ascontiguousarray(cache.photos[rows[numbers]])
        heat = explainer.explain(photos).heat[:, place] if len(numbers) else np.zeros((0, 1, 1), np.float32)
        names = cache.manifest["path"].gather(rows[numbers]).to_list()
        texts = [f"p({name}) = {probabilities[number]:.3f}" for number in numbers]
        groups.append((outcome, _shown(names, texts, photos, heat)))
        if outcome == "true positives" and len(numbers):
            curves = faithfulness(explainer, photos, heat, place)
            patients = cache.manifest["patient"].gather(rows[numbers]).to_list()
            document = {key: mean_with_interval(getattr(curves, key), patients).to_dict() for key in _CURVES}
    facts = [f"{name}, by {explainer.method}; {which} of {cache.path}, threshold {explainer.thresholds[place]:.3f}"]
    if document:
        text = {key: interval_text(value) for key, value in document.items()}
        facts += [
            f"Faithfulness on {len(chosen['true positives'])} true positives, area under the probability curve: "
            f"deletion {text['deletion']} (random order {text['random_deletion']}; lower is better), insertion "
            f"{text['insertion']} (random order {text['random_insertion']}; higher is better)."
        ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "faithfulness.json").write_text(json.dumps(document, indent=1) + "\n")
    write_sheet(output / "explain.html", f"Where the network looks: {name}", facts, groups)
    return output / "explain.html"


def _shown(
    names: Sequence[str], texts: Sequence[str], photos: NDArray[np.uint8], heat: NDArray[np.float32]
) -> list[Shown]:
    return [
        Shown(file, text, thumbnail(photo, _SHOWN_PX), thumbnail(with_heat(photo, hot), _SHOWN_PX))
        for file, text, photo, hot in zip(names, texts, photos, heat, strict=True)
    ]
