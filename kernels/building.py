"""Compiles csrc on first use, into a cache folder: `~/.cache/fastfundus`, or below `XDG_CACHE_HOME`."""

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
"""Beside this package, in a checkout and in an installed wheel alike."""


def build(compiler: str, flags: Sequence[str], source: Path, target: Path) -> Path:
    """Compile `source` to `target`, in place at once.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; its words are in `stderr`.
        OSError: the compiler cannot be run, or the folder not be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        command = [compiler, *flags, str(source), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(fresh, target)
    return target


def cache_folder() -> Path:
    """`~/.cache/fastfundus`, or below `XDG_CACHE_HOME`; made if absent.

    Raises:
        PermissionError: others may write to it.
        OSError: it cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "fastfundus"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        # What lies there is loaded and run.
        raise PermissionError(f"others may write to {folder}: run chmod go-w on it, or set XDG_CACHE_HOME")
    return folder


def cached_build(compiler: str, flags: Sequence[str], source: Path, suffix: str) -> Path:
    """Compile `source` unless the cache has it: from the same sources, compiler, flags and processor.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; its words are in `stderr`.
        OSError: the compiler cannot be run, or the cache not be written; also `cache_folder`'s.
    """
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    texts = [path.read_text() for path in [*sorted(CSRC.glob("*.cu*")), source]]
    key = hashlib.sha256("\0".join([version, *flags, platform.machine(), _processor(), *texts]).encode()).hexdigest()
    target = cache_folder() / f"{source.stem}_{key[:16]}{suffix}"
    return target if target.is_file() else build(compiler, flags, source, target)


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
