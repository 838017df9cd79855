"""The exceptions that FastFundus raises.

    FastFundusError
    ├── ConfigError           a setting, flag or TOML key is invalid
    ├── DataError             a label file, manifest or cache is invalid; carries path and row
    ├── PhotoError            a photo cannot be used; carries a `Status` and becomes a result row
    │   └── TransientError    the photo is not the cause: storage, memory or a killed process; try again
    ├── CheckpointError       weights or a run folder cannot be used
    ├── SpecMismatch          two parts were made with different preprocessing
    ├── BundleError           an engine bundle is damaged, too new, or for another machine
    ├── GateRefused           an engine differs from its model by more than the gate allows
    └── MissingDependency     an optional package is not installed; the message states how to install it

Messages state what failed, the value, what is allowed and the next step, in that order. The command line prints them
on one line and exits with 1.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from fastfundus.records import Status

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FastFundusError",
    "GateRefused",
    "MissingDependency",
    "PhotoError",
    "SpecMismatch",
    "TransientError",
    "close_matches",
    "require",
]


class FastFundusError(Exception):
    """Base class of all errors that FastFundus raises deliberately."""


class ConfigError(FastFundusError):
    """A setting is invalid; the message starts with its dotted name."""


class DataError(FastFundusError):
    """A label file, manifest or cache is invalid.

    Args:
        message: what is wrong and what to do.
        path: the invalid file.
        row: line of the file, counted from 1; the header is line 1.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, row: int | None = None) -> None:
        self.path, self.row = path, row
        place = "" if path is None else f"{path}{'' if row is None else f', line {row}'}: "
        super().__init__(place + message)


class PhotoError(FastFundusError):
    """A photo cannot be used. Callers turn the error into the result row of the photo.

    Args:
        status: status of the row.
        reason: explanation that a camera operator understands, without the path.
    """

    def __init__(self, status: Status, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


class TransientError(PhotoError):
    """A photo could not be read or decoded now, and is not the cause. No verdict on the photo may follow from it.

    Args:
        reason: explanation, without the path.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(Status.FAILED, reason)


class CheckpointError(FastFundusError):
    """Weights or a run folder cannot be used."""


class SpecMismatch(FastFundusError):
    """Two parts were made with different preprocessing."""


class BundleError(FastFundusError):
    """An engine bundle is damaged, too new, or for another machine."""


class GateRefused(FastFundusError):
    """The outputs of an engine differ from those of its model by more than the gate allows."""


class MissingDependency(FastFundusError):
    """An optional package is not installed.

    Args:
        name: name of the package, as users know it.
        how: command that installs it.
    """

    def __init__(self, name: str, how: str) -> None:
        self.name, self.how = name, how
        super().__init__(f"{name} is not installed; run: {how}")


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: import name, such as "torch".
        extra: FastFundus extra that installs it, such as "train".

    Raises:
        MissingDependency: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # If the package is installed but lacks one of its own dependencies, that error is shown unchanged.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingDependency(error.name, f"pip install 'fastfundus[{extra}]'") from None


def close_matches(name: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` or the list of allowed names, for the end of an error message."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "; allowed: " + ", ".join(names)
