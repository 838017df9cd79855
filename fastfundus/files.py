"""Files that are whole whenever somebody looks. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced"]


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to, then move it there.

    Who reads meanwhile, and who comes after a kill, meets the old file or the new one, never half of one. An error
    leaves the old file, and nothing beside it.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
