"""A Ray cluster, joined for as long as work is dealt to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastfundus.errors import ConfigError, require

__all__ = ["cores_of_machines", "joined"]


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Join a cluster, and leave it.

    Args:
        address: of the cluster's head ("host:6379", "ray://host:10001", "auto"), or "local" for this machine alone.

    Yields:
        Ray itself.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: the cluster cannot be reached.
    """
    # It reports its use over the network unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What its own parts have to say to each other is for its makers.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray: Any = require("ray", extra="fleet")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    here = {"num_cpus": os.cpu_count(), "include_dashboard": False}
    where = here if address == "local" else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray {address}: cannot be reached ({str(error).splitlines()[0]}); does it run, and is RAY_AUTH_MODE "
            "here what it is there?"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def cores_of_machines(ray: Any) -> list[int]:
    """Cores of each machine of the cluster that has any."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [count for count in cores if count]
