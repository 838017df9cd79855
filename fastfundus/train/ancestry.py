"""Photos that a run inherited knowledge of through its starting weights; testing on them would overstate performance.

learned_before.parquet   sha256 of every training and validation photo of the earlier runs; absent if there are none
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

__all__ = ["learned_before", "learned_photos", "note_ancestry"]

_FILE = "learned_before.parquet"


def learned_before(run: Path) -> set[str]:
    """Return the hashes of the photos that earlier runs learned from before this one started from their weights."""
    file = run / _FILE
    return set(pl.read_parquet(file)["sha256"]) if file.is_file() else set()


def learned_photos(run: Path) -> set[str]:
    """Return the hashes of all photos that a run learned from, those of the runs before it included."""
    splits = pl.read_parquet(run / "splits.parquet")
    return set(splits.filter(pl.col("split").is_in(["train", "val"]))["sha256"]) | learned_before(run)


def note_ancestry(run: Path, init: str, splits: pl.DataFrame) -> int:
    """Record the photos that a run inherits knowledge of through its starting weights.

    Args:
        run: folder of the run.
        init: value of `ModelConfig.init`. A run folder, or a checkpoint in one, is followed; other weights files do
            not tell what they were trained on.
        splits: split table of the run: path, sha256, split.

    Returns:
        Number of test photos of the run that earlier runs learned from.
    """
    start = Path(init)
    start = start if start.is_dir() else start.parent
    if init in ("scratch", "imagenet") or not (start / "splits.parquet").is_file():
        return 0
    seen = learned_photos(start)
    pl.DataFrame({"sha256": sorted(seen)}, schema={"sha256": pl.String}).write_parquet(run / _FILE)
    return len(splits.filter((pl.col("split") == "test") & pl.col("sha256").is_in(list(seen))))
