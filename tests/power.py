"""Simulations of a power failure and of errors of the operating system at every point where files are written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM)


class Disk:
    """What is on disk for certain: files as they were when they were last synced, under names that were synced.

    Args:
        root: the folder to watch; only what is in it counts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: list[tuple[dict[int, dict[str, tuple[int, bool]]], dict[int, bytes]]] = []
        """After each sync: names, inodes and whether they are folders by inode of the folder; contents by inode."""
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._contents: dict[int, bytes] = {}
        self._fsync = os.fsync

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record every sync from now on."""
        monkeypatch.setattr(os, "fsync", self._synced)

    def _synced(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path, facts = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor)
        if not path.is_relative_to(self.root):
            return
        if stat.S_ISDIR(facts.st_mode):
            self._names[facts.st_ino] = {
                entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in os.scandir(path)
            }
        else:
            self._contents[facts.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        self.states.append((dict(self._names), dict(self._contents)))

    def after_power_failure(self, state: int, copy: Path) -> None:
        """Write what is on disk after the sync with that number into a new folder.

        Files that were never synced are empty, and folders that were never synced have no files.
        """
        names, contents = self.states[state]

        def write(inode: int, target: Path) -> None:
            target.mkdir(parents=True)
            for name, (number, is_folder) in names.get(inode, {}).items():
                if is_folder:
                    write(number, target / name)
                else:
                    (target / name).write_bytes(contents.get(number, b""))

        write(self.root.stat().st_ino, copy)


class Faults:
    """Raises an error at the call with a given number among all calls that write, and counts the calls.

    Args:
        at: number of the call that fails; -1 lets all succeed.
        number: its errno.
    """

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number, self.calls = at, number, 0

    def inject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make calls fail from now on."""
        for name in ("fsync", "replace", "rename", "pwrite", "ftruncate", "mkdir"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))
        opened = Path.open

        def open_(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                self._count()
            return opened(path, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", open_)

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._count()
            return real(*arguments, **options)

        return call

    def _count(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise OSError(self.number, os.strerror(self.number))
