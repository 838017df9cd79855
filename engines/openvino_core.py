"""OpenVINO's core, one per process and without telemetry. Does not need torch."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from fastfundus.errors import BundleError

__all__ = ["forbid_telemetry", "shared_core"]


def forbid_telemetry(package: str) -> None:
    """Disable telemetry before OpenVINO or a related tool is imported, since patient screening must not phone home.

    Merely importing OpenVINO sends usage statistics over the network unless its telemetry package is absent, so this
    makes the package look absent. It has no effect if the program has imported `package` already.
    """
    if package not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def shared_core() -> Any:
    """Return OpenVINO's core, shared by the whole process and never freed before it exits.

    The CPU plugin installs a signal handler stack and restores the previous one when it is freed. If two cores are
    freed in the order of their creation, a freed stack stays installed and the next Ctrl-C causes a segmentation fault.

    Raises:
        BundleError: this process is a fork of one that used OpenVINO, whose threads do not survive a fork.
    """
    core, process = _core()
    if process != os.getpid():
        raise BundleError(
            f"OpenVINO was used by process {process}, and this process is a fork of it, in which it would hang; start "
            "processes with the 'spawn' method"
        )
    return core


@functools.cache
def _core() -> tuple[Any, int]:
    forbid_telemetry("openvino")
    import openvino

    return openvino.Core(), os.getpid()
