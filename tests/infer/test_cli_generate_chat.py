"""`glm45 generate` and `glm45 chat`: on a small random checkpoint, and with scripted answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import glm45_jax as glm
import glm45_jax.infer
from glm45_jax.cli import loading, main
from glm45_jax.cli.chat import ReplySplitter
from glm45_jax.config import get_preset
from glm45_jax.infer import Generation, generate_detailed
from glm45_jax.text import Tokenizer
from tests.support import small_tokenizer, write_checkpoint

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = small_tokenizer()
    config = get_preset(
        "tiny", num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=0, vocab_size=384,
        eos_token_id=tokenizer.eos_ids,
    )  # fmt: skip
    return write_checkpoint(folder, config, tokenizer)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch) -> None:
    """The setting is the process's: other tests are not to meet it."""
    monkeypatch.setattr(loading, "use_compilation_cache", lambda: None)


def run(*args: Any) -> int:
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_with_quantised_weights(checkpoint, capsys) -> None:
    arguments = ("generate", checkpoint, "the cat", "-n", 6, "--json")
    reports = []
    for extra in ((), ("--quantize", "int8")):
        assert run(*arguments, *extra) == 0
        reports.append(json.loads(capsys.readouterr().out))
    exact, quantised = (report["logprobs"][0] for report in reports)
    assert exact != quantised and abs(exact - quantised) < 0.2
    assert run(*arguments, "--quantize", "keep") == 2
    assert "no matrices of this checkpoint are FP8" in capsys.readouterr().err


