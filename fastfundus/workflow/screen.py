"""From photos and a bundle to one record per photo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastfundus.data.source import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import DataError
from fastfundus.screening.pipeline import Timing
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.run import rows_of

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
        bundle: the bundle to screen with, or its path.
        policy: the decision policy; None uses the default policy.
        timing: receives the time of each stage while records are taken.

    Yields:
        The columns of results.csv by name, for every input exactly once: path, sha256, status, reason, patient, eye,
        camera, quality, p_<label> (None without a score), decision, bundle. Masks are only written by the command line.

    Raises:
        DataError: a source does not exist, contains nothing, or cannot be listed.
        BundleError: the bundle cannot be used on this machine, or its engine fails on every photo.

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
