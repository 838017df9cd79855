"""Location of the real photographs."""

from __future__ import annotations

import os
from pathlib import Path

from bench import ROOT

__all__ = ["DATA", "camera_jpegs", "need"]

DATA = Path(os.environ.get("FASTFUNDUS_DATA", ROOT.parent / "shared" / "data"))
"""Folder of real photographs; CONTRIBUTING explains FASTFUNDUS_DATA."""


def need(path: Path) -> None:
    """Exit with an explanation if a file of the real photographs is missing."""
    if not path.exists():
        raise SystemExit(f"no real photographs at {path.parent}: set FASTFUNDUS_DATA to the folder that contains them")


def camera_jpegs() -> list[Path]:
    """Return the real camera files of 5 to 12 megapixels."""
    folders = ("fullres_dr", "hrf/images", "idrid/images", "eyepacs")
    paths = [path for folder in folders for path in sorted((DATA / folder).glob("*.jp*g"))]
    if len(paths) < 15:
        raise SystemExit(f"no camera photographs at {DATA}: set FASTFUNDUS_DATA to the folder that contains them")
    return paths
