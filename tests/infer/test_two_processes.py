"""Two processes serve one sharded model: as one process would, and both end when one does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.cli.serve import serving_mesh
from glm45_jax.errors import UserError
from glm45_jax.infer.channel import Channel, Connections, Lost, accept, connect, listen, new_token, packed
from tests.support import QUICK_FLAGS, ROOT, small_config, small_tokenizer, write_checkpoint

ENDS_WITHIN = 60  # seconds after one has died


# --- the channel -----------------------------------------------------------------------------------------------------


def pair() -> tuple[socket.socket, Channel]:
    one, other = socket.socketpair()
    return one, Channel(other)


def test_messages_arrive_as_they_were_sent(monkeypatch):
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)  # no TCP here
    sender, receiver = pair()
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3).T, np.bool_(True), np.zeros((3, 0), np.float32)]
    sender.sendall(packed({"do": "read", "most": 2}, arrays) + packed({}))
    values, found = receiver.receive()
    assert values == {"do": "read", "most": 2}
    for got, want in zip(found, arrays, strict=True):
        assert got.dtype == np.asarray(want).dtype
        np.testing.assert_array_equal(got, want)
    assert receiver.receive() == ({}, [])
    sender.close()
    with pytest.raises(Lost):
        receiver.receive()


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"\xff" * 8, "expected 65536 at most"),
        (packed({})[:4] + b'{"arrays":[]', None),
        (b'\x00\x00\x00\x19{"arrays": [["|O", [1]]]}' + bytes(8), "other things than numbers"),
        (b'\x00\x00\x00\x20{"arrays": [["<f8", [999999999]]]}', None),
    ],
)
def test_what_is_no_message_is_refused(monkeypatch, message, why):
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)
    sender, receiver = pair()
    sender.sendall(message)
    sender.close()
    with pytest.raises((UserError, ValueError), match=why):
        receiver.receive()


def test_who_does_not_know_the_token_is_sent_away():
    token, lost = new_token(), []
    with listen("127.0.0.1") as listener:
        host, port = listener.getsockname()
        stranger = connect(host, port, "x" * len(token), 1, 5)
        friend = connect(host, port, token, 1, 5)
        connections = Connections(accept(listener, token, [1], 10), lost.append)
        connections.send({"hello": 1})
        assert friend.receive()[0] == {"hello": 1}
        with pytest.raises(Lost):
            stranger.receive()
        friend.close()
        for _ in range(100):
            time.sleep(0.02 if not lost else 0)
        assert "lost process 1" in str(lost[0])
        with pytest.raises(UserError, match=r"processes \[2\] have not come"):
            accept(listener, token, [2], 0.2)


@pytest.mark.parametrize("text", ["tensor", "tensor=0", "data=2", "tensor=2,tensor=2", "tensor=2,", "tensor=99999", ""])
def test_meshes_that_are_refused(text):
    with pytest.raises(UserError, match=r"--mesh|does not divide"):
        serving_mesh(text)


# --- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """The same command in several processes, each with `devices` CPU devices."""

    def __init__(self, folder: Path, command: list[str], count: int, devices: int):
        env = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": f"{QUICK_FLAGS} --xla_force_host_platform_device_count={devices}",
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        if count > 1:
            env |= {"GLM45_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "GLM45_NUM_PROCESSES": str(count)}
        self.logs = [folder / f"{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            own = env | ({"GLM45_PROCESS_ID": str(i)} if count > 1 else {})
            with log.open("w") as out:
                command_line = [sys.executable, "-m", *command]
                self.processes.append(subprocess.Popen(command_line, cwd=ROOT, env=own, stdout=out, stderr=out))

    def codes(self, seconds: float) -> list[int]:
        """The exit codes; all must have ended in time."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            self.kill()

    def said(self, number: int) -> str:
        return self.logs[number].read_text("utf-8", "replace")

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "cache", "devices"), [("tensor=2", "float32", 2), ("expert=2,tensor=2", "int8", 4)])
def test_two_answer_as_one(tmp_path, axes, cache, devices):
    """With drafts, penalties, grammars and other weights on the way, over two processes and over one."""
    found = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        command = ["tests.infer.two_processes", axes, cache, str(file)]
        run = Processes(tmp_path / str(count), command, count, devices // count)
        assert not any(run.codes(400)), [run.said(i)[-3000:] for i in range(count)]
        found.append(json.loads(file.read_text()))
    assert found[0]["answers"] == found[1]["answers"] and len(found[0]["answers"]) == 18
    assert found[1]["stats"]["pages_in_use"] == 0 and found[1]["stats"]["drafts_given"] > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    tokenizer = small_tokenizer()
    config = small_config(
        num_hidden_layers=2, vocab_size=384, max_position_embeddings=2048, eos_token_id=tokenizer.eos_ids
    )
    return write_checkpoint(folder, config, tokenizer)


class Server(Processes):
    """`glm45 serve` in two processes."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [
            "glm45_jax", "serve", str(checkpoint), "--port", str(port), "--no-warm-up", "--slots", "4",
            "--cache-tokens", "4096", "--step-tokens", "32", "--mesh", "tensor=2",
        ]  # fmt: skip
        super().__init__(folder, command, 2, 1)
        for _ in range(1200):
            assert all(p.poll() is None for p in self.processes), [self.said(i) for i in range(2)]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError([self.said(i) for i in range(2)])

    def complete(self, prompt: str, most: int) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": most, "temperature": 0, "ignore_eos": True, "logprobs": 1}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).json()


@pytest.mark.slow
def test_two_serve_over_http_and_end_in_order(checkpoint, tmp_path):
    server = Server(checkpoint, tmp_path)
    try:
        config, params = glm.load_checkpoint(checkpoint)
        tokenizer = glm.text.Tokenizer.load(checkpoint)
        answer = server.complete("the cat", 9)["choices"][0]
        (wanted,) = glm.infer.generate_detailed(
            params, config, [tokenizer.encode("the cat")], 9, stop_ids=[], tokenizer=tokenizer
        )
        assert answer["text"] == wanted.text
        np.testing.assert_allclose(answer["logprobs"]["token_logprobs"], wanted.logprobs, atol=1e-4)
        late = []
        thread = threading.Thread(target=lambda: late.append(server.complete("a dog", 200)))
        thread.start()
        while "glm45_running 0" in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.02)
        for process in server.processes:  # as Slurm and Kubernetes do
            process.send_signal(signal.SIGTERM)
        thread.join(120)
        assert late[0]["usage"]["completion_tokens"] == 200, "running requests finish"
        assert server.codes(ENDS_WITHIN) == [0, 0], [server.said(i)[-2000:] for i in range(2)]
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_both(checkpoint, tmp_path, victim):
    server = Server(checkpoint, tmp_path)
    try:
        assert server.complete("the cat", 3)["choices"]
        server.processes[victim].kill()
        codes = server.codes(ENDS_WITHIN)
        said = server.said(1 - victim)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
        # the coordinator's end jax notices itself, perhaps first
        assert f"lost process {victim}" in said or (victim == 0 and "coordination service" in said.lower()), said
    finally:
        server.kill()
