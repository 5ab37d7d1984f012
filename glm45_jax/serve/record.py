"""What is noted of one HTTP request, for the log and the metrics: never what it says."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

_KEY = "glm45.record"


@dataclasses.dataclass
class Record:
    """Filled in by whoever knows; times are of `time.monotonic`."""

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    began: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0
    gone: bool = False
    answers: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record of a request, made where there is none yet."""
    return scope.setdefault(_KEY, Record())
