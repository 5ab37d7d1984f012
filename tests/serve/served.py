"""A server on a port of this machine, in a thread, for clients that speak HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from glm45_jax.serve import App, ServeOptions, bind, run
from glm45_jax.text import Tokenizer
from tests.serve.support import Scripted, connect

KEY = "secret"


class Served:
    """Where an application listens, and what was asked of its engine."""

    def __init__(self, engine: Any, port: int):
        self.engine, self.url = engine, f"http://127.0.0.1:{port}"

    def says(self, *texts: str) -> None:
        """What the scripted engine answers next."""
        self.engine.texts = list(texts)
        self.engine.prompts.clear()
        self.engine.requests.clear()
        self.engine.asked.clear()


@contextlib.contextmanager
def served(engine: Any, name: str) -> Iterator[Served]:
    """Serves until the end, when it must stop as it is told to."""
    app, listener = App(engine, name, ServeOptions(api_keys=(KEY,), max_tokens=4096)), bind(port=0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=run, args=(app, listener), daemon=True)
    thread.start()
    connect(port).close()
    yield Served(engine, port)
    app.gate.draining = True
    thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def served_script(engine: Any) -> Iterator[Served]:
    with served(Scripted(engine), "scripted") as server:
        yield server


class Opened:
    """An engine whose prompts open the thought, as GLM-4.7's do: even a random model thinks."""

    def __init__(self, engine: Any):
        self._engine, self.tokenizer = engine, Tokenizer(engine.tokenizer.backend, chat_template="glm-4.7")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def eventually(holds: Callable[[], Any], seconds: float = 30) -> None:
    """Waits for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
