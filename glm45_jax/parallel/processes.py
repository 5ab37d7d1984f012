"""What processes that run together say to each other by way of jax's coordination service."""

from __future__ import annotations

from typing import Any

from jax._src import distributed  # jax has no public way to its key-value store; Orbax goes this way too

from glm45_jax.errors import UserError


def client() -> Any:
    """Of the coordination service."""
    return distributed.global_state.client


def coordinator_host() -> str | None:
    """The address by which the other processes know the first one."""
    address = distributed.global_state.coordinator_address
    return address.rpartition(":")[0].strip("[]") if address else None


def say(key: str, value: str | None) -> None:
    """Something for other processes to `hear`; None takes it back."""
    if value is None:
        client().key_value_delete(key)
    else:
        client().key_value_set(key, value)


def hear(key: str, seconds: float) -> str:
    """What another process says, when it does. Raises `UserError` where it has not after so many seconds."""
    try:
        return client().blocking_key_value_get(key, int(seconds * 1000))
    except Exception as error:  # jaxlib's own; the coordinator may be gone
        raise UserError(f"nothing was heard from process 0 within {seconds:g} s: {str(error)[:200]}") from error
