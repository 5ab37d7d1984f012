"""What a server is told at its start."""

from __future__ import annotations

import dataclasses

from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Who may ask, and how much."""

    api_keys: tuple[str, ...] = ()
    """One of these must come as `Authorization: Bearer KEY`; without any, everyone may ask."""
    queue: int = 128
    """Answers that may wait beside those at work; more requests get status 429."""
    max_n: int = 16
    """Answers of one request."""
    max_tokens: int = 131072
    """The most that `max_tokens` may be."""
    max_body_bytes: int = 8 << 20
    """Of a request."""
    max_header_bytes: int = 32 << 10
    """Of a request's headers together."""
    max_connections: int = 1024
    """Open at a time; more get status 503."""
    header_seconds: float = 30.0
    """In which a connection's next request must have begun, its headers whole."""
    body_seconds: float = 30.0
    """In which a request's body must have come."""
    store_bytes: int = 64 << 20
    """For answers that clients ask to be kept (`store` of POST /v1/responses), in memory; 0: none are."""
    drain_seconds: float = 300.0
    """How long running requests may go on after SIGTERM."""

    def __post_init__(self) -> None:
        for name in ("max_n", "max_tokens", "max_body_bytes", "max_header_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("queue", "store_bytes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not all(self.api_keys):
            raise UserError("an API key is empty")


# Limits that no one needs to change.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOOLS, MAX_TOOL_VALUES = 128, 10_000
MAX_DEPTH = 64
MAX_PATTERN_LENGTH = 1024
MAX_PROMPTS = 64
MAX_STORED = 1024
