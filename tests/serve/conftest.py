"""One small random model behind the application, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glm45_jax.infer import Engine, EngineOptions
from glm45_jax.serve import App, ServeOptions
from glm45_jax.text import Tokenizer
from tests.infer.conftest import quick_programs  # noqa: F401
from tests.serve.served import Served, served, served_script
from tests.support import random_params, small_config, small_tokenizer

SIZES = EngineOptions(slots=4, cache_tokens=4096, page_size=8, step_tokens=64, cache_dtype="float32", warm_up=False)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="package")
def engine(tokenizer) -> Iterator[Engine]:
    config = small_config(
        num_hidden_layers=2, vocab_size=384, max_position_embeddings=2048, eos_token_id=tokenizer.eos_ids
    )
    with Engine(random_params(config), config, tokenizer=tokenizer, options=SIZES) as engine:
        yield engine
    stats = engine.stats()
    assert stats["pages_in_use"] == stats["running"] == stats["waiting"] == 0


@pytest.fixture(scope="package")
def app(engine) -> App:
    return App(engine, "small", ServeOptions(queue=60, max_tokens=4096))


@pytest.fixture(scope="module")
def script(engine) -> Iterator[Served]:
    """A server that says what it is told to."""
    with served_script(engine) as server:
        yield server


@pytest.fixture(scope="module")
def small(engine) -> Iterator[Served]:
    """A server whose model is random."""
    with served(engine, "small") as server:
        yield server
