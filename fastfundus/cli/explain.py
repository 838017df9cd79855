"""The ``fastfundus explain`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastfundus.evaluate.explain import Explainer
    from fastfundus.train.run import Run

_LONGEST_PX = 1024
_SHOWN_PX = 288


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the heatmaps.")
@click.option("--label", metavar="NAME", help="Output to explain  [default: the first finding]")
@click.option(
    "--method", type=click.Choice(["gradcam", "occlusion"]), default="gradcam", show_default=True,
    help="Explanation method; occlusion works with every network but is over 100 times slower.",
)  # fmt: skip
@click.option(
    "--most",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Maximum number of photos per outcome of a cache.",
)
def explain(run: Path, sources: tuple[Path, ...], output: Path, label: str | None, method: str, most: int) -> None:
    r"""Draw heatmaps of the image regions that RUN relies on.

    SOURCES are photos, folders or CSV files: each photo gets a heatmap overlay in its original frame, a row in
    explain.csv, and an entry in explain.html. Alternatively, SOURCES is one cache: explain.html then shows its test
    patients by outcome, with a faithfulness test of the heatmaps.

    \b
    Example:
      fastfundus explain run/ photo.jpg --output heatmaps/
      fastfundus explain run/ cache/ --output sheets/
    """
    from fastfundus.errors import ConfigError, close_matches, require

    require("torch", extra="train")
    from fastfundus.evaluate.explain import Explainer
    from fastfundus.train.run import Run

    opened = Run.open(run)
    if opened.config.task == "vessels":
        raise ConfigError(
            "runs that map vessels need no heatmap, because their output is a map; screen photos with their bundle"
        )
    explainer = Explainer(opened, method)  # type: ignore[arg-type]
    name = label or _first_finding(opened)
    if name not in opened.labels:
        raise ConfigError(f"--label {name!r} is not an output of the run{close_matches(name, opened.labels)}")
    output.mkdir(parents=True, exist_ok=True)
    whole = len(sources) == 1 and (sources[0] / "manifest.parquet").is_file()
    page = (
        _cache(opened, explainer, sources[0], output, name, most)
        if whole
        else _photos(opened, explainer, sources, output, name)
    )
    click.echo(page)


def _first_finding(run: Run) -> str:
    from fastfundus.train.targets import finding_outputs

    found = finding_outputs(run.labels, run.config.data.findings)
    return next(name for name in run.labels if name in found or not found)


def _photos(run: Run, explainer: Explainer, sources: tuple[Path, ...], output: Path, name: str) -> Path:
    """Write heatmaps of photos in their original frame; return the page."""
    import cv2
    import polars as pl

    from fastfundus.cli.console import progress_bar, quiet_decoders, remarks
    from fastfundus.data.source import list_photos
    from fastfundus.evaluate.sheets import Shown, write_sheet
    from fastfundus.pictures import thumbnail, with_heat

    quiet_decoders()
    listing = list_photos(sources, adapter="folder")
    remarks([*listing.notes, *listing.lost])
    rows: list[dict[str, Any]] = []
    shown: list[Shown] = []
    with progress_bar() as bar:
        task = bar.add_task("explaining", total=len(listing.photos))
        for number, source in enumerate(listing.photos):
            row, overlay, photo, heat = _one(run, explainer, source.path, name)
            rows.append({"path": source.name, **row})
            if overlay is not None:
                # Numbered, because photos of different folders may have the same name.
                file = output / f"{number:05d}_{Path(source.name).stem[:80]}.jpg"
                cv2.imwrite(str(file), overlay[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
                rows[-1]["heatmap"] = file.name
                if len(shown) < 200:
                    pictures = thumbnail(photo, _SHOWN_PX), thumbnail(with_heat(photo, heat), _SHOWN_PX)
                    shown.append(Shown(source.name, f"p({name}) = {row[f'p_{name}']:.3f}", *pictures))
            bar.advance(task)
    order = ["path", "status", "reason", f"p_{name}", "hottest_x_px", "hottest_y_px", "heatmap"]
    pl.DataFrame([dict.fromkeys(order) | row for row in rows], infer_schema_length=None).select(order).write_csv(
        output / "explain.csv"
    )
    left = sum(row["status"] != "ok" for row in rows)
    facts = [
        f"{name}, by {explainer.method}; {len(rows)} photos, of which {left} cannot be scored (reasons in explain.csv)"
    ]
    write_sheet(output / "explain.html", "Where the network looks", facts, [("Photos", shown)])
    return output / "explain.html"


def _one(run: Run, explainer: Explainer, path: Path, name: str) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return the row, the heatmap over the photo in its original frame, the crop, and the heat of the crop."""
    import cv2
    import numpy as np

    from fastfundus.data.masks import native_map
    from fastfundus.errors import PhotoError
    from fastfundus.photo.file import read_photo
    from fastfundus.photo.prepare import decode_at, prepare_bytes
    from fastfundus.pictures import with_heat

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
        "window_x_px": left, "window_y_px": top, "window_side_px": side,
        "width_px": whole.shape[1], "height_px": whole.shape[0],
    }  # fmt: skip
    spread = native_map(square, frame)
    y, x = np.unravel_index(int(spread.argmax()), spread.shape)
    row |= {
        f"p_{name}": float(found.chances[0, place]),
        "hottest_x_px": round((x + 0.5) / scale), "hottest_y_px": round((y + 0.5) / scale),
    }  # fmt: skip
    return row, with_heat(whole, spread), known.image, heat


