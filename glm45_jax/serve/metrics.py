"""Prometheus metrics: of the server's requests, and of the engine as it is when asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from glm45_jax.infer import Engine
from glm45_jax.serve.answers import Gate
from glm45_jax.serve.record import Record

# name in the engine's `stats` -> what it is
_GAUGES = {
    "running": "Sequences at work.",
    "waiting": "Sequences that wait for a slot or for pages.",
    "pages": "Pages of the cache.",
    "pages_in_use": "Pages of the cache that sequences hold.",
}
_COUNTERS = {
    "steps": "Steps of the engine.",
    "preempted": "Sequences that gave their pages back and began anew.",
    "cancelled": "Answers that were no longer wanted.",
    "prefix_tokens_asked": "Tokens of prompts that were looked for in the cache.",
    "prefix_tokens_found": "Tokens of prompts that the cache held already.",
    "drafts_given": "Tokens that the MTP layer drafted.",
    "drafts_accepted": "Drafted tokens that the model chose too.",
    "compiled_in_service": "Programs compiled after the start.",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, engine: Engine, gate: Gate):
        self._engine, self._gate = engine, gate
        self._registry = registry = CollectorRegistry()
        registry.register(self)
        self._requests = Counter(
            "glm45_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self._prompt = Counter("glm45_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._generated = Counter("glm45_generated_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "glm45_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._each = Histogram(
            "glm45_time_per_token_seconds", "Of each token of an answer after the first, a request's mean.",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip

    def saw(self, route: str, record: Record) -> None:
        """A request has ended."""
        self._requests.labels(route, str(record.status)).inc()
        self._prompt.inc(record.prompt_tokens)
        self._generated.inc(record.generated_tokens)
        if record.first_token:
            self._first.observe(record.first_token - record.began)
            if (further := record.generated_tokens - record.answers) > 0:
                each = (record.last_token - record.first_token) * record.answers / further
                self._each.observe(each)

    def collect(self) -> Iterator[Metric]:
        """For the registry: what the engine says of itself."""
        stats = self._engine.stats()
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"glm45_{name}", what, stats[name])
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"glm45_{name}", what, stats[name])
        yield GaugeMetricFamily("glm45_answers_on_their_way", "Answers at work or waiting.", self._gate.inside)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
