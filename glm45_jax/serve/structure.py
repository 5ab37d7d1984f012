"""What a request says of its answer's form: JSON, expressions, tool calls that must come, thoughts that must end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from glm45_jax.errors import UserError
from glm45_jax.infer.call_grammar import calls_source
from glm45_jax.infer.constraint import Place
from glm45_jax.infer.grammar import choice_source, grammar_source, json_source, regex_source
from glm45_jax.serve.errors import ApiError, refused
from glm45_jax.serve.fields import Fields, kind_of, read_json

if TYPE_CHECKING:
    from glm45_jax.serve.asked import Model

_LEGACY = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_BUDGETS = ("thinking_token_budget", "thinking_budget")


@dataclasses.dataclass(frozen=True)
class Structure:
    """A grammar's source for the content of an answer, and the field that asked for it."""

    source: str
    field: str


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Whether tools are to be called.

    Attributes:
      kind: auto, none, or required.
      names: of the tools that may be called, where not all may.
    """

    kind: str
    names: tuple[str, ...] = ()

    @property
    def must_call(self) -> bool:
        return self.kind == "required"


def read_structure(fields: Fields) -> Structure | None:
    """The form of the content, by any of the fields that may say it; None where it is free.

    `response_format` is OpenAI's; `structured_outputs` and `guided_json` and the like are vLLM's.

    Raises:
      ApiError: more than one says it, or one says nonsense.
    """
    found = [_response_format(fields)]
    inside = fields.object("structured_outputs")
    for name in ("json", "regex", "choice", "grammar"):
        found.append(_form(inside, name, name))
    if inside.boolean("json_object"):
        found.append(Structure(json_source(), inside.path("json_object")))
    if inside.get("structural_tag") is not None:
        raise inside.wrong("structural_tag", "not supported", "unsupported")
    found += [_form(fields, name, kind) for name, kind in _LEGACY.items()]
    forms = [form for form in found if form is not None]
    if len(forms) > 1:
        raise refused(f"{forms[1].field}: {forms[0].field} asks for another form already", forms[1].field)
    return forms[0] if forms else None


def _response_format(fields: Fields) -> Structure | None:
    form = fields.object("response_format")
    kind = form.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure(json_source(), "response_format")
    if kind != "json_schema":
        raise fields.wrong("response_format", f"{kind[:40]!r} is not text, json_object or json_schema", "unsupported")
    inside = form.object("json_schema")
    inside.text("name")
    inside.text("description")
    schema, strict = inside.get("schema"), inside.boolean("strict")
    if not isinstance(schema, Mapping):
        raise inside.wrong("schema", f"expected an object, not {kind_of(schema)}")
    return Structure(_made(lambda: json_source(schema, strict=strict), "response_format"), "response_format")


def _form(fields: Fields, name: str, kind: str) -> Structure | None:
    value = fields.get(name)
    if value is None:
        return None
    makers: dict[str, tuple[type | tuple[type, ...], Callable[[], str]]] = {
        "json": ((dict, str), lambda: json_source(_schema(fields, name, value))),
        "regex": (str, lambda: regex_source(value)),
        "choice": (list, lambda: choice_source(value)),
        "grammar": (str, lambda: grammar_source(value)),
    }
    kinds, make = makers[kind]
    if not isinstance(value, kinds):
        raise fields.wrong(name, f"it must not be {kind_of(value)}")
    return Structure(_made(make, fields.path(name)), fields.path(name))


def _schema(fields: Fields, name: str, value: Any) -> Any:
    """A schema, which vLLM takes as a text of JSON too."""
    try:
        return read_json(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else value
    except ApiError as error:
        raise fields.wrong(name, error.message) from error


def _made(make: Callable[[], Any], field: str) -> Any:
    try:
        return make()
    except UserError as error:
        raise refused(f"{field}: {error}", field) from error


# --- tools -----------------------------------------------------------------------------------------------------------


def read_tool_choice(fields: Fields, tools: list[dict[str, Any]] | None) -> ToolChoice:
    """`auto`, `none`, `required`, or an object that names a function, or those that are allowed. Raises `ApiError`."""
    choice = fields.get("tool_choice", "auto")
    if choice in ("auto", "none"):
        return ToolChoice(choice)
    if choice == "required":
        found = ToolChoice(choice)
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        own = fields.object("tool_choice")
        inside = own.object("allowed_tools") if "allowed_tools" in choice else own  # flat in /v1/responses
        mode, listed = inside.text("mode"), inside.get("tools")
        if mode not in ("auto", "required"):
            raise inside.wrong("mode", "expected auto or required")
        if not isinstance(listed, list) or not listed:
            raise inside.wrong("tools", "expected a list of tools, each by its name")
        found = ToolChoice(mode, tuple(_named(fields, tool) for tool in listed))
    else:
        found = ToolChoice("required", (_named(fields, choice),))
    known = [_function(tool)["name"] for tool in tools or []]
    for name in found.names:
        if name not in known:
            raise fields.wrong("tool_choice", f"there is no tool {name[:80]!r}")
    if not tools:
        raise fields.wrong("tool_choice", "there are no tools to call")
    return found


def _named(fields: Fields, choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise fields.wrong("tool_choice", "expected auto, none, required, or an object that names a function")
    return name


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return tool.get("function", tool)


def compiled(
    model: Model, wanted: Structure | None, tools: list[dict[str, Any]] | None, choice: ToolChoice, parallel: bool
) -> dict[str, Any]:
    """The grammar for `Engine.submit`, where the request needs one. Raises `ApiError`."""
    source, field = (wanted.source, wanted.field) if wanted else (None, "tools")
    strict = any(_function(tool).get("strict") is True for tool in tools or [])
    if tools and choice.kind != "none" and (choice.must_call or choice.names or strict or wanted):
        tools = [tool for tool in tools if not choice.names or _function(tool)["name"] in choice.names]
        how: dict[str, Any] = {"required": choice.must_call, "parallel": parallel, "content": source}
        newlines = calls_have_newlines(model)
        source = _made(lambda: calls_source(tools, newlines=newlines, **how), "tools")
        field = "tools" if choice.must_call or not wanted else f"tools or {field}"
    if source is None:
        return {}
    return {"grammar": _made(lambda: model.engine.grammars.compile(source), field)}


def calls_have_newlines(model: Model) -> bool:
    """Whether the model's calls have a line for each tag, as GLM-4.5's have and 4.7's have not."""
    template = model.tokenizer.chat_template
    return template == "glm-4.5" or "</arg_key>\\n" in template or "</arg_key>\n" in template


# --- thoughts --------------------------------------------------------------------------------------------------------


def read_budget(fields: Fields, thinking: Fields, own: Fields) -> int | None:
    """Tokens that a thought may have, by any of the fields that may say it; the smallest. -1 is none."""
    given = [fields.integer(name, None, -1, 2**31 - 1) for name in _BUDGETS]
    given += [own.integer(name, None, -1, 2**31 - 1) for name in _BUDGETS]
    given.append(thinking.integer("budget_tokens", None, -1, 2**31 - 1))
    return min((budget for budget in given if budget is not None and budget >= 0), default=None)


def thought_of(model: Model, prompt: list[int], enabled: bool) -> Place:
    """Where an answer to a prompt of the chat template begins."""
    end = model.tokenizer.decode(prompt[-4:]).rstrip()
    if end.endswith("<think>"):
        return "inside"
    if end.endswith("</think>"):
        return "gap"
    template = model.tokenizer.chat_template
    thinks = template == "glm-4.5" or "<think>" in template
    return "before" if enabled and thinks and "<think>" in model.tokenizer.special_ids else "after"
