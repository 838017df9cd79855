"""Options of the commands that run a bundle: whom it must come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["trust_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def trust_options(command: _Command) -> _Command:
    """Add `--allow-native-code` and `--require-signature`, the arguments of `Bundle.open`."""
    allow = click.option(
        "--allow-native-code", is_flag=True, help="Run native code of a bundle that another machine built."
    )
    require = click.option(
        "--require-signature",
        type=click.Path(path_type=Path),
        metavar="KEY",
        help="Refuse the bundle unless it was signed with the private key of this public key; see fastfundus sign.",
    )
    return allow(require(command))
