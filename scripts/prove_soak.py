"""Serves clients of every kind for half an hour, and shows that nothing leaks, nothing is lost and nothing gets slower.

    python scripts/prove_soak.py --json docs/proofs/soak.json
    python scripts/prove_soak.py --minutes 1 --clients 8

`glm45 serve` of a small random model with drafts and a cache too small for all, and clients that at random ask whole
or streamed, for text or for JSON by a schema, go away in the middle, send half a request, too much, nonsense or a wrong
key. Each says what must come back. At the end no page may be taken, memory must be flat, the last third's times must be
those of the second, and a SIGTERM under load must let running answers end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import tyro
from circumstances import circumstances, write_figures

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests`
KEY = "soak"
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer"}},
    "required": ["name", "count"], "additionalProperties": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """A soak."""

    minutes: float = 30
    clients: int = 16
    seed: int = 0
    json: Path | None = None
    """Where to write the figures."""


class Failed(Exception):
    """Something that must not happen."""


# --- the server ----------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """A small random model with an MTP layer, and a tokenizer."""
    from glm45_jax.config import get_preset
    from tests.support import small_tokenizer, write_checkpoint

    tokenizer = small_tokenizer()
    config = get_preset("tiny", vocab_size=384, max_position_embeddings=2048, eos_token_id=tokenizer.eos_ids)
    return write_checkpoint(folder, config, tokenizer)


class Server:
    """`glm45 serve`, as a process."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "glm45_jax", "serve", str(model), "--port", str(self.port), "--drafts", "1",
            "--slots", "8", "--cache-tokens", "1536", "--step-tokens", "64", "--queue", "24",
        ]  # fmt: skip
        env = os.environ | {"GLM45_API_KEY": KEY, "JAX_PLATFORMS": "cpu"}
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)

    def wait(self) -> None:
        for _ in range(1200):
            if self.process.poll() is not None:
                raise Failed(f"the server has ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.25)
        raise Failed("the server does not come up")

    def memory(self) -> float:
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text
        lines = (line.split() for line in text.splitlines() if line.startswith("glm45_") and "{" not in line)
        return {name: float(value) for name, value in lines}


# --- clients -------------------------------------------------------------------------------------------------------


class Clients:
    """What they do, what came back and how long it took."""

    def __init__(self, server: Server, seed: int):
        self.server, self.rng = server, random.Random(seed)
        self.counts, self.failures = Counter[str](), list[str]()
        self.times: list[tuple[float, float]] = []  # when a whole answer began, and seconds for each of its tokens
        self.http = httpx.AsyncClient(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120, limits=httpx.Limits()
        )
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "whole": self.whole, "streamed": self.streamed, "constrained": self.constrained, "gone": self.gone,
            "half": self.half, "oversize": self.oversize, "nonsense": self.nonsense, "stranger": self.stranger,
        }  # fmt: skip

    async def go_on(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self.rng.choices([*self.kinds], [6, 6, 2, 3, 1, 1, 1, 1])[0]
            try:
                await self.kinds[kind]()
                self.counts[kind] += 1
            except (Failed, httpx.HTTPError, OSError, ValueError, LookupError) as error:
                self.failures.append(f"{kind}: {type(error).__name__}: {error}"[:300])

    def body(self, **fields: Any) -> dict[str, Any]:
        rng = self.rng
        words = " ".join(rng.choices("the cat sat on the mat and the dog ran".split(), k=rng.randint(1, 120)))
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": rng.randint(1, 80), "ignore_eos": True}
        if rng.random() < 0.3:
            body |= {"temperature": 0.7, "seed": rng.randint(0, 99), "n": rng.randint(1, 3)}
        if rng.random() < 0.1:
            body |= {"presence_penalty": 0.5}
        return body | fields

    async def whole(self) -> None:
        body, began = self.body(), time.monotonic()
        response = await self.post(body)
        if response is not None:
            answer = response.json()
            wanted = body["max_tokens"] * body.get("n", 1)
            if answer["usage"]["completion_tokens"] != wanted:
                raise Failed(f"{answer['usage']['completion_tokens']} tokens instead of {wanted}")
            self.times.append((began, (time.monotonic() - began) / body["max_tokens"]))

    async def streamed(self) -> None:
        body = self.body(stream=True, stream_options={"include_usage": True})
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if self.refused(response):
                return
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        if lines[-1] != "data: [DONE]":
            raise Failed(f"a stream that ends with {lines[-1]}")
        usage = json.loads(lines[-2][6:])["usage"]
        if usage["completion_tokens"] != body["max_tokens"] * body.get("n", 1):
            raise Failed(f"a stream of {usage['completion_tokens']} tokens")

    async def constrained(self) -> None:
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
        body = self.body(**fields, chat_template_kwargs={"enable_thinking": False}) | {"max_tokens": 200, "n": 1}
        del body["ignore_eos"]
        response = await self.post(body)
        if response is not None and response.json()["choices"][0]["finish_reason"] == "stop":
            value = json.loads(response.json()["choices"][0]["message"]["content"])
            if value["name"] not in ("a", "b") or not isinstance(value["count"], int):
                raise Failed(f"not by the schema: {value}")

    async def gone(self) -> None:
        """Goes away after some events, or while the answer is awaited."""
        if self.rng.random() < 0.5:
            async with self.http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as response:
                count = self.rng.randint(0, 8)
                async for _ in response.aiter_lines():
                    count -= 1
                    if count <= 0:
                        return
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.rng.uniform(0.01, 0.5)):
                    await self.http.post("/v1/chat/completions", json=self.body())

    async def half(self) -> None:
        """A request that is never whole."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Content-Length: 500"]
        head = "".join(f"{line}\r\n" for line in [*lines, ""])
        writer.write(head[: self.rng.randint(1, len(head))].encode())
        await writer.drain()
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        writer.close()

    async def oversize(self) -> None:
        await self.refusal(413, content=b"[" * (9 << 20))

    async def nonsense(self) -> None:
        bodies = [b"{", b"[]", b'{"messages": 3}', b"\xff\xfe", b'{"messages": [{"role": 7}]}', b"[" * 9999]
        await self.refusal(400, content=self.rng.choice(bodies))

    async def stranger(self) -> None:
        await self.refusal(401, json=self.body(), headers={"Authorization": "Bearer wrong"})

    async def refusal(self, status: int, **request: Any) -> None:
        try:
            response = await self.http.post("/v1/chat/completions", **request)
        except httpx.WriteError:  # the server has answered and closed before all was sent
            return
        if response.status_code not in (status, 429):
            raise Failed(f"status {response.status_code} instead of {status}")

    async def post(self, body: dict[str, Any]) -> httpx.Response | None:
        response = await self.http.post("/v1/chat/completions", json=body)
        return None if self.refused(response) else response

    def refused(self, response: httpx.Response) -> bool:
        """Whether it has to come again, as it is told."""
        if response.status_code == 429 and "retry-after" in response.headers:
            self.counts["told to come again"] += 1
            return True
        if response.status_code != 200:
            raise Failed(f"status {response.status_code}")
        return False


async def watch(server: Server, until: float, samples: list[tuple[float, float]]) -> None:
    while time.monotonic() < until:
        samples.append((time.monotonic(), server.memory()))
        await asyncio.sleep(min(5.0, max(0.0, until - time.monotonic())))


# --- the end -------------------------------------------------------------------------------------------------------


async def idle(server: Server) -> dict[str, float]:
    """The metrics, when nothing is at work any more."""
    for _ in range(240):
        metrics = await asyncio.to_thread(server.metrics)
        if not metrics["glm45_running"] and not metrics["glm45_waiting"] and not metrics["glm45_answers_on_their_way"]:
            return metrics
        await asyncio.sleep(0.5)
    raise Failed(f"answers are still at work: {metrics}")


async def end_under_load(server: Server, clients: Clients) -> int:
    """SIGTERM while answers run: how many ended, all of them whole."""
    tasks = [asyncio.create_task(clients.streamed()) for _ in range(6)]
    await asyncio.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*tasks)
    code = await asyncio.to_thread(server.process.wait, 60)
    if code != 0:
        raise Failed(f"after SIGTERM the server ended with {code}")
    return len(tasks)


def thirds(values: list[tuple[float, float]], began: float, seconds: float) -> list[list[float]]:
    parts: list[list[float]] = [[], [], []]
    for at, value in values:
        parts[min(2, int(3 * (at - began) / seconds))].append(value)
    return parts


def p99(values: list[float]) -> float:
    return sorted(values)[max(0, int(len(values) * 0.99) - 1)]


def verdicts(figures: dict[str, Any], short: bool) -> list[str]:
    """What is wrong. Times and memory of a short run say nothing yet."""
    wrong = [f"{len(figures['failures'])} failures: {figures['failures'][:5]}"] if figures["failures"] else []
    if figures["pages_in_use_at_the_end"]:
        wrong.append(f"{figures['pages_in_use_at_the_end']} pages are still taken")
    if figures["compiled_in_service"]:
        wrong.append(f"{figures['compiled_in_service']} programs were compiled in service")
    if not short and figures["memory_mb"][2] > 1.05 * figures["memory_mb"][1]:
        wrong.append(f"memory grows: {figures['memory_mb']} MB in the three thirds")
    if not short and figures["p99_seconds_per_token"][2] > 1.5 * figures["p99_seconds_per_token"][1]:
        wrong.append(f"it gets slower: p99 {figures['p99_seconds_per_token']} s for a token in the three thirds")
    return wrong


async def soak(options: Options, server: Server) -> dict[str, Any]:
    clients, samples = Clients(server, options.seed), []
    began, seconds = time.monotonic(), 60 * options.minutes
    until = began + seconds
    await asyncio.gather(watch(server, until, samples), *(clients.go_on(until) for _ in range(options.clients)))
    metrics = await idle(server)
    last = await end_under_load(server, clients)
    memory, times = (thirds(values, began, seconds) for values in (samples, clients.times))
    return {
        "minutes": options.minutes, "clients": options.clients, "requests": dict(clients.counts),
        "failures": clients.failures, "tokens": metrics["glm45_generated_tokens_total"],
        "preempted": metrics["glm45_preempted_total"], "cancelled": metrics["glm45_cancelled_total"],
        "pages_in_use_at_the_end": metrics["glm45_pages_in_use"],
        "compiled_in_service": metrics["glm45_compiled_in_service_total"],
        "memory_mb": [round(max(part), 1) if part else None for part in memory],
        "p99_seconds_per_token": [round(p99(part), 4) if part else None for part in times],
        "answers_that_ended_after_sigterm": last,
    }  # fmt: skip


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    about = circumstances("jax", "starlette", "uvicorn", "llguidance")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(make_model(Path(folder)), Path(folder) / "log")
        try:
            server.wait()
            figures = asyncio.run(soak(options, server))
        finally:
            server.process.kill()
    wrong = verdicts(figures, short=options.minutes < 5)
    print(json.dumps(figures, indent=2))
    for line in wrong:
        print(f"FAILED: {line}")
    if not wrong:
        write_figures(options.json, about | figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
