"""The golden outputs: what a model wrote, and what other implementations' tests expect of a parser."""

import json
from pathlib import Path

import prove_parsing
import pytest

from glm45_jax.text import parse_output

FILE = Path(__file__).parents[3] / "shared" / "golden" / "tool_parse.json"
CASES = json.loads(FILE.read_text("utf-8"))["cases"] if FILE.is_file() else []


def expected(case):
    """As JSON, which tells 1 from 1.0 and True; content stripped, as the golden's notes ask."""
    wanted = case["expected"]
    return json.dumps([wanted["reasoning"], (wanted["content"] or "").strip(), wanted["tool_calls"]])


@pytest.mark.skipif(not CASES, reason="the golden folder ../shared/golden is not beside this repository")
def test_all_golden_cases():
    assert len(CASES) >= 53
    for case in CASES:
        whole = parse_output(case["text"], case["tools"], case["thinking"])
        calls = [{"name": call.name, "arguments": call.arguments} for call in whole.tool_calls]
        assert json.dumps([whole.reasoning, whole.content or "", calls]) == expected(case), case["id"]


@pytest.mark.skipif(not CASES, reason="the golden folder ../shared/golden is not beside this repository")
def test_golden_cases_cut_anywhere():
    for case in CASES:
        text, tools, thinking = case["text"], case["tools"], case["thinking"]
        prove_parsing.check(text, thinking, tools, every_cut=True)
        for seed in range(20):
            prove_parsing.check(text, thinking, tools, seed)
        if case["chunks"]:
            assert prove_parsing.joined(case["chunks"], tools, thinking) == prove_parsing.joined(
                [text], tools, thinking
            )
