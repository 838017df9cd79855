"""Table of all adapters by name."""

from __future__ import annotations

from fastfundus.data.adapters.disease import DISEASE
from fastfundus.data.adapters.entry import Adapter
from fastfundus.data.adapters.grading import GRADING
from fastfundus.data.adapters.vessels import VESSELS
from fastfundus.errors import ConfigError, close_matches

__all__ = ["ADAPTERS", "adapter_named"]

ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in (*GRADING, *DISEASE, *VESSELS)}
"""All supported public data sets, by the name that `--adapter` takes."""


def adapter_named(name: str) -> Adapter:
    """Return the adapter with the given name.

    Raises:
        ConfigError: no adapter has this name.
    """
    if name not in ADAPTERS:
        raise ConfigError(f"adapter {name!r} is unknown{close_matches(name, ADAPTERS)}")
    return ADAPTERS[name]
