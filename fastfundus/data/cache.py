"""The photo cache: every photo decoded once, as `photos.npy` uint8 [N, S, S, 3] beside `manifest.parquet`.

Row i of the manifest describes photo i; a photo that could not be used has a row with its status and zeros for pixels
(the file is sparse: they cost no disk). A cache is built beside its final place and moved there when complete; a build
that was interrupted goes on where it stopped, and a later build takes over unchanged photos.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.errors import DataError
from fastfundus.photo.prepare import PreparedPhoto, prepare_photo
from fastfundus.records import SourcePhoto, Status
from fastfundus.spec import PreprocessSpec, fingerprint_of

__all__ = ["MANIFEST_COLUMNS", "SCHEMA", "PhotoCache", "build_cache"]

SCHEMA = 1
"""Version of the cache's files."""
MANIFEST_COLUMNS: dict[str, Any] = {
    "path": pl.String,
    "sha256": pl.String,
    "status": pl.String,
    "reason": pl.String,
    "patient": pl.String,
    "patient_known": pl.Boolean,
    "eye": pl.String,
    "split": pl.String,
    "width_px": pl.Int32,
    "height_px": pl.Int32,
    "field_x_px": pl.Float64,
    "field_y_px": pl.Float64,
    "field_radius_px": pl.Float64,
    "field_confidence": pl.Float64,
    "quality": pl.Float64,
    "bytes": pl.Int64,
    "mtime_ns": pl.Int64,
}
"""Columns every manifest has; those of the label file follow, numbers as Float64 and text as String."""


@dataclass(frozen=True, slots=True)
class PhotoCache:
    """A complete cache, opened for reading."""

    path: Path
    spec: PreprocessSpec
    photos: NDArray[np.uint8]
    """[N, S, S, 3] RGB, memory-mapped, read-only."""
    manifest: pl.DataFrame
    """N rows; the columns are `MANIFEST_COLUMNS` and those of the label file."""
    source: Path
    """The folder that `path` in the manifest is relative to."""

    @classmethod
    def open(cls, path: Path) -> PhotoCache:
        """Open a cache.

        Raises:
            DataError: it is no cache, incomplete, damaged, or written by a newer FastFundus.
        """
        if not (path / "spec.json").is_file():
            unfinished = _partial(path).is_dir()
            hint = (
                "its preparation was interrupted: run the same prepare again"
                if unfinished
                else "run fastfundus prepare"
            )
            raise DataError(f"is no photo cache; {hint}", path=path)
        about = json.loads((path / "spec.json").read_text())
        if about.get("schema") != SCHEMA:
            raise DataError(
                f"has schema {about.get('schema')}, this FastFundus reads {SCHEMA}; prepare it again", path=path
            )
        spec = PreprocessSpec.from_dict(about["spec"])
        try:
            photos = np.load(path / "photos.npy", mmap_mode="r", allow_pickle=False)
            manifest = pl.read_parquet(path / "manifest.parquet")
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise DataError(f"is damaged ({error}); delete it and prepare it again", path=path) from None
        expected = (len(manifest), spec.size, spec.size, 3)
        if photos.shape != expected or photos.dtype != np.uint8:
            raise DataError(
                f"holds {photos.dtype} {photos.shape}, its manifest says {expected}; prepare it again", path=path
            )
        return cls(path, spec, photos, manifest, Path(about["source"]))


def build_cache(
    photos: Sequence[SourcePhoto],
    output: Path,
    spec: PreprocessSpec,
    *,
    source: Path,
    workers: int | None = None,
    on_photo: Callable[[Status], None] = lambda status: None,
) -> PhotoCache:
    """Prepare photos into a cache.

    Args:
        photos: the inputs; each becomes one row, in this order.
        output: the cache's folder. A cache with the same spec that is there already is brought up to date.
        spec: what to make of each photo.
        source: the folder that the photos' names are relative to.
        workers: decoding threads; None takes one a core.
        on_photo: called with the status of each photo as it is done.

    Raises:
        DataError: `output` holds something else, or a label column has a name that the manifest uses.
        SpecMismatch: `output` is a cache with another spec.
    """
    _check_columns(photos)
    previous = _Previous(output, spec)
    partial, done = _begin(photos, output, spec)
    store = np.lib.format.open_memmap(partial / "photos.npy", mode="r+")
    # One decoding thread a core: OpenCV's own threads would only fight over them.
    cv2.setNumThreads(1)
    # Line by line to disk, so that a build killed at any moment keeps every finished photo.
    with (partial / "rows.jsonl").open("a", buffering=1, encoding="utf-8") as journal:
        pending: deque[tuple[int, Future[tuple[dict[str, Any], NDArray[np.uint8] | None]]]] = deque()
        todo = [index for index in range(len(photos)) if index not in done]
        for row in done.values():
            on_photo(Status(row["status"]))
        workers = workers or os.cpu_count() or 1
        with ThreadPoolExecutor(workers, "prepare") as pool:
            try:
                for index in todo:
                    pending.append((index, pool.submit(_prepare_row, photos[index], spec, previous)))
                    # A few finished photos wait for their turn, never the whole set: memory stays bounded.
                    if len(pending) > 4 * workers:
                        _store(pending.popleft(), store, journal, done, on_photo)
                while pending:
                    _store(pending.popleft(), store, journal, done, on_photo)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    store.flush()
    del store
    _write_manifest(partial, photos, done)
    about = {
        "schema": SCHEMA,
        "spec": spec.to_dict(),
        "fingerprint": spec.fingerprint,
        "source": str(source.absolute()),
    }
    (partial / "spec.json").write_text(json.dumps(about, indent=1) + "\n")
    _move_into_place(partial, output)
    return PhotoCache.open(output)


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _check_columns(photos: Sequence[SourcePhoto]) -> None:
    taken = {name for photo in photos for name in photo.columns if name in MANIFEST_COLUMNS}
    if taken:
        raise DataError(f"the label column {sorted(taken)[0]!r} has a name that the manifest uses; rename it")


