"""Fixtures that run a real server on a real socket, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from fastfundus.engines.bundle import Bundle
from fastfundus.serving.app import Limits, create_app
from fastfundus.serving.server import make_server
from tests.conftest import Trained

Start = Callable[..., httpx.Client]


@contextmanager
def running(bundle: Bundle, *, limits: Limits | None = None, **options: Any) -> Iterator[httpx.Client]:
    """Run a server and yield a client for it."""
    limits = limits or Limits()
    server = make_server(create_app(bundle, limits=limits, **options), limits, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"  # noqa: PT018
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def start(trained: Trained) -> Iterator[Start]:
    """Return a function that starts a server with the trained bundle and the given options."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(running(trained.bundle, **options))
