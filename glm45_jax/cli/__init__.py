"""The `glm45` command: one module per sub-command, imported only when called, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from pathlib import Path

from glm45_jax.errors import UserError

# command -> (module of this package whose `main` tyro calls, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("info", "sizes of a model: parameters, active parameters, cache bytes per token"),
    "convert": ("convert", "Hugging Face checkpoints in and out"),
    "generate": ("generate", "continue a prompt"),
    "chat": ("chat", "talk with a model in the terminal"),
    "serve": ("serve", "answer over HTTP, as OpenAI's clients ask"),
    "train": ("train", "train a model from a YAML file"),
    "tokenize": ("tokenize", "text to ArrayRecord files of tokens, once for many runs"),
    "bench": ("bench", "time the kernels on the device at hand, or a server under load"),
    "eval": ("eval", "perplexity of a text, questions with known answers, lm-evaluation-harness"),
    "plan": ("plan", "steps and kernels compiled for chips that are not there: memory, FLOPs, time"),
    "quickstart": ("quickstart", "train, convert and question a small model, in minutes on a laptop"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: glm45 COMMAND [OPTIONS]\n\nGLM-4.5 in JAX.\n\ncommands:\n{rows}\n\n"
        "`glm45 COMMAND --help` explains one.\nexamples:\n  glm45 info glm-4.5-air\n"
        "  glm45 convert from-hf ./GLM-4.5-Air ./air\n  glm45 chat ./air"
    )


def _hush_cuda() -> None:
    """The `aot` extra's CUDA plugin is there to compile: without a GPU, that it cannot run anything is no news."""
    if not Path("/dev/nvidiactl").exists():
        logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: "xla_cuda" not in record.getMessage())


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0 done, 2 for an error of the user's input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, rest = args[0], args[1:]
    if name == "--version":
        from glm45_jax import __version__

        print(f"glm45-jax {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        print(
            f"glm45: no command {name!r}" + (f"; did you mean {close[0]!r}?" if close else "") + "\n", file=sys.stderr
        )
        print(_usage(), file=sys.stderr)
        return 2
    _hush_cuda()
    command = importlib.import_module(f"glm45_jax.cli.{COMMANDS[name][0]}")
    try:
        return command.main(rest) or 0
    except UserError as e:
        print(f"glm45 {name}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
