"""FastFundus: retinal photographs, from camera files to a trained model to an engine that screens them.

Importing the package loads no torch; the heavy parts load when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfundus.errors import FastFundusError
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

if TYPE_CHECKING:
    from fastfundus.screen.api import screen

__all__ = ["FastFundusError", "PreprocessSpec", "Status", "__version__", "screen"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "screen":
        import importlib

        return importlib.import_module("fastfundus.screen")
    raise AttributeError(f"module 'fastfundus' has no attribute {name!r}")