def test_generate_prints_what_generate_detailed_finds(checkpoint, capsys) -> None:
    arguments = ("generate", checkpoint, "the cat", "-n", 12, "--temperature", 1.0, "--seed", 4)
    assert run(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert run(*arguments) == 0
    assert capsys.readouterr().out == report["text"] + "\n"
    config, params = glm.load_checkpoint(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)
    (found,) = generate_detailed(
        params, config, [tokenizer.encode("the cat")], 12, tokenizer=tokenizer, temperature=1.0, seed=4
    )
    assert report["tokens"] == found.answer and report["prompt_tokens"] == found.prompt
    assert report["logprobs"] == pytest.approx(found.logprobs, abs=1e-4)
    assert (report["text"], report["finish_reason"], report["seed"]) == (found.text, found.finish_reason, 4)


def test_generate_stops_and_reads_standard_input(checkpoint, capsys, monkeypatch) -> None:
    assert run("generate", checkpoint, "the cat", "-n", 12, "-j") == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    stop = whole[3:5]
    assert run("generate", checkpoint, "-", "-n", 12, "-j", "--stop", stop, "never") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == whole[: whole.index(stop)] and report["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/nowhere", "x"), "/nowhere: no such checkpoint"),
        (("CHECKPOINT", ""), "the prompt is empty"),
        (("CHECKPOINT", "x", "--top-p", "7"), "top_p is 7.0"),
        (("CHECKPOINT", "x", "--max-new-tokens", "-1"), "max_new_tokens is -1"),
        (("CHECKPOINT", "x", "--dtype", "int4"), "int4"),
    ],
)
def test_generate_tells_users_what_is_wrong(arguments, said, checkpoint, capsys) -> None:
    assert run("generate", *(str(checkpoint) if a == "CHECKPOINT" else a for a in arguments)) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_a_checkpoint_without_tokenizer_is_an_error(checkpoint, tmp_path, capsys) -> None:
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert run("generate", tmp_path, "x") == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_programs_are_kept_between_runs(checkpoint, tmp_path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "glm45_jax", "generate", str(checkpoint), "the cat", "-n", "4", "-j"]
    first, second = (subprocess.run(command, env=env, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["tokens"] == json.loads(second.stdout)["tokens"]
    (folder,) = (tmp_path / "glm45_jax").glob("xla-*")
    assert any("advance" in file.name for file in folder.iterdir())
    assert json.loads(second.stdout)["seconds"] < json.loads(first.stdout)["seconds"]


# --- chat ------------------------------------------------------------------------------------------------------------


class Scripted:
    """Takes the place of `stream`: gives these answers one after another and keeps the prompts."""

    def __init__(self, *answers: str):
        self.answers, self.prompts, self.options = list(answers), [], {}

    def __call__(self, params, config, prompt, tokenizer, **options):
        self.prompts.append(tokenizer.decode(prompt))
        self.options = options
        text = self.answers.pop(0)
        pieces = iter([text[i : i + 3] for i in range(0, len(text), 3)])

        class Stream:
            result = Generation(prompt, [], [], "stop", text)

            def __iter__(self):
                return pieces

            def __next__(self):
                return next(pieces)

        return Stream()


@pytest.fixture
def chat(checkpoint, monkeypatch, capsys):
    """Runs a chat over the given lines; returns what it shows, and the scripted model's prompts."""

    def go(
        lines: list[str], *answers: str, args: tuple[Any, ...] = (), path: Path = checkpoint
    ) -> tuple[str, Scripted]:
        scripted = Scripted(*answers)
        monkeypatch.setattr(glm45_jax.infer, "stream", scripted)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert run("chat", path, *args) == 0
        return capsys.readouterr().out, scripted

    return go


def test_a_conversation(chat) -> None:
    out, model = chat(["Hi", "And?"], "\n<think>They greet.</think>\nHello!", "\n<think>So.</think>\nMore.")
    assert out == "[thinking]\nThey greet.\n\n[answer]\nHello!\n[thinking]\nSo.\n\n[answer]\nMore.\n"
    assert model.prompts == [
        "[gMASK]<sop><|user|>\nHi<|assistant|>",
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello!<|user|>\nAnd?<|assistant|>",
    ]


def test_thinking_is_switched(chat) -> None:
    lines, answers = ["a", "/think", "b", "/nothink", "c"], ("\nA", "\n<think>\nt\n</think>\nB", "\nC")
    out, model = chat(lines, *answers, args=("--no-thinking",))
    assert out == "A\nthinking on\n[thinking]\nt\n\n[answer]\nB\nthinking off\nC\n"
    assert [p.endswith("/nothink<|assistant|>\n<think></think>") for p in model.prompts] == [True, False, True]


def test_the_prompt_of_glm47_opens_the_thinking(checkpoint, chat, tmp_path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(glm.text.builtin_template("glm-4.7"))
    out, model = chat(["a", "/nothink", "b"], "reasons</think>answer", "B", path=tmp_path)
    assert out == "[thinking]\nreasons\n\n[answer]\nanswer\nthinking off\nB\n"
    assert model.prompts == [
        "[gMASK]<sop><|user|>a<|assistant|><think>",
        "[gMASK]<sop><|user|>a<|assistant|></think>answer<|user|>b<|assistant|></think>",
    ]


def test_reset_system_and_unknown_commands(chat) -> None:
    out, model = chat(["a", "/reset", "/what", "b", "/exit", "c"], "\nA", "\nB", args=("--system", "Be brief."))
    assert "forgotten" in out and "no command /what" in out
    assert len(model.prompts) == 2
    assert all(prompt.count("<|user|>") == 1 and "Be brief." in prompt for prompt in model.prompts)


def test_control_tokens_that_a_user_types_are_text(chat, checkpoint) -> None:
    _, model = chat(["x<|assistant|>y"], "\nA")
    tokenizer = Tokenizer.load(checkpoint)
    assert len(tokenizer.encode(model.prompts[0])) < len(tokenizer.encode(model.prompts[0], allow_special=False))
    messages = [{"role": "user", "content": "x<|assistant|>y"}]
    assert model.prompts[0] == tokenizer.decode(tokenizer.encode_chat(messages, sanitize=True))


def test_a_tool_call_takes_the_next_line_as_its_result(chat, tmp_path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    call = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
    answers = (f"\n<think>Ask.</think>\n{call}", "\nIt is sunny.")
    out, model = chat(["Weather?", "sunny"], *answers, args=("--tools", tmp_path / "tools.json"))
    assert "[tool call] weather(city='Paris')" in out and out.endswith("It is sunny.\n")
    assert '"name": "weather"' in model.prompts[0]
    # what the model wrote stands in its next prompt as it was
    assert f"<think>Ask.</think>\n{call}<|observation|>\n<tool_response>\nsunny\n</tool_response>" in model.prompts[1]


def test_the_model_cannot_steer_the_terminal(chat) -> None:
    out, _ = chat(["a"], "\n\x1b]0;title\x07x\ty\n")
    assert out == "\ufffd]0;title\ufffdx\ty\n"


def test_options_reach_the_model(chat, checkpoint) -> None:
    _, model = chat(["a"], "A", args=("-t", 0, "-n", 7, "--seed", 3, "--top-p", 0.5))
    assert model.options | {"stop_ids": None} == {
        "max_new_tokens": 7, "temperature": 0.0, "top_p": 0.5, "seed": 3, "stop_ids": None,
    }  # fmt: skip
    assert set(Tokenizer.load(checkpoint).eos_ids) <= set(model.options["stop_ids"])


@pytest.mark.slow
def test_a_real_conversation_runs(checkpoint, monkeypatch, capsys) -> None:
    """The random model's words mean nothing; too long a message does not end the conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n" + "mat " * 1000 + "\nthe dog\n"))
    assert run("chat", checkpoint, "-n", 8, "--seed", 1) == 0
    out = capsys.readouterr().out
    assert "/reset forgets the conversation" in out and "cut here" in out.rsplit("forgets", 1)[1]


@pytest.mark.parametrize(("text", "said"), [(None, "cannot be read"), ("{", "not JSON"), ("{}", "expected a list")])
def test_bad_tool_files_are_named(text, said, checkpoint, tmp_path, capsys) -> None:
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    assert run("chat", checkpoint, "--tools", file) == 2
    err = capsys.readouterr().err
    assert str(file) in err and said in err


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "calls"),
    [
        ("\n<think>a b</think>\nc d", "a b", "c d", []),
        ("no tags < here \n <thin \n", "", "no tags < here \n <thin", []),
        ("<think></think>\n\nx", "", "x", []),
        ("<think>cut", "cut", "", []),
        ("<think>a<tool_call>f\n</tool_call>", "a", "", [("f", {})]),
        (
            "b<tool_call>f<arg_key>k</arg_key><arg_value>\n v </arg_value></tool_call><tool_call>g\n</tool_call>",
            "",
            "b",
            [("f", {"k": "\n v "}), ("g", {})],
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_replies_are_split_the_same_in_any_pieces(text, thinking, answer, calls, size) -> None:
    splitter = ReplySplitter()
    shown = [part for i in range(0, len(text), size) for part in splitter.push(text[i : i + size])]
    shown += splitter.push("", last=True)
    assert (splitter.text("thinking"), splitter.text("answer")) == (thinking, answer)
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in splitter.calls()] == calls
    for kind in ("thinking", "answer"):
        assert "".join(text for part, text in shown if part == kind) == splitter.text(kind)
