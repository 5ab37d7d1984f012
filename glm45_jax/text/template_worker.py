"""Jinja as chat templates expect it, and the loop of a worker process that renders templates nobody vouches for.

`make_environment` has what transformers gives a chat template: an immutable sandbox with `trim_blocks` and
`lstrip_blocks`, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls, and a
`{% generation %}` tag without effect.

Run as a file this module is the worker of `sandbox.py`. It then imports jinja2 and the standard library alone, so that
it starts in a tenth of a second, and bounds itself: memory, file writes, and its life should the parent be gone.

Request:  8 bytes of length, JSON {"template", "variables"}.
Answer:   1 byte of status, 8 bytes of length, UTF-8 text: the rendered text or what went wrong.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5.0
MAX_OUTPUT_BYTES = 16 * 2**20
MAX_MEMORY_BYTES = 512 * 2**20

READY, TEXT, ERROR = b"R", b"T", b"E"
LENGTH = struct.Struct(">Q")
# The time a worker whose parent was killed may still run, beyond the limit that the parent keeps.
ORPHAN_SECONDS = MAX_SECONDS + 5.0


class _GenerationTag(ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's words, for training masks; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment in which a chat template is compiled (transformers, `chat_template_utils`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return make_environment().from_string(template)


def _render(template: str, variables: dict[str, Any]) -> bytes:
    pieces, size = [], 0
    for piece in _compile(template).generate(variables):
        data = piece.encode("utf-8", "surrogatepass")
        pieces.append(data)
        size += len(data)
        if size > MAX_OUTPUT_BYTES:
            raise OverflowError(f"it writes more than {MAX_OUTPUT_BYTES >> 20} MiB")
    return b"".join(pieces)


def _answer(request: bytes) -> tuple[bytes, bytes]:
    try:
        return TEXT, _render(**json.loads(request))
    except MemoryError:
        return ERROR, f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory".encode()
    except jinja2.TemplateSyntaxError as error:
        return ERROR, f"line {error.lineno}: {error.message}"[:2000].encode("utf-8", "replace")
    except Exception as error:  # whatever a template does wrong goes back to its user as a message
        return ERROR, f"{type(error).__name__}: {error}"[:2000].encode("utf-8", "replace")


def _bound_this_process() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits, some systems refuse them
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answers requests until the parent closes the pipe."""
    _bound_this_process()
    target.write(READY)
    target.flush()
    while header := source.read(LENGTH.size):
        request = source.read(LENGTH.unpack(header)[0])
        # The default action of SIGALRM ends the process, even inside a long operation of C code.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
        status, body = _answer(request)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        target.write(status + LENGTH.pack(len(body)) + body)
        target.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
