"""Photos that a run knows from the runs it started from: a test on them would flatter.

learned_before.parquet   sha256 of every photo of training and validation of those runs; absent where there are none
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

__all__ = ["learned_before", "learned_photos", "note_ancestry"]

_FILE = "learned_before.parquet"


def learned_before(run: Path) -> set[str]:
    """Hashes of the photos that the runs before this one learned from."""
    file = run / _FILE
    return set(pl.read_parquet(file)["sha256"]) if file.is_file() else set()


def learned_photos(run: Path) -> set[str]:
    """Hashes of all photos that made a run what it is: its own of training and validation, and those before it."""
    splits = pl.read_parquet(run / "splits.parquet")
    return set(splits.filter(pl.col("split").is_in(["train", "val"]))["sha256"]) | learned_before(run)


def note_ancestry(run: Path, init: str, splits: pl.DataFrame) -> int:
    """Write down what the run knows from where it starts.

    Args:
        run: its folder.
        init: as `ModelConfig.init`: a run's folder, or its checkpoint, is followed; of other files nothing is known.
        splits: of the run: path, sha256, split.

    Returns:
        How many of its test photos were learned before.
    """
    start = Path(init)
    start = start if start.is_dir() else start.parent
    if init in ("scratch", "imagenet") or not (start / "splits.parquet").is_file():
        return 0
    seen = learned_photos(start)
    pl.DataFrame({"sha256": sorted(seen)}, schema={"sha256": pl.String}).write_parquet(run / _FILE)
    return len(splits.filter((pl.col("split") == "test") & pl.col("sha256").is_in(list(seen))))
