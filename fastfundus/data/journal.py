"""The journal for crash-safe resume of a build, and the lock against concurrent builds."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastfundus.errors import DataError

__all__ = ["cut_lines", "journal_rows", "locked", "mend_journal", "mend_lines"]


@contextmanager
def locked(output: Path, path: Path, doing: str) -> Iterator[None]:
    """Hold an exclusive lock, so that no second process writes the same output.

    Args:
        output: the output being written, for the error message.
        path: the lock file; its folder is created if absent.
        doing: past participle for the error message, such as "prepared".

    Raises:
        DataError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise DataError(
                f"is being {doing} by another process; wait for it to finish or stop it", path=output
            ) from None
        # Its last holder may have deleted the file after it was opened here: then a third process can lock another one.
        if _is_same(file, path):
            break
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def journal_rows(partial: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that a build has recorded so far, one per finished photo, in order."""
    path = partial / "rows.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def mend_journal(partial: Path) -> None:
    """Remove an incomplete last line left by a crash, so the next row starts a new line; its photo is redone."""
    path = partial / "rows.jsonl"
    if path.is_file():
        mend_lines(path)


def cut_lines(path: Path, count: int) -> None:
    """Truncate a text file after its first `count` lines."""
    with path.open("rb+") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())


def mend_lines(path: Path) -> None:
    """Truncate a text file after its last complete line."""
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
