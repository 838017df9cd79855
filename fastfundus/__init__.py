"""FastFundus: retinal photographs, from camera files to a trained model to an engine that screens them.

Importing the package loads no torch; the heavy parts load when they are used.
"""

from __future__ import annotations

from fastfundus.errors import FastFundusError
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

__all__ = ["FastFundusError", "PreprocessSpec", "Status", "__version__"]

__version__ = "0.1.0"
