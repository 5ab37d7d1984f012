"""How the first of several processes tells the others what to do: arrays and plain values over TCP connections.

A message is a JSON object with the arrays' dtypes and shapes, and the arrays' bytes behind it. Nothing else is read,
and nothing that is read is executed. The first process listens at the address that the others know it by; a token,
which they get through jax's coordination service, says who belongs to the run.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glm45_jax.errors import UserError

_HEAD = struct.Struct("!I")
_MOST_HEAD = 1 << 16  # bytes
_MOST_ARRAYS = 1 << 32  # bytes
_KINDS = "biuf"  # of dtypes: booleans and numbers
_SEND_SECONDS = 60.0  # a process that takes nothing for so long is as good as gone
_TOKEN_BYTES = 32


class Lost(UserError):
    """The other end is gone."""


class Channel:
    """One connection."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: bytes) -> None:
        """Raises `Lost`."""
        try:
            self._connection.sendall(message)
        except OSError as error:
            raise Lost(str(error)) from error

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The next message. Raises `Lost` where none can come, `UserError` for what is none."""
        (size,) = _HEAD.unpack(self._bytes(_HEAD.size))
        if size > _MOST_HEAD:
            raise UserError(f"a message begins with {size} bytes; expected {_MOST_HEAD} at most")
        values = json.loads(self._bytes(size))
        kinds = [(np.dtype(str(name)), tuple(map(int, shape))) for name, shape in values.pop("arrays")]
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in kinds]
        if any(dtype.kind not in _KINDS or min(shape, default=0) < 0 for dtype, shape in kinds):
            raise UserError("a message holds arrays of other things than numbers")
        if sum(sizes) > _MOST_ARRAYS:
            raise UserError(f"a message of {sum(sizes)} bytes; expected {_MOST_ARRAYS} at most")
        data = [self._bytes(size) for size in sizes]
        return values, [np.frombuffer(x, dtype).reshape(shape) for x, (dtype, shape) in zip(data, kinds)]

    def close(self) -> None:
        self._connection.close()

    def _bytes(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            try:
                got = self._connection.recv_into(view)
            except OSError as error:
                raise Lost(str(error)) from error
            if not got:
                raise Lost("the connection was closed")
            view = view[got:]
        return data


def packed(values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """A message."""
    arrays = [np.asarray(x, order="C") for x in arrays]
    head = json.dumps({**values, "arrays": [(x.dtype.str, x.shape) for x in arrays]}).encode()
    return b"".join([_HEAD.pack(len(head)), head, *(x.tobytes() for x in arrays)])


class Connections:
    """The connections of the first process to all others.

    Args:
      on_loss: called once, from another thread, when one of them is gone.
    """

    def __init__(self, channels: dict[int, Channel], on_loss: Callable[[Lost], None]):
        self._channels, self._on_loss, self._closing = channels, on_loss, False
        threading.Thread(target=self._watch, name="glm45-processes", daemon=True).start()

    def send(self, values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """To all. Raises `Lost`."""
        message = packed(values, arrays)
        for number, channel in self._channels.items():
            try:
                channel.send(message)
            except Lost as error:
                raise _gone(number, str(error)) from error

    def close(self) -> None:
        """What is closed from now on is no loss."""
        self._closing = True
        for channel in self._channels.values():
            channel.close()

    def _watch(self) -> None:
        """The others never speak: what can be read is the end."""
        try:
            found = select.select([*self._channels.values()], [], [])[0]
        except (OSError, ValueError):  # closed here
            return
        if not self._closing:
            number = next(n for n, channel in self._channels.items() if channel in found)
            self._on_loss(_gone(number, "its connection was closed"))


def _gone(number: int, why: str) -> Lost:
    return Lost(f"lost process {number}, without which nothing can be computed ({why}); see what it said last")


# --- how they find each other ----------------------------------------------------------------------------------------


def listen(host: str) -> socket.socket:
    """A port of this process at `host`, any that is free."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.bind(address)
    listener.listen()
    return listener


def new_token() -> str:
    return secrets.token_hex(_TOKEN_BYTES)


def accept(listener: socket.socket, token: str, others: Sequence[int], seconds: float) -> dict[int, Channel]:
    """Connections of the processes `others`, by number; who does not know the token is sent away.

    Raises:
      UserError: they have not all come in time.
    """
    found: dict[int, Channel] = {}
    end = time.monotonic() + seconds
    while len(found) < len(others):
        listener.settimeout(max(end - time.monotonic(), 0.01))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = sorted({*others} - {*found})
            raise UserError(f"processes {missing} have not come to serve within {seconds:g} s") from None
        number = _introduced(connection, token)
        if number in others and number not in found:
            connection.settimeout(_SEND_SECONDS)
            found[number] = Channel(connection)
        else:
            connection.close()
    return found


def connect(host: str, port: int, token: str, number: int, seconds: float) -> Channel:
    """To the first process. Raises `UserError`."""
    try:
        connection = socket.create_connection((host, port), timeout=seconds)
        connection.sendall(token.encode() + _HEAD.pack(number))
    except OSError as error:
        raise UserError(f"cannot reach process 0 at {host}, port {port}: {error}") from error
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Channel(connection)


def _introduced(connection: socket.socket, token: str) -> int:
    """The number of a process that knows the token; -1 for anyone else."""
    connection.settimeout(5)
    said = b""
    with contextlib.suppress(Lost):
        said = bytes(Channel(connection)._bytes(len(token) + _HEAD.size))
    if not hmac.compare_digest(said[: len(token)], token.encode()):
        return -1
    return _HEAD.unpack(said[len(token) :])[0]
