"""On-demand compilation of csrc into a cache folder: `~/.cache/fastfundus`, or `fastfundus` below `XDG_CACHE_HOME`."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["CSRC", "build", "cache_folder", "cached_build"]

CSRC = Path(__file__).parent.parent / "csrc"
"""Next to this package, both in a checkout and in an installed wheel."""


def build(compiler: str, flags: Sequence[str], source: Path, target: Path) -> Path:
    """Compile `source` to `target` and return `target`, which is replaced atomically.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is in `stderr`.
        subprocess.TimeoutExpired: the compiler took longer than ten minutes.
        OSError: the compiler cannot be run, or the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        command = [compiler, *flags, str(source), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(fresh, target)
    return target


def cache_folder() -> Path:
    """Return the cache folder, `~/.cache/fastfundus` or `fastfundus` below `XDG_CACHE_HOME`; create it if absent.

    Raises:
        PermissionError: the folder is owned by another user, or other users can write to it.
        OSError: the folder cannot be created.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "fastfundus"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        # Libraries in this folder are loaded and executed.
        raise PermissionError(f"{folder} is owned or writable by others: run chmod go-w on it, or set XDG_CACHE_HOME")
    return folder


def cached_build(compiler: str, flags: Sequence[str], source: Path, suffix: str) -> Path:
    """Compile `source`, or return the cached result for the same sources, compiler, flags and processor.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is in `stderr`.
        subprocess.TimeoutExpired: the compiler did not finish in time.
        OSError: the compiler cannot be run, or the cache cannot be written; see `cache_folder`.
    """
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    texts = [path.read_text() for path in [*sorted(CSRC.glob("*.cu*")), source]]
    key = hashlib.sha256("\0".join([version, *flags, platform.machine(), _processor(), *texts]).encode()).hexdigest()
    target = cache_folder() / f"{source.stem}_{key[:16]}{suffix}"
    return target if target.is_file() else build(compiler, flags, source, target)


def _processor() -> str:
    """Return the CPU features that `-march=native` depends on: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
