"""Parallel, crash-safe building of photo caches that reuses completed work.

A new cache is built next to its final location and moved there once complete. A cache that only gains photos is
extended in place: pixels are appended after the last photo and stay invisible to readers until the new manifest
replaces the old one. If photos changed or were removed, the cache is rebuilt next to the old one, from which unchanged
photos are copied. Each finished photo is recorded in a journal, so an interrupted build resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.data.cache import MANIFEST_COLUMNS, SCHEMA, PhotoCache, partial_folder, photos_per_file
from fastfundus.data.duplicates import write_duplicates
from fastfundus.data.journal import cut_lines, journal_rows, locked, mend_journal
from fastfundus.data.manifest import write_manifest
from fastfundus.data.rows import FACTS, Preparer, Row, file_stamp, identified, prepare_rows
from fastfundus.data.source import mark_missing
from fastfundus.data.store import PhotoStore, not_written
from fastfundus.errors import DataError
from fastfundus.files import atomic_write, refuse_mount_point, sync, sync_folder
from fastfundus.machine import usable_cores
from fastfundus.photo.memory import keep_memory
from fastfundus.records import PhotoFacts, SourcePhoto, Status
from fastfundus.spec import PreprocessSpec

__all__ = ["build_cache"]

_MAX_NOTES = 100


def build_cache(
    photos: Sequence[SourcePhoto],
    output: Path,
    spec: PreprocessSpec,
    *,
    source: Path,
    workers: int | None = None,
    prepare: Preparer | None = None,
    group: int = 1,
    patient_salt: bytes | None = None,
    origins: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    on_photo: Callable[[Status], None] = lambda status: None,
) -> PhotoCache:
    """Prepare photos and store them in a cache.

    Args:
        photos: the inputs; each becomes one row. A new cache keeps their order; photos added later are appended.
        output: folder of the cache. An existing cache with the same spec is brought up to date.
        spec: preprocessing applied to each photo.
        source: folder to which the names of the photos are relative.
        workers: number of decoding threads; None uses one per usable core.
        prepare: prepares `group` files per call, from `workers` threads; None prepares them one by one.
        group: number of files per call of `prepare`.
        patient_salt: replaces known patient identifiers by a keyed hash; None keeps them unchanged.
        origins: where patients, eyes, splits and labels come from, to be kept with the cache.
        notes: remarks on the listing, to be kept with the cache.
        on_photo: called with the status of each finished photo.

    Raises:
        DataError: `output` contains something else, a label column clashes with a manifest column, or the disk is full.
        SpecMismatch: `output` is a cache with a different spec.
    """
    _check_columns(photos)
    if output.is_symlink():
        output = output.resolve()  # otherwise the link would be moved instead of the cache
    keep_memory()
    # There is already one decoding thread per core; OpenCV's own threads would oversubscribe them.
    cv2.setNumThreads(1)
    finished = 0

    def count(status: Status) -> None:
        nonlocal finished
        finished += 1
        on_photo(status)

    try:
        with locked(output, output.with_name(output.name + ".lock"), "prepared"):
            build = _Build(photos, output, spec, patient_salt, prepare)
            try:
                for status in build.done():
                    count(status)
                _work(build, workers or usable_cores(), group, count)
                build.finish(source, origins or {}, notes)
            finally:
                build.store.close()
    except OSError as error:
        # Photos that cannot be read raise other errors, so this one comes from the output.
        raise not_written(output, error, finished) from error
    return PhotoCache.open(output)


def _work(build: _Build, workers: int, group: int, on_photo: Callable[[Status], None]) -> None:
    """Prepare the remaining photos in parallel and store them in order."""
    with build.journal() as journal, ThreadPoolExecutor(workers, "prepare") as pool:
        pending: deque[tuple[list[int], Future[list[Row]]]] = deque()

        def keep_first() -> None:
            indices, future = pending.popleft()
            for index, row in zip(indices, future.result(), strict=True):
                build.keep(index, row, journal, on_photo)

        try:
            todo = build.todo()
            while indices := list(islice(todo, group)):
                pending.append((indices, pool.submit(build.prepare, indices)))
                # Limit the number of pending results to bound memory.
                if len(pending) > (4 if group == 1 else 1) * workers:
                    keep_first()
            while pending:
                keep_first()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_columns(photos: Sequence[SourcePhoto]) -> None:
    taken = {name for photo in photos for name in photo.columns if name in MANIFEST_COLUMNS}
    if taken:
        raise DataError(f"the label column {sorted(taken)[0]!r} clashes with a manifest column; rename it")


class _Build:
    """State of one build: the existing cache, the remaining work, and the steps that complete the cache."""

    def __init__(
        self,
        photos: Sequence[SourcePhoto],
        output: Path,
        spec: PreprocessSpec,
        salt: bytes | None,
        preparer: Preparer | None,
    ) -> None:
        self.output, self.spec, self.salt, self.preparer = output, spec, salt, preparer
        self.salted = None if salt is None else hashlib.sha256(b"fastfundus" + salt).hexdigest()[:16]
        self.previous = _previous(output, spec, self.salted)
        self.photos, self.source_rows, self.extends = _order(photos, self.previous)
        self.partial = partial_folder(output)
        self.finished = 0
        # Found before the first photo is read: what vanishes later is no fault of its own.
        fresh = np.flatnonzero(self.source_rows < 0)
        marked = zip(fresh, mark_missing(self.photos[index] for index in fresh), strict=True)
        self.missing = {int(index): photo for index, photo in marked if photo is not self.photos[index]}
        where = output if self.extends else self.partial
        self.store = PhotoStore(where, spec.size, photos_per_file(spec.size))
        self._begin()

    def prepare(self, indices: list[int]) -> list[Row]:
        """Return rows and pixels of photos, copied from the previous cache where a rebuild finds them unchanged."""
        fresh = [self.missing.get(index, self.photos[index]) for index in indices if self.source_rows[index] < 0]
        rows = iter(prepare_rows(fresh, self.spec, self.salt, self.preparer))
        return [next(rows) if self.source_rows[index] < 0 else self._taken_over(index) for index in indices]

    def _taken_over(self, index: int) -> Row:
        assert self.previous is not None
        row = int(self.source_rows[index])
        known = self.previous.manifest.row(row, named=True)
        image = None if known["pixels_crc32"] is None else np.asarray(self.previous.photos[row])
        return {name: known[name] for name in FACTS}, image

    def todo(self) -> Iterator[int]:
        """Yield the positions of the remaining photos in order, skipping those in the journal."""
        for place, index in enumerate(self._all()):
            if place >= self.finished:
                yield int(index)

    def _all(self) -> NDArray[np.int64]:
        # When a cache is extended, unchanged photos keep their rows.
        return np.flatnonzero(self.source_rows < 0) if self.extends else np.arange(len(self.photos))

    def done(self) -> Iterator[Status]:
        """Yield the status of each photo that needs no work, and count the photos in the journal."""
        if self.extends:
            assert self.previous is not None
            yield from map(Status, self.previous.manifest["status"].to_numpy()[self.source_rows[self.source_rows >= 0]])
        for row in journal_rows(self.partial):
            self.finished += 1
            yield Status(row["status"])

    def journal(self) -> IO[str]:
        """Open the journal, line-buffered so that a crash at any moment loses no finished photo."""
        return (self.partial / "rows.jsonl").open("a", buffering=1, encoding="utf-8")

    def keep(self, index: int, result: Row, journal: IO[str], on_photo: Callable[[Status], None]) -> None:
        """Store one photo, then record it in the journal."""
        row, image = result
        if image is not None:
            self.store.write(index, image)
        elif self.extends and self.previous and index < len(self.previous.photos) and self.previous.photos[index].any():
            # Clear pixels left by an abandoned build: a photo that cannot be used is all zeros.
            self.store.write(index, np.zeros((self.spec.size, self.spec.size, 3), np.uint8))
        journal.write(json.dumps(row) + "\n")
        self.finished += 1
        on_photo(Status(row["status"]))

    def finish(self, source: Path, origins: Mapping[str, str], notes: Sequence[str]) -> None:
        """Write the manifest and the duplicates, and put the finished cache in place."""
        self.store.finish(len(self.photos))
        write_manifest(self.partial / "manifest.parquet", self.photos, self._rows())
        metadata = {
            "schema": SCHEMA,
            "spec": self.spec.to_pixels_dict(),
            "fingerprint": self.spec.pixels.fingerprint,
            "source": str(source.absolute()),
            "photos_per_file": photos_per_file(self.spec.size),
            "salted": self.salted,
            "origins": self._origins(origins),
            "notes": list(notes[:_MAX_NOTES]),
        }
        with atomic_write(self.partial / "spec.json") as file:
            file.write_text(json.dumps(metadata, indent=1) + "\n")
        where = self.output if self.extends else self.partial
        write_duplicates(self.partial, where, self.spec.size)
        if self.extends:
            # Replace the manifest last: readers derive the number of photos from it.
            for name in ("spec.json", "duplicates.parquet", "manifest.parquet"):
                sync(self.partial / name)
                os.replace(self.partial / name, self.output / name)
                sync(self.output)
            shutil.rmtree(self.partial)
        else:
            _move_into_place(self.partial, self.output)

    def _origins(self, origins: Mapping[str, str]) -> dict[str, str]:
        """Add DICOM as the origin of patients and eyes that the listing does not know."""
        said = dict(origins)
        if any(map(_may_be_dicom, self.photos)):
            for role in ("patient", "eye"):
                said[role] = f"{said[role]}, and DICOM" if role in said else "DICOM"
        return said

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the manifest columns of every photo, in order."""
        journal = journal_rows(self.partial)
        # An extended cache keeps its row order, so a single pass over the old manifest suffices.
        old: Iterator[dict[str, Any]] = iter(())
        if self.extends:
            assert self.previous is not None
            old = self.previous.manifest.select(FACTS).iter_rows(named=True)
        for photo, row in zip(self.photos, self.source_rows.tolist(), strict=True):
            facts = next(old, {})
            if not self.extends or row < 0:
                facts = next(journal)
            # The label file may name the patient by now.
            stored = facts["patient_known"] and (_may_be_dicom(photo) or not photo.patient_by_name)
            known_patient = facts["patient"] if stored else None
            said = PhotoFacts(known_patient, facts["eye"], facts["camera"])
            yield facts | identified(photo, said, self.salt)

    def _begin(self) -> None:
        """Create the build folder, or reuse that of an interrupted build of the same photos."""
        build = {"inputs": self._fingerprint()}
        noted = self.partial / "build.json"
        if _says(noted, build):
            mend_journal(self.partial)
            self._trust_journal()
            return
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self._check_room()
        self.partial.mkdir(parents=True)
        if self.extends:
            assert self.previous is not None
            self.store.cut(len(self.previous.manifest))
        with atomic_write(noted) as file:
            file.write_text(json.dumps(build))

    def _trust_journal(self) -> None:
        """Cut the journal at the first photo whose pixels a power failure lost: they are written in any order."""
        checksums = (row["pixels_crc32"] for row in journal_rows(self.partial))
        for count, (checksum, index) in enumerate(zip(checksums, self._all(), strict=False)):
            if checksum is not None and zlib.crc32(self.store.read(int(index))) != checksum:
                cut_lines(self.partial / "rows.jsonl", count)
                return

    def _fingerprint(self) -> str:
        """Hash everything the build depends on, incrementally, so that a list of millions is not copied."""
        digest = hashlib.sha256(f"{SCHEMA} {self.spec.pixels.fingerprint} {self.salted} {self.extends}".encode())
        for photo, row in zip(self.photos, self.source_rows.tolist(), strict=True):
            # A reused row implies that its file is unchanged, so it needs no new stamp.
            seen = file_stamp(photo.path) if row < 0 else ()
            digest.update(f"{photo.name}\0{seen}\0{row}\0{photo.issue}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _check_room(self) -> None:
        """Raise if the free disk space cannot hold the build."""
        needed = len(self._all()) * self.spec.size**2 * 3
        parent = next(folder for folder in self.output.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise DataError(
                f"needs up to {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; free up space, choose "
                "another --output, or lower --size",
                path=self.output,
            )


def _says(file: Path, content: dict[str, str]) -> bool:
    """Return whether a file contains some data; one that is damaged does not."""
    try:
        return bool(json.loads(file.read_text()) == content)
    except (OSError, ValueError):
        return False


def _previous(output: Path, spec: PreprocessSpec, salted: str | None) -> PhotoCache | None:
    """Return the existing cache to bring up to date, or None."""
    older = _replaced_folder(output)
    if not output.exists() and older.exists():
        # A previous build was killed between its two renames: restore the old cache. The new one is complete but not
        # yet in place.
        older.rename(output)
    elif older.exists():
        shutil.rmtree(older)
    if not output.exists():
        return None
    refuse_mount_point(output)
    if not output.is_dir() or (any(output.iterdir()) and not (output / "spec.json").is_file()):
        raise DataError("already exists and is not a photo cache; choose another --output", path=output)
    if not (output / "spec.json").is_file():
        return None
    cache = PhotoCache.open(output)
    cache.spec.require_same(
        spec,
        mine=f"the cache {output}",
        theirs="this command",
        advice="use the options that the cache was prepared with, or choose another --output",
    )
    if cache.salted != salted:
        raise DataError("was prepared with a different patient salt or none; use the same salt or another --output")
    return cache


def _order(
    photos: Sequence[SourcePhoto], previous: PhotoCache | None
) -> tuple[list[SourcePhoto], NDArray[np.int64], bool]:
    """Sort the photos into the order of their cache rows.

    Returns:
        The sorted photos; for each, the row of `previous` that still describes it, or -1; and whether `previous` can be
        extended. It can if it only lacks photos, because pixels that readers may be using are never modified.
    """
    if previous is None:
        return list(photos), np.full(len(photos), -1), False
    names = previous.manifest["path"].to_list()
    rows = {name: row for row, name in enumerate(names)}
    stamps = previous.manifest.select("bytes", "mtime_ns").rows()
    has_hash = previous.manifest["sha256"].str.len_chars().to_numpy() > 0
    has_pixels = previous.manifest["pixels_crc32"].is_not_null().to_numpy()
    known = {rows[photo.name]: photo for photo in photos if photo.name in rows}
    fresh = {
        row: bool(has_hash[row]) and photo.issue is None and file_stamp(photo.path) == stamps[row]
        for row, photo in known.items()
    }
    extends = len(known) == len(names) and all(fresh[row] or not has_pixels[row] for row in known)
    if not extends:
        ordered = list(photos)
        return ordered, np.array([rows[p.name] if fresh.get(rows.get(p.name, -1)) else -1 for p in ordered]), False
    ordered = [known[row] for row in range(len(names))] + [photo for photo in photos if photo.name not in rows]
    source_rows = np.array([row if fresh[row] else -1 for row in range(len(names))] + [-1] * (len(photos) - len(names)))
    return ordered, source_rows.astype(np.int64), True


def _may_be_dicom(photo: SourcePhoto) -> bool:
    return photo.issue is None and photo.path.suffix.lower() in ("", ".dcm", ".dicom")


def _move_into_place(partial: Path, output: Path) -> None:
    replaced = _replaced_folder(output)
    if replaced.exists():
        shutil.rmtree(replaced)
    sync_folder(partial)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    sync(output.parent)
    for name in ("rows.jsonl", "build.json"):
        (output / name).unlink()
    if replaced.exists():
        shutil.rmtree(replaced)


def _replaced_folder(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")
