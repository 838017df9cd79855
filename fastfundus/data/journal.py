"""What lets a build go on after a kill, and keeps a second one out."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastfundus.errors import DataError

__all__ = ["journal_rows", "locked", "mend_journal", "mend_lines"]


@contextmanager
def locked(output: Path, path: Path, doing: str) -> Iterator[None]:
    """Keep a second process that does the same out.

    Args:
        output: what is being written, for the message.
        path: the lock; its folder is made if absent.
        doing: such as "prepared".

    Raises:
        DataError: one is at work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise DataError(f"is being {doing} by another process; wait for it, or stop it", path=output) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def journal_rows(partial: Path) -> Iterator[dict[str, Any]]:
    """What a build has noted so far, a row a finished photo, in order."""
    path = partial / "rows.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def mend_journal(partial: Path) -> None:
    """Take half a line away that a kill may have left: it must not glue to the next; its photo is prepared again."""
    path = partial / "rows.jsonl"
    if path.is_file():
        mend_lines(path)


def mend_lines(path: Path) -> None:
    """Take half a line away at the end of a file of lines."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)
