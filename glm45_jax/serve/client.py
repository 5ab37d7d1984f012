"""A client of a running server, for the commands that measure and question one."""

from __future__ import annotations

from typing import Any

import httpx


def connect(url: str, api_key: str | None = None, **options: Any) -> httpx.AsyncClient:
    """A client of the server at `url`, with or without its /v1; `options` are those of `httpx.AsyncClient`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, **options)
