"""The `glm45` command: help for everything, JSON for machines, exit codes, errors that name the cause."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from glm45_jax import __version__
from glm45_jax.cli import COMMANDS, main
from glm45_jax.config import get_preset


def run(*args: str) -> int:
    """The exit code of a command, whichever way it ends."""
    try:
        return main(list(args))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_usage_lists_every_command(args: tuple[str, ...], capsys) -> None:
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys) -> None:
    assert run(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"glm45 {name}" in out and len(out.splitlines()) > 5


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_unknown_command_suggests_a_near_one(capsys) -> None:
    assert run("convrt") == 2
    assert "did you mean 'convert'" in capsys.readouterr().err


def test_unknown_option_is_an_error(capsys) -> None:
    assert run("info", "tiny", "--colour") == 2
    assert "--colour" in "".join(capsys.readouterr())


def test_info_prints_the_figures(capsys) -> None:
    assert run("info", "glm-4.5-air") == 0
    out = capsys.readouterr().out
    assert "110.469 B" in out and "188,416" in out


def test_info_json(capsys) -> None:
    assert run("info", "glm-4.5", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"] == get_preset("glm-4.5").parameter_counts()
    assert info["kv_cache_bytes_per_token"] == 376_832
    assert info["layers"] == {"dense": 3, "moe": 89, "mtp": 1}


def test_info_reads_a_config_file(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(get_preset("tiny").to_hf("v5")))
    for path in (tmp_path, tmp_path / "config.json"):
        assert run("info", str(path), "--json") == 0
        assert json.loads(capsys.readouterr().out)["parameters"] == get_preset("tiny").parameter_counts()


@pytest.mark.parametrize("what", ["glm-4.5-airr", "/nowhere/at/all"])
def test_info_of_nothing_is_the_users_error(what: str, capsys) -> None:
    assert run("info", what) == 2
    captured = capsys.readouterr()
    assert what in captured.err and captured.out == ""


def test_an_error_is_one_message_without_a_traceback(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = subprocess.run(
        [sys.executable, "-m", "glm45_jax", "info", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "llama" in done.stderr and "Traceback" not in done.stderr


def test_help_answers_without_loading_jax() -> None:
    code = "import sys; from glm45_jax.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
