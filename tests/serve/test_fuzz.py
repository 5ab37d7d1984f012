"""Any body to any route, as scripts/prove_http.py does at length."""

from __future__ import annotations

import prove_http
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=prove_http.requests())
def test_requests_with_some_fields_replaced(request) -> None:
    prove_http.check(*request)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_any_bytes(data) -> None:
    prove_http.check_bytes(data)


@pytest.mark.parametrize("index", range(len(prove_http.SEEDS)))
def test_seeds_of_the_fuzzer(index) -> None:
    """They are answered, or refused for what is not there yet, and are the same as the fuzzer's bytes."""
    path, value = prove_http.SEEDS[index]
    body = prove_http.seeds()[index][2:].decode("latin-1").translate(prove_http.BYTES)
    assert body == prove_http.json.dumps(value)
    for text in prove_http.TEXTS:
        prove_http.check(path, body.encode(), text)


def test_most_seeds_are_answered() -> None:
    answered = [prove_http.check(path, prove_http.json.dumps(value).encode()) for path, value in prove_http.SEEDS]
    assert answered.count(200) >= len(answered) - 3


@pytest.mark.slow
def test_guided_by_coverage() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed (it is made for Linux alone)")
    found = prove_http.fuzzed(20)
    assert found["failures"] == 0 and found["inputs"] > 300


@pytest.mark.slow
@pytest.mark.parametrize("name", prove_http.HOSTILE)
def test_time_grows_with_the_size(name) -> None:
    """Eight times the body: eight times the time if linear, sixty-four if quadratic."""
    short, long = (prove_http.seconds_for(name, size) for size in (2**15, 2**18))
    assert long < 24 * short + 0.05, (short, long)
