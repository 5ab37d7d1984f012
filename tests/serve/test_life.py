"""Keys, queues, clients that go away, the end, and the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import threading
import time

import pytest

from glm45_jax.errors import UserError
from glm45_jax.infer import Delta
from glm45_jax.serve import App, ServeOptions, bind, run
from tests.serve.support import CHAT, HELLO, Visit, ask, connect, events, refusal, scripted, until

LONG = {"messages": HELLO, "max_tokens": 1500, "ignore_eos": True}


@pytest.mark.few(1)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(app, engine, stream) -> None:
    async def go() -> None:
        before = engine.stats()["cancelled"]
        visit = Visit(app, CHAT, {**LONG, "stream": stream, "n": 3})
        task = visit.begin()
        await until(lambda: engine.stats()["running"] == 3)
        if stream:
            await until(lambda: len(visit.chunks) > 6)
        visit.leave()
        await asyncio.wait_for(task, 60)
        await until(lambda: engine.stats()["pages_in_use"] == 0)
        assert engine.stats()["cancelled"] == before + 3 and app.gate.inside == 0
        assert b"[DONE]" not in b"".join(visit.chunks)

    asyncio.run(go())


def test_too_many_that_wait_are_told_to_come_again(engine) -> None:
    fake_app, fake = scripted(engine, held=True, slots=1)
    app = App(fake, "small", ServeOptions(queue=1))  # pyright: ignore[reportArgumentType]
    del fake_app

    async def go() -> None:
        visits = [Visit(app, CHAT, {"messages": HELLO}) for _ in range(3)]
        tasks = [visit.begin() for visit in visits[:2]]
        await until(lambda: len(fake.requests) == 2)
        await asyncio.wait_for(visits[2].begin(), 60)
        assert visits[2].status == 429
        for request in fake.requests:
            request.push(Delta(text="a", finish_reason="stop"))
        await asyncio.gather(*tasks)
        assert [visit.status for visit in visits] == [200, 200, 429] and app.gate.inside == 0

    asyncio.run(go())
    response = ask(App(fake, "x", ServeOptions(queue=0)), CHAT, {"messages": []})  # pyright: ignore[reportArgumentType]
    assert response.status_code == 400


def test_more_answers_than_room_are_served_alone(engine) -> None:
    app, fake = scripted(engine, *["a"] * 5, slots=1)
    small = App(fake, "small", ServeOptions(queue=1))  # pyright: ignore[reportArgumentType]
    assert len(ask(small, CHAT, {"messages": HELLO, "n": 5}).json()["choices"]) == 5
    assert small.gate.inside == app.gate.inside == 0


def test_while_draining_only_running_requests_go_on(engine) -> None:
    app, fake = scripted(engine, held=True)

    async def go() -> None:
        visit = Visit(app, CHAT, {"messages": HELLO})
        task = visit.begin()
        await until(lambda: fake.requests)
        app.gate.draining = True
        late = Visit(app, CHAT, {"messages": HELLO})
        await late.begin()
        assert late.status == 503
        fake.requests[0].push(Delta(text="a", finish_reason="stop"))
        await task
        assert visit.status == 200

    asyncio.run(go())
    response = ask(app, CHAT, {"messages": HELLO})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert ask(app, "/ready").status_code == 503 and ask(app, "/health").status_code == 200


@pytest.mark.slow
def test_nothing_is_lost_among_clients_that_come_and_go(app, engine) -> None:
    """All kinds at once: those that stay are answered whole, and in the end nothing is held."""
    rng = random.Random(0)

    forms = [
        (CHAT, "max_tokens", {"messages": HELLO}, b"data: [DONE]\n\n"),
        ("/v1/messages", "max_tokens", {"messages": HELLO}, b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        ("/v1/responses", "max_output_tokens", {"input": "the cat", "store": True}, b""),
    ]

    async def stays(number: int) -> None:
        path, most, body, last = forms[number % 3]
        body = {**body, most: 5 + number % 20, "stream": True} | ({"n": 1 + number % 2} if path == CHAT else {})
        visit = Visit(app, path, body)
        await asyncio.wait_for(visit.begin(), 120)
        assert visit.status in (200, 429)
        assert visit.status == 429 or (visit.chunks[-2].endswith(last) and visit.chunks[-1] == b"")

    async def leaves(number: int) -> None:
        path, most, body, _ = forms[number % 3]
        visit = Visit(app, path, {**body, most: 1500, "stream": bool(number % 2)})
        task = visit.begin()
        await asyncio.sleep(rng.random() / 5)
        visit.leave()
        await asyncio.wait_for(task, 120)

    async def errs(number: int) -> None:
        visit = Visit(app, forms[number % 3][0], {"messages": [number]})
        await asyncio.wait_for(visit.begin(), 120)
        assert visit.status in (400, 429)

    async def go() -> None:
        tasks = []
        for number in range(100):
            tasks.append(asyncio.create_task(rng.choice([stays, leaves, errs])(number)))
            await asyncio.sleep(rng.random() / 50)
        await asyncio.gather(*tasks)
        await until(lambda: engine.stats()["pages_in_use"] == engine.stats()["waiting"] == 0)
        assert app.gate.inside == 0

    asyncio.run(go())


def test_an_engine_that_fails_says_so(engine) -> None:
    app, fake = scripted(engine, held=True)
    fake.held = False
    fake._answer = lambda request, tokens: request.push(Delta(finish_reason="error", error="broken"))
    fake.texts = ["", ""]
    error = refusal(app, CHAT, {"messages": HELLO}, 500)
    assert (error["message"], error["type"], error["code"]) == ("broken", "server_error", "engine_error")
    *_, last = events(app)
    assert last["error"]["message"] == "broken"
    fake.failure = RuntimeError("gone")
    assert ask(app, "/health").status_code == ask(app, "/ready").status_code == 503


def test_headers_that_trickle(engine) -> None:
    """CVE-2025-48956, the slow kind: the connection is closed, and the server ends when it is told to."""
    app, listener = App(engine, "small", ServeOptions(header_seconds=0.5)), bind(port=0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=run, args=(app, listener), daemon=True)
    thread.start()
    connection = connect(port)
    connection.settimeout(0.05)
    began = time.monotonic()
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        while time.monotonic() - began < 10:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if connection.recv(1) == b"":
                    break
    assert 0.4 < time.monotonic() - began < 5
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
    app.gate.draining = True
    thread.join(20)
    assert not thread.is_alive()


def test_a_port_that_is_taken() -> None:
    with bind(port=0) as listener, pytest.raises(UserError, match="cannot listen"):
        listener.listen()
        bind(port=listener.getsockname()[1])
    for where in (("no.such.host.invalid", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1)):
        with pytest.raises(UserError, match="cannot listen"):
            bind(*where)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(engine) -> App:
    return App(engine, "small", ServeOptions(api_keys=("right", "schlüssel")))


ROUTES = [
    ("GET", "/v1/models"), ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/responses"),
    ("GET", "/v1/responses/x"), ("DELETE", "/v1/responses/x"), ("GET", "/page.html"), ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"), ("GET", "/ready"), ("GET", "/nothing"), ("OPTIONS", CHAT), ("GET", "/health/"),
    ("GET", "http://test//health"), ("GET", "/HEALTH"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_one_needs_a_key(locked, method, path) -> None:
    response = ask(locked, path, method=method)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert ask(locked, "/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_routes_need_one_too(locked, path) -> None:
    response = ask(locked, path, method="POST")
    assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "headers",
    [
        [], [("authorization", "")], [("authorization", "Bearer")], [("authorization", "Bearer ")],
        [("authorization", "Bearer wrong")], [("authorization", "right")], [("authorization", "Basic right")],
        [("authorization", "Bearer right right")], [("authorization", b"Bearer \xff\xfe")],
        [("authorization", "Bearer right"), ("authorization", "Bearer right")],
        [("authorization", "Bearer " + "x" * 9000)], [("x-api-key", "")], [("x-api-key", "Bearer right")],
        [("x-api-key", "right"), ("x-api-key", "right")], [("x-api-key", b"\xff")],
        [("authorization", "Bearer right"), ("authorization", "Bearer x"), ("x-api-key", "right")],
    ],
    ids=lambda headers: str(headers)[:50],
)  # fmt: skip
def test_wrong_keys(locked, headers) -> None:
    """CVE-2025-59425: compared by digests in constant time; odd headers are wrong, not a fault."""
    assert ask(locked, "/v1/models", headers=headers).status_code == 401


def test_right_keys(locked) -> None:
    assert ask(locked, "/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
    assert ask(locked, "/v1/models", headers={"x-api-key": "right"}).status_code == 200
    assert ask(locked, "/v1/models", headers={"x-api-key": "right", "authorization": "Bearer x"}).status_code == 200
    key = "bearer schlüssel".encode()
    assert ask(locked, "/v1/models", headers=[(b"authorization", key)]).status_code == 200


def test_options_that_make_no_sense() -> None:
    for options in ({"api_keys": ("",)}, {"queue": -1}, {"max_n": 0}, {"max_body_bytes": 0}):
        with pytest.raises(UserError):
            ServeOptions(**options)


# --- the log ---------------------------------------------------------------------------------------------------------


def test_a_line_of_json_without_contents(app, caplog) -> None:
    caplog.set_level(logging.INFO, "glm45_jax.serve")
    secret = "xyzzy\nplugh"
    response = ask(app, f"{CHAT}?q={secret[:5]}", {"messages": [{"role": "user", "content": secret}], "max_tokens": 3})
    ask(app, f"/{secret[:5]}%0AGET%20/forged", headers={"user-agent": secret[:5]})
    lines = [record.getMessage() for record in caplog.records if record.name == "glm45_jax.serve"]
    first, second = map(json.loads, lines)
    assert first["route"] == CHAT and first["status"] == 200 and first["id"] == response.headers["x-request-id"]
    assert 1 <= first["generated_tokens"] <= 3 and first["prompt_tokens"] > 5 and first["seconds"] > 0
    assert (second["route"], second["status"]) == ("other", 404)
    assert not any(word in line for line in lines for word in ("xyzzy", "plugh", "forged", "\n"))
