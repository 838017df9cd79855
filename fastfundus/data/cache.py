"""The photo cache: every photo decoded once, as uint8 [N, S, S, 3] in `photos.npy`, with `manifest.parquet`.

Row i of the manifest describes photo i; a photo that could not be used has a row with its status, and zeros as pixels.
`duplicates.parquet` lists duplicates and near duplicates among photos of different patients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.data.store import SHARD_BYTES, CheckedPhotos, PhotoArray, checksum_of, open_photos
from fastfundus.errors import ConfigError, DataError, PhotoError
from fastfundus.files import read_small
from fastfundus.photo.file import read_photo
from fastfundus.spec import PreprocessSpec

__all__ = ["DUPLICATE_COLUMNS", "MANIFEST_COLUMNS", "SCHEMA", "PhotoCache"]

SCHEMA = 3
"""Version of the cache format."""
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
    "field_shape": pl.String,
    "window_x_px": pl.Int32,
    "window_y_px": pl.Int32,
    "window_side_px": pl.Int32,
    "quality": pl.Float64,
    "camera": pl.String,
    "pixel_spacing_mm": pl.Float64,
    "look": pl.String,
    "pixels_crc32": pl.UInt32,
    "bytes": pl.Int64,
    "mtime_ns": pl.Int64,
}
"""Columns of every manifest; those of the label file follow, numbers as Float64 and text as String."""
DUPLICATE_COLUMNS = {
    "row_a": pl.Int64,
    "row_b": pl.Int64,
    "kind": pl.String,
    "likeness": pl.Float64,
}
"""Columns of `duplicates.parquet`: two rows of the manifest; the kind of pair, "same bytes", "looks the same" (near
duplicate) or "mirrored" (flipped near duplicate); and the correlation of details."""


@dataclass(frozen=True, slots=True, repr=False)
class PhotoCache:
    """A complete photo cache opened for reading."""

    path: Path
    spec: PreprocessSpec
    """How the pixels were prepared; mean and std have no meaning here."""
    photos: PhotoArray
    """[N, S, S, 3] uint8 RGB, memory-mapped, read-only."""
    manifest: pl.DataFrame
    """N rows with `MANIFEST_COLUMNS` and the columns of the label file."""
    source: Path
    """Folder to which `path` in the manifest is relative."""
    salted: str | None = None
    """Identifier of the salt used to hash patients; None if they are not hashed."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where patients, eyes, splits and labels come from, by role; see `data.source.SourceList`."""
    notes: tuple[str, ...] = ()
    """Remarks made while the photos were listed."""

    def __repr__(self) -> str:
        usable = int((self.manifest["status"] == "ok").sum())
        return (
            f"{type(self).__name__}({str(self.path)!r}, {len(self.manifest)} photos, {usable} ok, {self.spec.size} px)"
        )

    @classmethod
    def open(cls, path: str | Path) -> PhotoCache:
        """Open a cache; `joined_cache.open_caches` opens several as one.

        Raises:
            DataError: the folder is not a cache, or is incomplete, damaged or of another version of FastFundus.
        """
        path = Path(path)
        if not (path / "spec.json").is_file():
            unfinished = partial_folder(path).is_dir()
            hint = (
                "its preparation was interrupted: run the same prepare command again"
                if unfinished
                else "write one with fastfundus prepare PHOTOS --output CACHE"
            )
            what = "is not a photo cache" if path.exists() else "does not exist"
            raise DataError(f"{what}; {hint}", path=path)
        try:
            metadata = _Metadata.read(path)
            manifest = _read_parquet(path / "manifest.parquet")
            _check_manifest(manifest)
            photos = open_photos(path, len(manifest), metadata.spec.size, metadata.photos_per_file)
        except (OSError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise DataError(f"is damaged ({error}); delete it and prepare it again", path=path) from None
        photos = CheckedPhotos(photos, manifest["pixels_crc32"].to_list(), manifest["path"].to_list(), path)
        return cls(
            path, metadata.spec, photos, manifest, metadata.source, metadata.salted, metadata.origins, metadata.notes
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of the cache; more than one only for joined caches."""
        return (self.path,)

    def duplicates(self) -> pl.DataFrame:
        """Return duplicates and near duplicates among photos of different patients, with `DUPLICATE_COLUMNS`."""
        try:
            pairs = _read_parquet(self.path / "duplicates.parquet")
            if {name: pairs.schema.get(name) for name in DUPLICATE_COLUMNS} != DUPLICATE_COLUMNS:
                raise ValueError("duplicates.parquet: has other columns")
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"is damaged ({reason}); delete it and prepare it again", path=self.path) from None
        # A build that is just finishing may have written its pairs before its manifest.
        return pairs.filter(pl.col("row_b") < len(self.manifest))

    def verify(self, *, sources: bool = False, on_photo: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Verify the checksums of the pixels and, with `sources`, of the source files.

        Yields:
            One line for each fault.
        """
        rows = self.manifest.select("path", "sha256", "pixels_crc32").iter_rows()
        pixels = self.photos.unchecked if isinstance(self.photos, CheckedPhotos) else self.photos
        for row, (name, sha256, checksum) in enumerate(rows):
            if checksum is not None and checksum_of(pixels[row]) != checksum:
                yield f"{name}: the pixels in the cache have changed; delete the cache and prepare it again"
            if sources and sha256:
                yield from self._verify_source(name, sha256)
            on_photo()

    def _verify_source(self, name: str, sha256: str) -> Iterator[str]:
        try:
            if hashlib.sha256(read_photo(self.source / name)).hexdigest() != sha256:
                yield f"{name}: the file has changed since it was prepared; run prepare again"
        except PhotoError as error:
            yield f"{name}: {error.reason}"


def _read_parquet(file: Path) -> pl.DataFrame:
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    return pl.read_parquet(file, memory_map=False)


def _check_manifest(manifest: pl.DataFrame) -> None:
    for name, kind in MANIFEST_COLUMNS.items():
        if manifest.schema.get(name) != kind:
            raise ValueError(f"manifest.parquet: its column {name!r} is {manifest.schema.get(name) or 'missing'}")
    for name in ("path", "status", "patient"):
        if manifest[name].null_count():
            raise ValueError(f"manifest.parquet: its column {name!r} is incomplete")


_TYPES = {"source": str, "salted": str | None, "photos_per_file": int, "origins": dict, "notes": list}


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The contents of `spec.json`."""

    spec: PreprocessSpec
    source: Path
    salted: str | None
    photos_per_file: int
    origins: dict[str, str]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> _Metadata:
        """Read the file in a cache folder.

        Raises:
            DataError: it was written by another version of FastFundus, or a setting is out of range.
            OSError: it cannot be read.
            ValueError: it is not JSON, lacks a value, or has one of the wrong type.
        """
        try:
            stored = json.loads(read_small(path / "spec.json"))
            if stored.get("schema") != SCHEMA:
                raise DataError(
                    f"has schema {stored.get('schema')}, this version reads {SCHEMA}; prepare it again into a new "
                    "folder",
                    path=path,
                )
            # Caches of earlier versions also stored a mean and std, which belong to the model.
            whole = PreprocessSpec.from_dict(stored["spec"])
            spec = whole.pixels
            if stored.get("fingerprint") not in (whole.fingerprint, spec.fingerprint):
                raise ValueError("its settings do not have its fingerprint")
            stored = {"origins": {}, "notes": []} | stored
            for name, kind in _TYPES.items():
                if not isinstance(stored[name], kind) or stored[name] is True:
                    raise ValueError(f"{name} is {stored[name]!r}")
            if stored["photos_per_file"] < 1:
                raise ValueError(f"photos_per_file is {stored['photos_per_file']}")
            return cls(
                spec, Path(stored["source"]), stored["salted"], stored["photos_per_file"], stored["origins"],
                tuple(map(str, stored["notes"])),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"spec.json: has no {error}") from None
        except ConfigError as error:
            raise DataError(f"cannot be used: {error}", path=path / "spec.json") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"spec.json: {error}") from None


def partial_folder(output: Path) -> Path:
    """Return the folder in which a build in progress keeps its files."""
    return output.with_name(output.name + ".partial")


def photos_per_file(size: int) -> int:
    """Return the number of photos of `size` pixels per file."""
    return max(1, SHARD_BYTES // (size * size * 3))
