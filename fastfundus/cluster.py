"""Connection to a Ray cluster, for as long as work runs on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastfundus.errors import ConfigError, require
from fastfundus.machine import usable_cores

__all__ = ["cores_of_machines", "join_cluster"]


@contextmanager
def join_cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster, and disconnect on exit.

    Args:
        address: address of the head node ("host:6379", "ray://host:10001", "auto"), or "local" for this machine alone.

    Yields:
        The module `ray`.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: the cluster cannot be reached.
    """
    # By default, Ray sends usage statistics over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's internal log messages are of no use to users.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray: Any = require("ray", extra="fleet")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    here = {"num_cpus": usable_cores(), "include_dashboard": False}
    where = here if address == "local" else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray {address}: cannot be reached ({str(error).splitlines()[0]}); check that the cluster is running, "
            "and that RAY_AUTH_MODE is the same here and there"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def cores_of_machines(ray: Any) -> list[int]:
    """Return the number of cores of each machine of the cluster that has any."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [count for count in cores if count]
