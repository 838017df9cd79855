"""Screening from Python: an iterator of records, one an input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastfundus.data.source import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import DataError
from fastfundus.screen.pipeline import Timing
from fastfundus.screen.policy import ScreenPolicy
from fastfundus.screen.run import rows_of

__all__ = ["screen"]


def screen(
    paths: str | Path | Iterable[str | Path],
    bundle: str | Path | Bundle,
    *,
    policy: ScreenPolicy | None = None,
    timing: Timing | None = None,
) -> Iterator[dict[str, Any]]:
    """Screen photos, in the order of their names.

    Args:
        paths: a folder, a photo or a CSV file with a column `file`; or several of them.
        bundle: what to screen with, or where it is.
        policy: how to decide; None takes the plain one.
        timing: filled while records are taken.

    Yields:
        The columns of results.csv by name, for every input exactly once: path, sha256, status, reason, patient, eye,
        camera, quality, p_<label> (None without a score), decision, bundle. Bundles that map give no masks here.

    Raises:
        DataError: a source is not there, holds nothing, or cannot be searched through.
        BundleError: the bundle cannot be used here, or its engine fails on everything.

    Example:
        >>> for record in fastfundus.screen("photos/", "bundle/"):
        ...     print(record["path"], record["decision"])
    """
    sources = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    listing = list_photos(sources, adapter="folder")
    if listing.lost:
        raise DataError("; ".join(["some inputs could not be listed", *listing.lost]))
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    return rows_of(listing.photos, opened, policy or ScreenPolicy(), timing or Timing())
