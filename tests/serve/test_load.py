"""`glm45 bench serve` and `glm45 eval exact` against a running server, and their arithmetic."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from glm45_jax.cli import main
from glm45_jax.errors import UserError
from glm45_jax.serve import load as loads
from glm45_jax.serve.examine import interval, is_right, read_questions
from tests.serve.served import KEY, served
from tests.support import ROOT


def test_requests_are_drawn_alike_for_a_seed():
    load = loads.Load(requests=40, rate=5.0, prompt_tokens=(8, 30), new_tokens=(1, 9), shared_tokens=6, shared_groups=2)
    pool = list(range(100, 200))
    planned = loads.draw(load, pool)
    assert planned == loads.draw(load, pool)
    assert {len(p.prompt) for p in planned} <= set(range(8, 31)) and {p.new_tokens for p in planned} <= set(
        range(1, 10)
    )
    assert len({tuple(p.prompt[:6]) for p in planned}) == 2, "two groups of beginnings"
    times = [p.at for p in planned]
    assert times == sorted(times) and 40 / 5 / 3 < times[-1] < 40 / 5 * 3, "about 5 a second"
    assert all(isinstance(p.prompt, str) for p in loads.draw(load, ["a", "b"]))


def test_percentiles_and_goodput():
    """Of requests whose figures are known by hand."""
    seen = [
        loads.Seen(began=0.0, moments=[0.1 * i, 0.1 * i + 1.0], prompt_tokens=4, tokens=11, ended=0.1 * i + 1.0)
        for i in range(1, 11)
    ]
    seen.append(loads.Seen(began=0.0, error="refused"))
    figures = loads.summary(seen, 2.0, first_limit=0.5, token_limit=0.2)
    assert figures["requests"] == 11 and figures["failed"] == 1 and figures["errors"] == ["refused"]
    assert figures["generated_tokens_per_second"] == 55.0 and figures["requests_per_second"] == 5.0
    assert figures["to_first_token"] == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 1.0})
    assert figures["per_token"] == pytest.approx({"p50": 0.1, "p90": 0.1, "p99": 0.1})
    assert figures["goodput"] == 2.5 and figures["kept"] == 5 / 11


def glm45(*arguments: str) -> str:
    """What a command that must succeed prints; in a process of its own, beside the server's."""
    command = [sys.executable, "-m", "glm45_jax", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_against_a_server(engine, tmp_path):
    plot = tmp_path / "load.png"
    with served(engine, "small") as server:
        arguments = ["bench", "serve", "--url", server.url, "--api-key", KEY, "--new-tokens", "5"]
        shape = ["--requests", "6", "--concurrency", "3", "--prompt-tokens", "20-24", "--shared-tokens", "16"]
        figures = json.loads(glm45(*arguments, *shape, "--plot", str(plot), "--json"))
        assert "tokens/s" in glm45(*arguments, "--requests", "3", "--rate", "50")
    assert figures["requests"] == 6 and figures["failed"] == 0 and figures["generated_tokens"] == 30
    assert 120 <= figures["prompt_tokens"] <= 144
    assert figures["cached_tokens"] >= 3 * 8, "the second three found the beginning of the first in the cache"
    assert figures["to_first_token"]["p50"] <= figures["whole"]["p99"]
    assert plot.stat().st_size > 1000


def test_requests_that_are_refused_are_counted(engine):
    with served(engine, "small") as server:
        load = loads.Load(requests=3, concurrency=3, new_tokens=(10**6, 10**6))
        seen, seconds = asyncio.run(loads.run(load, server.url, api_key=KEY))
    figures = loads.summary(seen, seconds)
    assert figures["failed"] == 3 and "status 400" in figures["errors"][0] and figures["to_first_token"] is None


def test_no_server(capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers" in capsys.readouterr().err
    assert main(["bench", "serve", "--prompt-tokens", "9-3"]) == 2
    assert "--prompt-tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, match, right",
    [
        (" 17\n", "exact", True), ("It is 17", "exact", False), ("so 1,017.0 is it", "number", True),
        ("1017 or 5", "number", False), ("none", "number", False), ("in PARIS.", "contains", True),
    ],
)  # fmt: skip
def test_what_is_right(text, match, right):
    wanted = {"exact": ("17",), "number": ("1017",), "contains": ("Paris", "Lutetia")}[match]
    assert is_right(text, wanted, match) == right


@pytest.mark.slow
def test_questions_to_a_server(engine, tmp_path):
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = {"prompt": "1 + 1?", "answer": 2}, {"messages": [{"role": "user", "content": "x"}], "answer": ["a"]}
    file.write_text("\n\n".join(map(json.dumps, rows)))
    with served(engine, "small") as server:
        where = ["--url", server.url, "--api-key", KEY, "--output", str(out)]
        figures = json.loads(glm45("eval", "exact", str(file), *where, "--max-tokens", "4", "--no-thinking", "--json"))
    assert figures["questions"] == 2 and figures["failed"] == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["answers"] for a in answers] == [["2"], ["a"]] and figures["right"] == sum(a["right"] for a in answers)


@pytest.mark.parametrize("line, why", [("{", "not JSON"), ('{"prompt": "x"}', "expected"), ("", "no questions")])
def test_bad_questions(line, why, tmp_path):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=why):
        read_questions(tmp_path / "q.jsonl")


def test_the_interval():
    """Wilson's, for 8 of 10: from 0.490 to 0.943."""
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0, 5)[0] == pytest.approx(0, abs=1e-12) and interval(5, 5)[1] == 1
