"""Progress and remarks on stderr, and how signals end a command."""

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
    from fastfundus.screen.pipeline import Timing

__all__ = ["progress_bar", "quiet_decoders", "read_salt", "remark", "remarks", "screening_progress"]

_LINE_S = 30.0
"""Where stderr is no terminal, a line every so often: logs of a day stay readable."""


def remark(text: str) -> None:
    """Write a line to stderr."""
    click.echo(text, err=True)


def remarks(notes: Iterable[str], *, most: int = 20) -> None:
    """Write faults that were dealt with, a line each, and count those that would flood the screen."""
    notes = list(notes)
    for note in notes[:most]:
        remark(f"note: {note}")
    if len(notes) > most:
        remark(f"note: and {len(notes) - most} more of the kind")


@contextmanager
def progress_bar(*extra: str) -> Iterator[Any]:
    """A rich progress bar on stderr; where stderr is no terminal it stays silent.

    Args:
        extra: names of fields shown as text behind the bar; set them with `update(task, name="text")`.
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
    """What `screen_to_folder` calls: a bar with rate, time left and the stage that limits, or a line now and then."""
    latest = time.monotonic()
    with progress_bar("rate") as progress:
        task = progress.add_task("screening", total=None, rate="")

        def show(done: int, total: int, timing: Timing) -> None:
            nonlocal latest
            if not progress.disable:
                rate = f"{timing.images_per_s:.1f} photos/s, {timing.limit} limits" if timing.photos else ""
                progress.update(task, completed=done, total=total, rate=rate)
            elif time.monotonic() - latest > _LINE_S and timing.photos:
                latest = time.monotonic()
                left = timedelta(seconds=round((total - done) / timing.images_per_s))
                remark(
                    f"{done} of {total} photos, {timing.images_per_s:.1f} photos/s, {left} left; {timing.limit} limits"
                )

        yield show


def quiet_decoders() -> None:
    """Keep OpenCV and pydicom from writing lines of their own about odd files: each has a row that says its fault."""
    import logging

    import cv2

    logging.getLogger("pydicom").setLevel(logging.ERROR)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_salt(path: Path | None) -> bytes | None:
    """Read the salt that hashes patients.

    Raises:
        ConfigError: the file cannot be read, or is too short to keep a secret.
    """
    if path is None:
        return None
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--patient-salt {path}: cannot be read ({error.strerror})") from None
    if len(salt) < 16:
        raise ConfigError(
            f"--patient-salt {path}: {len(salt)} bytes are easily guessed; 16 are needed at least, such as those of: "
            "openssl rand -hex 32"
        )
    return salt
