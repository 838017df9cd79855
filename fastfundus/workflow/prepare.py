"""Prepare camera files for training: decode every photo once, into a cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastfundus.data.build import build_cache
from fastfundus.data.cache import MANIFEST_COLUMNS, PhotoCache
from fastfundus.data.source import SourceList, list_photos
from fastfundus.errors import ConfigError, DataError, require
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

if TYPE_CHECKING:
    from fastfundus.data.rows import Preparer

__all__ = ["prepare", "prepare_listing"]

Decoder = Literal["auto", "cpu", "dali"]
MIN_SALT_BYTES = 16


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    labels: str | Path | None = None,
    adapter: str = "auto",
    eye_codes: Mapping[str, str] | None = None,
    size: int = 512,
    backend: Decoder = "auto",
    workers: int | None = None,
    patient_salt: bytes | None = None,
) -> PhotoCache:
    """Decode every photo of a source once, into a cache for training; repeat the call to add new photos.

    Args:
        source: a folder, a folder with one subfolder per class, an unpacked public data set, or a CSV file of photos.
        output: the cache folder to create or extend.
        labels: CSV file or Excel workbook with a column that names the photos, and labels.
        adapter: layout of the source; "auto" detects it.
        eye_codes: "L" or "R" by cell text, for tables that code eyes by numbers, such as {"1": "R", "2": "L"}.
        size: side of the prepared photos in pixels.
        backend: decoder; "auto" uses DALI if there is a GPU and nvidia-dali is installed.
        workers: decoding threads; None uses one per core.
        patient_salt: secret of at least 16 bytes with which patient identifiers are hashed; None keeps them.

    Returns:
        The cache, in which every listed photo has a row with its status.

    Raises:
        DataError: the source cannot be read; or, after the cache was written, some inputs could not be listed.
        SpecMismatch: `output` is a cache with another preprocessing.
        ConfigError: the salt is too short.
        MissingDependency: the decoder is not installed.

    Example:
        >>> cache = fastfundus.prepare("photos/", "cache/", labels="labels.csv")
    """
    listing = list_photos(Path(source), labels=Path(labels) if labels else None, adapter=adapter, eye_codes=eye_codes)
    cache = prepare_listing(
        listing, Path(output), size=size, backend=backend, workers=workers, patient_salt=patient_salt
    )
    if listing.lost:
        raise DataError("; ".join(["some inputs could not be listed", *listing.lost]))
    return cache


def prepare_listing(
    listing: SourceList,
    output: Path,
    *,
    size: int = 512,
    backend: Decoder = "auto",
    workers: int | None = None,
    patient_salt: bytes | None = None,
    on_photo: Callable[[Status], None] = lambda status: None,
) -> PhotoCache:
    """Prepare photos that were listed already; see `prepare`.

    Args:
        listing: the photos, from `data.list_photos`.
        output: the cache folder to create or extend.
        size: side of the prepared photos in pixels.
        backend: decoder.
        workers: decoding threads; None uses one per core.
        patient_salt: secret with which patient identifiers are hashed.
        on_photo: called with the status of each photo.
    """
    if patient_salt is not None and len(patient_salt) < MIN_SALT_BYTES:
        raise ConfigError(
            f"a patient salt of {len(patient_salt)} bytes is too easy to guess; at least {MIN_SALT_BYTES} bytes are "
            "needed, such as the output of: openssl rand -hex 32"
        )
    _keep_labels(listing, output)
    spec = PreprocessSpec(size=size)
    group, preparer = 1, None
    if backend == "dali" or (backend == "auto" and _gpu_decodes()):
        group, preparer = _dali_preparer(spec, workers)
        # Two workers: one reads files and finishes photos while the other decodes.
        workers = 2
    return build_cache(
        listing.photos,
        output,
        spec,
        source=listing.root,
        workers=workers,
        prepare=preparer,
        group=group,
        patient_salt=patient_salt,
        origins=listing.origins,
        notes=listing.notes,
        on_photo=on_photo,
    )


def _keep_labels(listing: SourceList, output: Path) -> None:
    """Raise if bringing a cache up to date would delete its labels, because the label table was forgotten."""
    if not (output / "spec.json").is_file():
        return
    had = set(PhotoCache.open(output).manifest.columns) - set(MANIFEST_COLUMNS)
    has = {name for photo in listing.photos for name in photo.columns}
    if had and not has:
        raise DataError(
            f"has the labels {', '.join(sorted(had)[:5])}, but this command gives none, which would delete them; give "
            "the same --labels again, or choose another --output",
            path=output,
        )


def _gpu_decodes() -> bool:
    """Return whether DALI, torch and a GPU are available, without importing torch on machines without a GPU."""
    has = all(importlib.util.find_spec(name) for name in ("nvidia", "torch"))
    if not (has and Path("/proc/driver/nvidia/version").exists() and importlib.util.find_spec("nvidia.dali")):
        return False
    import torch

    return torch.cuda.is_available()


def _dali_preparer(spec: PreprocessSpec, workers: int | None) -> tuple[int, Preparer]:
    """Return the number of files per group, and the function that prepares a group."""
    require("torch", extra="train")
    require("nvidia.dali", extra="dali")
    import torch

    from fastfundus.dali.decode import DaliDecoder
    from fastfundus.dali.prepare import DaliPreparer

    on_gpu = torch.cuda.is_available()
    # All decoded photos of a group are in memory at once: 30 MB each at 10 megapixels.
    group = 64 if on_gpu else 8
    decoder = DaliDecoder(device_id=0 if on_gpu else None, batch_size=group, threads=workers)
    return group, DaliPreparer(spec, decoder, threads=workers)
