"""The process: uvicorn around the application, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from glm45_jax.errors import UserError
from glm45_jax.serve.app import App

_LAST_WORDS = 5.0  # seconds for telling those who wait that the engine has failed


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Takes a port, before a model is loaded for nothing; clients are let in when `run` is called.

    Raises:
      UserError: there is no such address, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"cannot listen at port {port}; expected 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error}") from error
    return listener


def run(app: App, listener: socket.socket | None = None) -> None:
    """Serves until SIGTERM or SIGINT: new requests are then refused with status 503 and running ones finish.

    Args:
      listener: what `bind` gives; without it, port 8000 of this machine alone.

    Raises:
      UserError: the engine has failed; all who waited have been told.
    """
    options = app.options

    class Protocol(_Protocol):
        header_seconds = options.header_seconds

    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, limit_concurrency=options.max_connections, timeout_keep_alive=30,
        h11_max_incomplete_event_size=options.max_header_bytes, timeout_graceful_shutdown=5,
    )  # fmt: skip
    with listener or bind() as listener:
        _Server(config, app).run(sockets=[listener])
    if app.engine.failure is not None:
        raise UserError(f"the engine has failed: {app.engine.failure}") from app.engine.failure


class _Server(uvicorn.Server):
    """Ends when told by a signal, or the engine has failed, and no request is left; at once when told twice."""

    def __init__(self, config: uvicorn.Config, app: App):
        super().__init__(config)
        self._gate, self._drain_seconds, self._told = app.gate, app.options.drain_seconds, 0.0
        self._engine = app.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = self.force_exit = True
        else:
            self._gate.draining, self._told = True, time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._engine.failure is not None and not self._gate.draining:
            self._gate.draining, self._told, self._drain_seconds = True, time.monotonic(), _LAST_WORDS
        if self._gate.draining:
            too_long = time.monotonic() - self._told > self._drain_seconds
            self.should_exit = self.should_exit or not self._gate.inside or too_long
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    """Closes a connection on which no request has begun in time, however its headers trickle."""

    header_seconds: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _expect_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(self.header_seconds, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
