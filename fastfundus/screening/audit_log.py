"""The append-only audit log of a screening run.

`audit.jsonl` contains one JSON object per line: what happened, when, and with which model. Every line ends with
`chain`, the SHA-256 of the previous chain value and the line's other fields, so changing, adding or removing a line
breaks the chain. Whoever can write to the file can also make a new chain: only its last value, the head, kept elsewhere
proves that nobody did.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastfundus.data.journal import mend_lines
from fastfundus.errors import DataError
from fastfundus.files import sync

__all__ = ["START", "AuditLog", "chain_link", "check_mirror", "log_lines"]

START = "0" * 64
"""Chain value before the first line."""


def chain_link(chain: str, facts: dict[str, Any]) -> str:
    """Return the chain value of a line from the one before and the line's other fields."""
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(f"{chain}{text}".encode()).hexdigest()


class AuditLog:
    """An append-only event log. An existing log is continued after its last complete line.

    Args:
        path: the log.
        mirror: a second file with the same content, on other storage; None writes none.

    Raises:
        DataError: the log cannot be read, or the mirror contains something else.
    """

    def __init__(self, path: Path, mirror: Path | None = None) -> None:
        self.rows = 0
        """Number of photos in the log."""
        self.head = START
        """Chain value of the last line."""
        new = not path.is_file()
        if not new:
            mend_lines(path)
            for line in log_lines(path):
                self.head = line["chain"]
                self.rows += line["event"] == "photo"
        if mirror is not None:
            try:
                _catch_up(path, mirror)
            except OSError as error:
                message = f"cannot be written to ({error.strerror or error}); give another --audit-mirror"
                raise DataError(message, path=mirror) from None
        with contextlib.ExitStack() as opened:
            self._files = [
                opened.enter_context(file.open("a", encoding="utf-8", newline="\n"))
                for file in (path, mirror)
                if file is not None
            ]
            if new:
                for file in self._files:
                    sync(Path(file.name).absolute().parent)
            # Both are open and durable: from now on, `close` closes them.
            opened.pop_all()

    @property
    def empty(self) -> bool:
        """True if no event has ever been written."""
        return self.head == START

    def write(self, event: str, **facts: Any) -> str:
        """Append one event with the current time, which is returned. It may stay in memory until `flush`."""
        whole = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        self.head = chain_link(self.head, whole)
        self.rows += event == "photo"
        text = json.dumps({**whole, "chain": self.head}, ensure_ascii=False) + "\n"
        for file in self._files:
            with _named(file.name):
                file.write(text)
        return str(whole["time"])

    def flush(self) -> None:
        """Write all buffered events to disk."""
        for file in self._files:
            with _named(file.name):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files. Unflushed events that a full disk cannot hold are dropped; they were never guaranteed."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Add the name of a file to errors, because the log and its mirror may lie on different disks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, file) from None


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log with their chain values.

    Raises:
        DataError: a line is not one of an audit log.
    """
    # Lines end with a line feed only: a name may contain other characters that end lines elsewhere.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text, object_pairs_hook=_once)
                # The chain covers values: the same ones written in another way were written by another program.
                if json.dumps(line, ensure_ascii=False) != text.removesuffix("\n"):
                    raise ValueError("was not written by AuditLog")
                yield {"event": str(line["event"]), "chain": str(line["chain"]), **line}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError("is not a valid audit log line; the log was modified", path=path, row=number) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose keys must differ: of two, a reader might see the other one."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _catch_up(path: Path, mirror: Path) -> None:
    """Append to a mirror what the log has and it lacks, such as after a crash between the two."""
    check_mirror(path, mirror)
    mirror.touch()
    with mirror.open("rb+") as copy, contextlib.ExitStack() as stack:
        copy.truncate(min(mirror.stat().st_size, path.stat().st_size if path.is_file() else 0))
        log = stack.enter_context(path.open("rb")) if path.is_file() else None
        if log:
            log.seek(copy.seek(0, os.SEEK_END))
        while log and (more := log.read(1 << 20)):
            copy.write(more)


def check_mirror(path: Path, mirror: Path, *, fresh: bool = False) -> None:
    """Raise unless one of two files begins with the other, before anything is written.

    Args:
        path: the log; it is shorter than its mirror after a crash, or a full disk.
        mirror: the mirror.
        fresh: whether the log will be deleted, so that the mirror must be empty.

    Raises:
        DataError: the mirror contains something else, lies among the results, or its folder does not exist.
    """
    if mirror.resolve().is_relative_to(path.parent.resolve()) or (
        path.exists() and mirror.exists() and mirror.samefile(path)
    ):
        raise DataError(
            "is no second place for the audit log; give --audit-mirror a file on other storage", path=mirror
        )
    if not mirror.parent.is_dir():
        # To make it would write to the local disk what belongs on a share.
        raise DataError("its folder does not exist; is the storage mounted? If it is, create the folder", path=mirror)
    if not mirror.exists() or mirror.is_dir():
        return
    log_size, size = path.stat().st_size if path.is_file() and not fresh else 0, mirror.stat().st_size
    left = min(log_size, size)
    same = log_size > 0 or size == 0
    if left:
        with path.open("rb") as log, mirror.open("rb") as copy:
            while same and left > 0:
                same = log.read(min(left, 1 << 20)) == copy.read(min(left, 1 << 20))
                left -= 1 << 20
    if not same:
        raise DataError(
            f"is not a copy of {path}; give another --audit-mirror if it belongs to another run, otherwise find out "
            "which of the two was modified",
            path=mirror,
        )
