"""Screening: photos and a bundle in, one trustworthy row per photo out. No torch.

The package can be called: `fastfundus.screen(paths, bundle)` is `fastfundus.screen.api.screen`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module and a function of one name: which of them `fastfundus.screen` is must not hang on what was imported."""

    def __call__(self, *arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        from fastfundus.screen.api import screen

        return screen(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
