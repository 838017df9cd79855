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

__all__ = ["progress_bar", "quiet_decoders", "read_salt", "remark", "remarks", "screening_progress"]

_LINE_S = 30.0
"""Seconds between progress lines if stderr is not a terminal, so that logs of a whole day stay readable."""


def remark(text: str) -> None:
    """Write a line to stderr."""
    click.echo(text, err=True)


def remarks(notes: Iterable[str], *, limit: int = 20) -> None:
    """Write notes to stderr, one per line; of more than `limit`, only count the rest."""
    notes = list(notes)
    for note in notes[:limit]:
        remark(f"note: {note}")
    if len(notes) > limit:
        remark(f"note: and {len(notes) - limit} more")


@contextmanager
def progress_bar(*extra: str) -> Iterator[Any]:
    """Show a rich progress bar on stderr; it stays silent if stderr is not a terminal.

    Args:
        extra: names of text fields shown after the bar; set them with `update(task, name="text")`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[" + name + "]}") for name in extra]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def screening_progress() -> Iterator[Callable[[int, int, Timing], None]]:
    """Yield a progress callback for `screen_to_folder`: a bar with rate and bottleneck, or a line at intervals."""
    latest = time.monotonic()
    with progress_bar("rate") as progress:
        task = progress.add_task("screening", total=None, rate="")

        def show(done: int, total: int, timing: Timing) -> None:
            nonlocal latest
            if not progress.disable:
                rate = f"{timing.images_per_s:.1f} photos/s, bottleneck: {timing.limit}" if timing.photos else ""
                progress.update(task, completed=done, total=total, rate=rate)
            elif time.monotonic() - latest > _LINE_S and timing.photos:
                latest = time.monotonic()
                left = timedelta(seconds=round((total - done) / timing.images_per_s))
                remark(
                    f"{done} of {total} photos, {timing.images_per_s:.1f} photos/s, {left} left, "
                    f"bottleneck: {timing.limit}"
                )

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