def _cache(run: Run, explainer: Explainer, path: Path, output: Path, name: str, most: int) -> Path:
    """Write a sheet for each outcome, and test the faithfulness of the true positives' heatmaps; return the page."""
    import json

    import numpy as np

    from fastfundus.data import PhotoCache
    from fastfundus.evaluate.explain import faithfulness
    from fastfundus.evaluate.measured import rows_to_measure
    from fastfundus.evaluate.metrics import mean_with_interval
    from fastfundus.evaluate.sheets import Shown, outcome_rows, write_sheet
    from fastfundus.pictures import thumbnail, with_heat
    from fastfundus.records import interval_text
    from fastfundus.train.targets import read_targets, usable_rows

    cache = PhotoCache.open(path)
    targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    rows, which = rows_to_measure(run, cache, usable_rows(cache.manifest, targets))
    place = run.labels.index(name)
    chances = explainer.chances(cache.photos[rows])[:, place]
    chosen = outcome_rows(chances, targets.truth[rows, place], explainer.thresholds[place], most=most)
    groups, document = [], {}
    for outcome, numbers in chosen.items():
        photos = np.ascontiguousarray(cache.photos[rows[numbers]])
        heat = explainer.explain(photos).heat[:, place] if len(numbers) else np.zeros((0, 1, 1), np.float32)
        names = cache.manifest["path"].gather(rows[numbers]).to_list()
        groups.append(
            (
                outcome,
                [
                    Shown(file, f"p({name}) = {chances[number]:.3f}", thumbnail(photo, _SHOWN_PX),
                          thumbnail(with_heat(photo, hot), _SHOWN_PX))
                    for file, number, photo, hot in zip(names, numbers, photos, heat, strict=True)
                ],
            )
        )  # fmt: skip
        if outcome == "true positives" and len(numbers):
            told = faithfulness(explainer, photos, heat, place)
            patients = cache.manifest["patient"].gather(rows[numbers]).to_list()
            document = {
                key: mean_with_interval(getattr(told, key), patients).to_dict()
                for key in ("deletion", "insertion", "random_deletion", "random_insertion")
            }
    facts = [f"{name}, by {explainer.method}; {which} of {path}, threshold {explainer.thresholds[place]:.3f}"]
    if document:
        told_as = {key: interval_text(value) for key, value in document.items()}
        facts += [
            f"Faithfulness on {len(chosen['true positives'])} true positives, area under the probability curve: "
            f"deletion {told_as['deletion']} (random order {told_as['random_deletion']}; lower is better), insertion "
            f"{told_as['insertion']} (random order {told_as['random_insertion']}; higher is better)."
        ]
    (output / "faithfulness.json").write_text(json.dumps(document, indent=1) + "\n")
    write_sheet(output / "explain.html", f"Where the network looks: {name}", facts, groups)
    return output / "explain.html"
