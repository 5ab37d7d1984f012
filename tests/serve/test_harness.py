"""lm-evaluation-harness against the running server: both ways, with tasks of our own and nothing downloaded.

Where lm_eval is not installed here, LM_EVAL_PYTHON may name a Python that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.cli.eval import Harness, harness_command
from tests.serve.served import KEY, served

PYTHON = os.environ.get("LM_EVAL_PYTHON") or (sys.executable if importlib.util.find_spec("lm_eval") else None)
QUESTIONS = [
    {"text": "the cat sat on the", "choices": [" mat", " dog", " cat sat"], "answer": 0},
    {"text": "the dog", "choices": [" ran", " mat and the", " sat"], "answer": 1},
    {"text": "and the mat", "choices": [" sat", " on"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE = """
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def test_the_call():
    command = harness_command(Harness(("arc_easy",), completions=True, limit=3), "secret")
    assert "tokenizer_backend=remote" in command[command.index("--model_args") + 1]
    assert command[-2:] == ["--limit", "3"] and "--apply_chat_template" not in command
    assert "huggingface" in str(harness_command(Harness(("a",), completions=True, tokenizer="x")))
    assert "secret" not in str(harness_command(Harness(("a",)), "secret"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, kind, rest in (("cats", "multiple_choice", CHOICE), ("says", "generate_until", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, file=file) + rest)
    return folder


def results(engine: Any, folder: Path, monkeypatch: Any, **how: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What lm_eval says of a task, and what it noted of each question."""
    monkeypatch.setattr(sys, "executable", PYTHON)
    (name,) = how["tasks"]
    out = folder / f"out-{name}"
    with served(engine, "small") as server:
        args = Harness(url=server.url, include_path=folder, output=out, concurrency=2, **how)
        env = os.environ | {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        command = [*harness_command(args, KEY), "--log_samples"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,), (samples,) = list(out.rglob("results_*.json")), list(out.rglob("samples_*.jsonl"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(found.read_text())["results"][name], sorted(rows, key=lambda row: row["doc_id"])


def likelihood(engine: Any, context: str, choice: str) -> float:
    before, tokens = engine.tokenizer.encode(context), engine.tokenizer.encode(context + choice)
    logits = glm.forward(engine._programs.params, engine.config, np.asarray([tokens], np.int32)).logits[0]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return float(sum(logp[i - 1, tokens[i]] for i in range(len(before), len(tokens))))


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lm_eval: pip install 'glm45-jax[eval]'")
def test_likelihoods(engine, tasks, monkeypatch):
    found, rows = results(engine, tasks, monkeypatch, tasks=("cats",), completions=True)
    right = 0
    for question, row in zip(QUESTIONS, rows, strict=True):
        wanted = [likelihood(engine, question["text"], choice) for choice in question["choices"]]
        np.testing.assert_allclose([float(response[0]) for response in row["filtered_resps"]], wanted, atol=1e-3)
        right += int(np.argmax(wanted)) == question["answer"]
    assert found["acc,none"] == pytest.approx(right / 3)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lm_eval: pip install 'glm45-jax[eval]'")
def test_answers_of_a_chat(engine, tasks, monkeypatch):
    found, rows = results(engine, tasks, monkeypatch, tasks=("says",))
    assert "exact_match,none" in found and len(rows) == len(QUESTIONS)
    assert all(isinstance(row["filtered_resps"][0], str) for row in rows)
