"""Around the whole application: who may ask, and what is noted of each request."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.forms import form_of
from glm45_jax.serve.metrics import Metrics
from glm45_jax.serve.record import Record, record_of

log = logging.getLogger("glm45_jax.serve")

_OPEN = ("/health", "/")  # what needs no key: whether it lives, and the page, which asks for one


class Guard:
    """Lets a request through where it brings a key, gives it an id, writes one line of JSON when it has ended."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], metrics: Metrics, routes: frozenset[str]):
        self._app, self._metrics, self._routes = app, metrics, routes
        self._keys = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        record = record_of(scope)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        allowed = scope["path"] in _OPEN or self._knows(Headers(scope=scope))
        app = self._app if allowed else _unauthorized(scope["path"])
        try:
            await app(scope, receive, noted)
        finally:
            if record.gone:
                record.status = 499
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.saw(route, record)
            log.info(json.dumps(_line(scope["method"], route, record)))

    def _knows(self, headers: Headers) -> bool:
        """Whether a known key is given, once; it takes as long for a wrong one as for a right one."""
        if not self._keys:
            return True
        bearers, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
        scheme, _, bearer = bearers[0].partition(" ") if len(bearers) == 1 else ("", "", "")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", plain[0] if len(plain) == 1 else ""]
        digests = [_digest(key.encode("latin-1", "replace")) for key in given]
        known = [hmac.compare_digest(digest, one) for digest in digests for one in self._keys]
        return any(known) and len(bearers) <= 1 and len(plain) <= 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(path: str) -> ASGIApp:
    error = ApiError(
        401, "an API key is needed, as Authorization: Bearer KEY or x-api-key: KEY", code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip
    return form_of(path).response(error)


def _line(method: str, route: str, record: Record) -> dict[str, object]:
    """Neither contents nor addresses."""
    line: dict[str, object] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": record.id,
        "method": method[:16],
        "route": route,
        "status": record.status,
        "seconds": round(time.monotonic() - record.began, 4),
    }
    if record.answers:
        line |= {
            "answers": record.answers,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
        }
    if record.first_token:
        line["first_token_seconds"] = round(record.first_token - record.began, 4)
    return line
