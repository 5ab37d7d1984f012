"""Messages to the text a model reads: `render_chat`.

The two formats of the family are jinja templates of this package (`templates/`): `glm-4.5` (GLM-4.5, Air and 4.6) and
`glm-4.7`. They are saved with tokenizers, so other libraries render the same text. A template that came with a
checkpoint is rendered as given, in a sandbox of its own process (`sandbox.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from glm45_jax.errors import UserError
from glm45_jax.text.messages import check_is_list, normalise_messages
from glm45_jax.text.sandbox import render_sandboxed
from glm45_jax.text.template_worker import make_environment

TEMPLATES = ("glm-4.5", "glm-4.7")

_FOLDER = Path(__file__).parent / "templates"
# glm-4.5, glm45, GLM-4.6-FP8, zai-org/GLM-4.5-Air-Base ... but not other models: glm-4.5v, glm-4.7-flash
_NAME = re.compile(r"(?:.*/)?glm-?4\.?([567])(?:-(?:air|base|fp8))*")


def template_name(name: str) -> str:
    """`glm-4.5` or `glm-4.7` for a name of the family, such as `glm-4.6`, `glm47` or `zai-org/GLM-4.5-Air`."""
    found = _NAME.fullmatch(name.strip().lower())
    if not found:
        raise UserError(
            f"no chat template {name!r}; expected {' or '.join(TEMPLATES)}, the name of a model of the family, "
            "or the text of a jinja template"
        )
    return "glm-4.7" if found[1] == "7" else "glm-4.5"


@functools.cache
def builtin_template(name: str) -> str:
    """The jinja text of a built-in template, by any name that `template_name` takes."""
    return (_FOLDER / f"{template_name(name)}.jinja").read_text("utf-8")


def is_template_text(template: str) -> bool:
    """Whether `template` is the text of a template rather than a name."""
    return "{%" in template or "{{" in template


def known_template(text: str) -> str:
    """The name of the built-in template with this text, or `text` itself: what `render_chat` takes as `template`."""
    return next((name for name in TEMPLATES if builtin_template(name).rstrip() == text.rstrip()), text)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str = "glm-4.5",
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = True,
    **kwargs: Any,
) -> str:
    """The text of a conversation in a model's own format, equal to what its published template renders.

    The differences, where the published templates are plainly broken, are listed in docs/text.md. Control tokens in
    the messages are not escaped: `Tokenizer.encode_chat` can keep them from becoming control ids.

    Args:
      messages: `{"role": "system" | "user" | "assistant" | "tool", "content": ..., ...}` as in the OpenAI API, with
        `reasoning_content` and `tool_calls` for the assistant. Content is a string, a list of parts (the text ones
        are read) or null; tool-call arguments are an object or a JSON string of one.
      tools: function schemas, with OpenAI's `{"type": "function", ...}` wrapper or without; written as they are.
      template: a name (`glm-4.5`, `glm-4.7`, or a model's) or the jinja text of a checkpoint's own template.
      add_generation_prompt: end with what opens the assistant's next turn.
      enable_thinking: False (or None) asks for an answer without thinking.
      **kwargs: further variables of the template; `clear_thinking=False` keeps the reasoning of all turns in GLM-4.7
        (the GLM-4.5 format has no such option and ignores it).

    Raises:
      UserError: an unknown template or role, a malformed message (named by its index), or a template that fails or
        takes more than 5 s, 512 MiB of memory or 16 MiB of output.
    """
    if tools is not None:
        check_is_list(tools, "tools")
    variables = dict(kwargs, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking)
    if is_template_text(template) and (template := known_template(template)) not in TEMPLATES:
        return _render_foreign(template, messages, variables)
    name = template_name(template)
    messages = normalise_messages(messages)
    try:
        return _compiled(name).render(variables, messages=messages)
    except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{_find_unwritable(messages, tools)}: not plain JSON: {error}") from error


def _render_foreign(template: str, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]) -> str:
    # A template in GLM's call format walks over the arguments, so it needs them parsed and fails as the published
    # ones do on null; what any other template makes of such messages is its own affair.
    if "<arg_key>" in template:
        messages = normalise_messages(messages)
    else:
        check_is_list(messages, "messages")
    return render_sandboxed(template, {"documents": None, **variables, "messages": [dict(m) for m in messages]})


@functools.cache
def _compiled(name: str) -> jinja2.Template:
    return make_environment().from_string(builtin_template(name))


def _find_unwritable(messages: Sequence[Any], tools: Sequence[Any] | None) -> str:
    """Names the message or tool that rendering stumbled over."""
    for where, items in (("messages", messages), ("tools", tools or ())):
        for index, item in enumerate(items):
            try:
                json.dumps(item)
            except (TypeError, ValueError, RecursionError):
                return f"{where}[{index}]"
    return "messages"