class _Previous:
    """Rows of a cache that is being brought up to date, by name."""

    def __init__(self, output: Path, spec: PreprocessSpec) -> None:
        self.cache: PhotoCache | None = None
        self.rows: dict[str, tuple[int, dict[str, Any]]] = {}
        if output.exists():
            if not output.is_dir() or (any(output.iterdir()) and not (output / "spec.json").is_file()):
                raise DataError("is there already and is no photo cache; choose another --output", path=output)
            if not (output / "spec.json").is_file():
                return
            self.cache = PhotoCache.open(output)
            self.cache.spec.require_same(spec, mine=f"the cache {output}", theirs="this command")
            kept = self.cache.manifest.select(list(MANIFEST_COLUMNS)).rows(named=True)
            self.rows = {row["path"]: (index, row) for index, row in enumerate(kept)}

    def find(self, name: str, size: int, mtime_ns: int) -> tuple[dict[str, Any], NDArray[np.uint8]] | None:
        """An unchanged photo's row and pixels."""
        index, row = self.rows.get(name, (-1, {}))
        if self.cache is None or index < 0 or (row["bytes"], row["mtime_ns"]) != (size, mtime_ns) or not row["sha256"]:
            return None
        return row, self.cache.photos[index]


def _begin(photos: Sequence[SourcePhoto], output: Path, spec: PreprocessSpec) -> tuple[Path, dict[int, dict[str, Any]]]:
    """Make the folder to build in, or take up one that was left by an interrupted build of the same photos."""
    partial = _partial(output)
    stamps = [(photo.name, *_stamp(photo.path)) for photo in photos]
    build = {"inputs": fingerprint_of([spec.fingerprint, *map(list, stamps)])}
    if (partial / "build.json").is_file() and json.loads((partial / "build.json").read_text()) == build:
        return partial, _read_journal(partial / "rows.jsonl")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    shape = (len(photos), spec.size, spec.size, 3)
    np.lib.format.open_memmap(partial / "photos.npy", mode="w+", dtype=np.uint8, shape=shape)
    (partial / "build.json").write_text(json.dumps(build))
    return partial, {}


def _read_journal(path: Path) -> dict[int, dict[str, Any]]:
    done: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return done
    whole = path.read_text(encoding="utf-8")
    # A kill may leave half a line at the end: that photo is prepared again, and the line must not glue to the next.
    complete = whole[: whole.rfind("\n") + 1]
    path.write_text(complete, encoding="utf-8")
    for line in complete.splitlines():
        entry = json.loads(line)
        done[entry.pop("index")] = entry
    return done


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time; zeros for a file that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _prepare_row(
    photo: SourcePhoto, spec: PreprocessSpec, previous: _Previous
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    size, mtime_ns = _stamp(photo.path)
    known = previous.find(photo.name, size, mtime_ns)
    if known is not None:
        return known
    if photo.issue is not None:
        result = PreparedPhoto(Status.UNREADABLE, photo.issue)
    else:
        result = prepare_photo(photo.path, spec)
    circle = result.field
    row = {
        "path": photo.name,
        "sha256": result.sha256,
        "status": result.status.value,
        "reason": result.reason,
        "width_px": result.width_px,
        "height_px": result.height_px,
        "field_x_px": circle and circle.x_px,
        "field_y_px": circle and circle.y_px,
        "field_radius_px": circle and circle.radius_px,
        "field_confidence": circle and circle.confidence,
        "quality": result.quality,
        "bytes": size,
        "mtime_ns": mtime_ns,
    }
    return row, result.image


def _store(
    item: tuple[int, Future[tuple[dict[str, Any], NDArray[np.uint8] | None]]],
    store: NDArray[np.uint8],
    journal: Any,
    done: dict[int, dict[str, Any]],
    on_photo: Callable[[Status], None],
) -> None:
    index, future = item
    row, image = future.result()
    if image is not None:
        store[index] = image
    done[index] = row
    journal.write(json.dumps({"index": index, **row}) + "\n")
    on_photo(Status(row["status"]))


def _write_manifest(partial: Path, photos: Sequence[SourcePhoto], done: dict[int, dict[str, Any]]) -> None:
    extra = list(dict.fromkeys(name for photo in photos for name in photo.columns))
    rows = []
    for index, photo in enumerate(photos):
        about = {
            "patient": photo.patient,
            "patient_known": photo.patient_known,
            "eye": photo.eye,
            "split": photo.split,
        }
        rows.append({**done[index], **about})
    columns = [pl.Series(name, [row[name] for row in rows], kind) for name, kind in MANIFEST_COLUMNS.items()]
    for name in extra:
        values = [photo.columns.get(name) for photo in photos]
        if any(isinstance(value, str) for value in values):
            columns.append(pl.Series(name, [None if value is None else _text(value) for value in values], pl.String))
        else:
            columns.append(pl.Series(name, values, pl.Float64))
    pl.DataFrame(columns).write_parquet(partial / "manifest.parquet")


def _text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def _move_into_place(partial: Path, output: Path) -> None:
    for name in ("rows.jsonl", "build.json"):
        (partial / name).unlink()
    replaced = output.with_name(output.name + ".replaced")
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    if replaced.exists():
        shutil.rmtree(replaced)
