"""Progress and notes on stderr, and other helpers of the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastfundus.errors import ConfigError

if TYPE_CHECKING:
    from fastfundus.screening.pipeline import Timing

__all__ = [
    "ProgressLines",
    "printable",
    "progress_bar",
    "quiet_decoders",
    "read_salt",
    "remark",
    "remarks",
    "screening_progress",
]

_LINE_S = 30.0
"""Seconds between progress lines if stderr is not a terminal, so that logs of a whole day stay readable."""


def printable(text: str) -> str:
    r"""Return text in which control characters are written as \xNN, so that file names cannot command the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def remark(text: str) -> None:
    """Write a line to stderr."""
    click.echo(printable(text), err=True)


def remarks(notes: Iterable[str], *, limit: int = 20) -> None:
    """Write notes to stderr, one per line; of more than `limit`, only count the rest."""
    notes = list(notes)
    for note in notes[:limit]:
        remark(f"note: {note}")
    if len(notes) > limit:
        remark(f"note: and {len(notes) - limit} more")


class ProgressLines:
    """Stands in for a rich progress bar where stderr is not a terminal: a line at intervals, with rate and time left.

    Has the part of the interface of `rich.progress.Progress` that the commands use, for one task.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin("")

    def _begin(self, description: str) -> None:
        self._description, self._extra = description, ""
        self._done = self._total = 0.0
        self._began = self._latest = self._clock()

    def add_task(self, description: str, *, total: float | None = None, **fields: str) -> int:
        """Begin a task; `fields` are shown at the end of each line."""
        self._begin(description)
        self._total, self._extra = total or 0.0, _appended(fields)
        return 0

    def advance(self, task: int, amount: float = 1) -> None:
        """Add to what is done."""
        self.update(task, completed=self._done + amount)

    def update(
        self,
        task: int,
        *,
        description: str | None = None,
        completed: float | None = None,
        total: float | None = None,
        **fields: str,
    ) -> None:
        """Set what is done, and write a line if the last one is old enough."""
        if description is not None and description != self._description:
            # A new epoch, for example: rate and time left are its own.
            self._description, self._began, self._done = description, self._clock(), 0.0
        self._done = self._done if completed is None else completed
        self._total = self._total if total is None else total
        self._extra = _appended(fields) or self._extra
        now = self._clock()
        if now - self._latest < _LINE_S or not self._done:
            return
        self._latest = now
        rate = self._done / max(now - self._began, 1e-9)
        of, left = "", ""
        if self._total:
            of = f" of {self._total:.0f}"
            left = f", {timedelta(seconds=round((self._total - self._done) / rate))} left"
        remark(f"{self._description}: {self._done:.0f}{of}, {rate:.3g}/s{left}{self._extra}")

    def remove_task(self, task: int) -> None:
        """Write no further lines on a task."""

    def stop(self) -> None:
        """Write no further lines."""


def _appended(fields: dict[str, str]) -> str:
    return "".join(f", {text}" for text in fields.values() if text)


@contextmanager
def progress_bar(*extra: str) -> Iterator[Any]:
    """Show a rich progress bar on stderr, or a line at intervals if stderr is not a terminal.

    Args:
        extra: names of text fields shown after the bar; set them with `update(task, name="text")`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines()
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[" + name + "]}") for name in extra]
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@contextmanager
def screening_progress() -> Iterator[Callable[[int, int, Timing], None]]:
    """Yield a progress callback for `screen_to_folder`: a bar with rate and bottleneck, or a line at intervals."""
    with progress_bar("rate") as progress:
        task = progress.add_task("screening", total=None, rate="")

        def show(done: int, total: int, timing: Timing) -> None:
            rate = f"{timing.images_per_s:.1f} photos/s, bottleneck: {timing.limit}" if timing.photos else ""
            progress.update(task, completed=done, total=total, rate=rate)

        yield show


def quiet_decoders() -> None:
    """Silence the warnings of OpenCV and pydicom about faulty files: the faults are reported in the result rows."""
    import logging

    import cv2

    logging.getLogger("pydicom").setLevel(logging.ERROR)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_salt(path: Path | None) -> bytes | None:
    """Read the salt for hashing patients.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--patient-salt {path}: cannot be read ({error.strerror})") from None
    return salt
