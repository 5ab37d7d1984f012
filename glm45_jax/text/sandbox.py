"""Renders a chat template that came with a checkpoint, within bounds of time, memory and output.

A template is a program. Jinja's sandbox keeps it from Python's internals, but not from looping for ever or from
building a terabyte with one multiplication, and neither can be stopped from a thread of the same process. So such
templates run in a worker process (`template_worker.py`) that is killed when its time is up. Workers stay alive between
calls: the first call takes about 0.2 s, later ones well under a millisecond more than rendering itself.
"""

from __future__ import annotations

import collections
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm45_jax.errors import UserError
from glm45_jax.text import template_worker as protocol

START_SECONDS = 60.0  # a cold disk or a busy machine may be slow to start Python; it is not the template's fault
MAX_IDLE_WORKERS = 4
# All that Python needs: secrets in the environment are none of a template's business.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TZ")


class _TimeUp(Exception):
    """The worker did not answer in time."""


class _Worker:
    """One worker process. Used by one thread at a time."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            # -P: this package's folder must not shadow other modules; -B: it may write no files
            [sys.executable, "-P", "-B", str(Path(protocol.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        try:
            self._read(1, time.monotonic() + START_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def render(self, request: bytes) -> tuple[bytes, bytes]:
        """Status and body of the answer. Raises `_TimeUp`, or `OSError` where the worker died."""
        view = memoryview(protocol.LENGTH.pack(len(request)) + request)
        while view:  # an unbuffered pipe may take a part of it
            view = view[self._stdin.write(view) :]
        deadline = time.monotonic() + protocol.MAX_SECONDS
        head = self._read(1 + protocol.LENGTH.size, deadline)
        size = protocol.LENGTH.unpack(head[1:])[0]
        if size > protocol.MAX_OUTPUT_BYTES:
            raise OSError("the answer is larger than allowed")
        return head[:1], self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise _TimeUp
            piece = os.read(self._stdout.fileno(), size - len(data))
            if not piece:
                raise OSError("the worker process ended")
            data += piece
        return bytes(data)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        self._stdin.close()
        self._stdout.close()


# Workers nobody is using. Appending to and popping from a deque are atomic, so threads need no lock.
_idle: collections.deque[_Worker] = collections.deque()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # their pipes belong to the parent


def _take_worker() -> _Worker:
    while _idle:
        try:
            worker = _idle.pop()
        except IndexError:  # another thread was quicker
            break
        if worker.alive:
            return worker
        worker.close()
    try:
        return _Worker()
    except (OSError, _TimeUp) as error:
        raise UserError(
            f"chat template: could not start the process that renders it ({error}); "
            f"is jinja2 importable by {sys.executable}?"
        ) from error


def render_sandboxed(template: str, variables: Mapping[str, Any]) -> str:
    """Renders the jinja text `template`. Thread-safe.

    Raises:
      UserError: the template fails, or takes more than 5 s, 512 MiB of memory (Linux) or 16 MiB of output; or a
        variable cannot be written as JSON.
    """
    try:
        request = json.dumps({"template": template, "variables": dict(variables)}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat template: messages, tools and options must be plain JSON values: {error}") from error
    worker = _take_worker()
    try:
        status, body = worker.render(request)
    except BaseException as error:
        worker.close()  # its pipe is in an unknown state, whatever interrupted it
        if isinstance(error, _TimeUp):
            raise UserError(f"chat template: not done after {protocol.MAX_SECONDS:g} s; it was stopped") from None
        if isinstance(error, OSError):
            raise UserError(f"chat template: rendering crashed its process: {error}") from error
        raise
    if len(_idle) < MAX_IDLE_WORKERS:
        _idle.append(worker)
    else:
        worker.close()
    text = body.decode("utf-8", "surrogatepass")
    if status == protocol.ERROR:
        raise UserError(f"chat template: {text}")
    return text
