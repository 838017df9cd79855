"""The HTTP server: limits connections and slow clients, and answers all accepted requests before it shuts down."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastfundus.errors import FastFundusError
from fastfundus.serving.app import Limits

__all__ = ["LOOPBACK", "make_server", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS_S = 10.0
"""Timeout for request headers, in seconds: a client that trickles bytes must not hold a connection open."""
_MAX_HEADER_BYTES = 64 * 1024
_IDLE_S = 15
_MAX_CONNECTIONS = 512


class _Impatient(HttpToolsProtocol):
    """HTTP/1.1 protocol that closes the connection if headers take too long or are too large.

    When connections run out, the one closes that has been without a complete request for longest: whoever opens
    hundreds and says nothing keeps nobody else out.
    """

    _silent_since = 0.0
    """Time of the event loop when it was opened or its last request was answered."""
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._wait()
        if len(self.connections) >= _MAX_CONNECTIONS:
            silent = [other for other in self.connections if isinstance(other, _Impatient) and other.incomplete]
            oldest = min(silent, key=lambda other: other._silent_since)
            # At once, because its loss is only reported in the next round of the event loop.
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        # Each further request on the same connection has its own deadline.
        if self._deadline is None and not self.answering:
            self._wait()
        super().data_received(data)
        if self._deadline is None:
            return
        if self.answering:
            self._stop_waiting()
            return
        # httptools itself would collect headers without end.
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._stop_waiting()
        self._silent_since = self.loop.time()
        super().on_response_complete()

    @property
    def incomplete(self) -> bool:
        """Whether the client has not sent a whole request since the last answer, its body included."""
        return not self.answering or bool(self.cycle.more_body)

    @property
    def answering(self) -> bool:
        """Whether the headers of a request are complete and it is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(_HEADERS_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._header_bytes = 0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM as requests for a clean shutdown."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_server(app: Any, limits: Limits, *, host: str, port: int) -> uvicorn.Server:
    """Create a server without starting it.

    Args:
        app: application from `create_app`.
        limits: limits of the application.
        host: address to listen on.
        port: port to listen on; 0 selects a free one.
    """
    config = uvicorn.Config(
        app, host=host, port=port, http=_Impatient, ws="none", loop="uvloop", lifespan="on", log_level="info",
        access_log=False, server_header=False, limit_concurrency=2 * _MAX_CONNECTIONS, timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=round(limits.max_s) + 5,
    )  # fmt: skip
    return _Server(config)


def serve(app: Any, limits: Limits, *, host: str, port: int) -> None:
    """Serve until stopped, then refuse new requests and answer those already accepted. See `make_server`.

    Raises:
        FastFundusError: the server could not start.
    """
    server = make_server(app, limits, host=host, port=port)
    try:
        server.run()
    except SystemExit:
        raise FastFundusError(f"could not listen on {host}:{port}; see the lines above") from None
    if not server.started:
        raise FastFundusError(f"could not listen on {host}:{port}; see the lines above")
