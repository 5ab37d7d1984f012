"""What a request asks for: its body read, checked and made ready for the engine; none of it on the event loop."""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Any

from glm45_jax.errors import UserError
from glm45_jax.infer import Engine
from glm45_jax.infer.settings import MOST_BIASES
from glm45_jax.infer.steps import MOST_LIKELIEST
from glm45_jax.serve.errors import refused
from glm45_jax.serve.fields import Fields, kind_of, read_json
from glm45_jax.serve.options import MAX_PROMPTS, MAX_STOP_LENGTH, MAX_STOPS, ServeOptions
from glm45_jax.serve.structure import ToolChoice, compiled, read_budget, read_structure, read_tool_choice, thought_of
from glm45_jax.serve.tools import check_tools
from glm45_jax.text import Tokenizer

# Fields that only say who asks, or what the client does with the answer.
_MEANT_FOR_OTHERS = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclasses.dataclass(frozen=True)
class Model:
    """The one model that is served."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    options: ServeOptions

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.engine.config.eos_token_id or self.tokenizer.eos_ids)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for answers.

    Attributes:
      prompts: token ids; each has `n` answers.
      submit: what `Engine.submit` takes besides prompt and seed.
      seed: of the first answer; each further one takes the next.
      logprobs: whether those of the chosen tokens are wanted.
      top_logprobs: of so many of the likeliest tokens in each place they are wanted too.
      ignored: fields that are not known here.
    """

    prompts: list[list[int]]
    n: int
    seed: int
    submit: dict[str, Any]
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    ignored: list[str]

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def begun(self) -> int:
        """Those that the engine is to give."""
        return self.answers


@dataclasses.dataclass(frozen=True)
class ChatAsked(Asked):
    """A request for a turn of a conversation.

    Attributes:
      tools: function schemas; None without any.
      calls: whether the model may call them.
      parallel: whether more than once.
      thinking: whether the prompt ends inside a thought.
    """

    tools: list[dict[str, Any]] | None
    calls: bool
    parallel: bool
    thinking: bool


@dataclasses.dataclass(frozen=True)
class CompletionAsked(Asked):
    """A request to continue texts.

    Attributes:
      echo: the answer begins with the prompt, and its log-probabilities with the prompt's.
      goes_on: False: with the prompt alone.
    """

    echo: bool
    goes_on: bool

    @property
    def begun(self) -> int:
        return self.answers if self.goes_on else 0


def read_chat(model: Model, body: bytes) -> ChatAsked:
    """A body of POST /v1/chat/completions. Raises `ApiError`."""
    return chat_of(model, Fields(read_json(body)))


def chat_of(model: Model, fields: Fields) -> ChatAsked:
    """What the fields of a chat request ask for, wherever they come from. Raises `ApiError`."""
    talk = _conversation(model, fields)
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, 0, MOST_LIKELIEST)
    if top and not wanted:
        raise fields.wrong("top_logprobs", "logprobs must be true with it")
    parallel = fields.boolean("parallel_tool_calls", True)
    submit = compiled(model, read_structure(fields), talk.tools, talk.choice, parallel)
    thought = thought_of(model, talk.prompt, talk.thinks)
    if submit or talk.budget is not None:
        submit |= {"thought": thought, "thought_budget": talk.budget}
    most = fields.integer("max_tokens", None, 1, model.options.max_tokens)
    most = fields.integer("max_completion_tokens", most, 1, model.options.max_tokens)
    common = _common(model, fields, [talk.prompt], most or model.engine.room, top, submit)
    calls, inside = talk.choice.kind != "none", thought == "inside"
    return ChatAsked(**common, logprobs=wanted, tools=talk.tools, calls=calls, parallel=parallel, thinking=inside)


def read_completion(model: Model, body: bytes) -> CompletionAsked:
    """A body of POST /v1/completions. Raises `ApiError`."""
    fields = Fields(read_json(body))
    prompts = _prompts(model, fields)
    for name, neutral in (("suffix", ""), ("best_of", fields.get("n", 1))):
        if fields.get(name, neutral) != neutral:
            raise fields.wrong(name, "not supported", "unsupported")
    wanted, top = fields.get("logprobs") is not None, fields.integer("logprobs", 0, 0, MOST_LIKELIEST)
    submit = compiled(model, read_structure(fields), None, ToolChoice("none"), True)
    echo = fields.boolean("echo")
    most = fields.integer("max_tokens", 16, 0 if echo else 1, model.options.max_tokens)
    common = _common(model, fields, prompts, max(most, 1), top, submit)
    return CompletionAsked(**common, logprobs=wanted, echo=echo, goes_on=most > 0)


def read_messages(model: Model, fields: Fields) -> list[int]:
    """The tokens of a conversation, as a chat request renders it."""
    return _conversation(model, fields).prompt


# --- the conversation ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Conversation:
    prompt: list[int]
    tools: list[dict[str, Any]] | None
    choice: ToolChoice
    thinks: bool
    budget: int | None


def _conversation(model: Model, fields: Fields) -> _Conversation:
    """Token ids, the tools that the prompt names, and how the model is to think."""
    messages = fields.list("messages")
    if not messages:
        raise fields.wrong("messages", "at least one message is needed")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    tools = fields.list("tools") or None
    if tools:
        check_tools(tools)
    choice = read_tool_choice(fields, tools)
    variables, budget = _template_variables(fields)
    try:
        shown = None if choice.kind == "none" else tools
        ids = model.tokenizer.encode_chat(messages, shown, sanitize=True, **variables)
    except UserError as error:
        raise refused(str(error), "messages") from error
    return _Conversation(ids, tools, choice, variables["enable_thinking"], budget)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refused(f"{where}: expected an object, not {kind_of(message)}", where)
    kept = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    message = {name: message[name] for name in kept if name in message}
    if message.get("role") == "developer":
        message["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"{where}.content[{i}]"
                raise refused(f"{what}: only parts of the form {{'type': 'text', 'text': …}} can be read", what)
    elif content is not None and not isinstance(content, str):
        what = f"{where}.content"
        raise refused(f"{what}: expected a string, a list of parts or null, not {kind_of(content)}", what)
    return message


def _template_variables(fields: Fields) -> tuple[dict[str, Any], int | None]:
    """What the client may say to the chat template, a list of known names, each a boolean; and the thought's budget."""
    effort = fields.text("reasoning_effort", "medium") != "none"
    thinking, own = fields.object("thinking"), fields.object("chat_template_kwargs")
    switch = thinking.text("type", "enabled" if effort else "disabled")
    if switch not in ("enabled", "disabled"):
        raise fields.wrong("thinking", "its type is enabled or disabled")
    variables = {"enable_thinking": own.boolean("enable_thinking", switch == "enabled")}
    if own.get("clear_thinking") is not None:
        variables["clear_thinking"] = own.boolean("clear_thinking")
    return variables, read_budget(fields, thinking, own)


# --- prompts of plain completions ------------------------------------------------------------------------------------


def _prompts(model: Model, fields: Fields) -> list[list[int]]:
    """A text, a list of token ids, or a list of either."""
    given = fields.get("prompt")
    given = given if isinstance(given, list) and not _is_tokens(given) else [given]
    if not given or len(given) > MAX_PROMPTS:
        raise fields.wrong("prompt", f"it has {len(given)} prompts; expected 1 to {MAX_PROMPTS}")
    try:
        return [model.tokenizer.encode(p) if isinstance(p, str) else _tokens(fields, p) for p in given]
    except UserError as error:
        raise fields.wrong("prompt", str(error)) from error


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _tokens(fields: Fields, prompt: Any) -> list[int]:
    if not _is_tokens(prompt):
        raise fields.wrong("prompt", "expected a text, a list of token ids, or a list of either")
    if not all(0 <= token < 2**31 for token in prompt):
        raise fields.wrong("prompt", "a token id is out of range")
    return prompt


# --- what both have --------------------------------------------------------------------------------------------------


def _common(
    model: Model, fields: Fields, prompts: list[list[int]], max_tokens: int, top: int, submit: dict[str, Any]
) -> dict[str, Any]:
    """The fields of `Asked` that both kinds of requests have. Reads the last fields: the rest is unknown."""
    n = fields.integer("n", 1, 1, model.options.max_n)
    if len(prompts) * n > max(model.options.max_n, MAX_PROMPTS):
        raise fields.wrong("n", f"{len(prompts)} prompts with {n} answers each are too many")
    for prompt in prompts:
        if not 0 < len(prompt) < model.engine.room:
            what = f"the prompt has {len(prompt)} tokens; there is room for {model.engine.room}, with its answer"
            raise refused(what, "messages" if "messages" in fields.read else "prompt", "context_length_exceeded")
    sampling = _sampling(fields, model.engine.config.vocab_size)
    stop_ids = () if fields.boolean("ignore_eos") else model.stop_ids
    seed = fields.integer("seed", None, 0, 2**32 - 1)
    return {
        "prompts": prompts,
        "n": n,
        "seed": secrets.randbits(32) if seed is None else seed,
        "submit": submit
        | {"max_new_tokens": max_tokens, "stop_ids": stop_ids, "stop_strings": _stop(fields), **sampling}
        | ({"top_logprobs": top} if top else {}),
        "top_logprobs": top,
        "stream": fields.boolean("stream"),
        "include_usage": fields.object("stream_options").boolean("include_usage"),
        "ignored": _ignored(model, fields),
    }


def _ignored(model: Model, fields: Fields) -> list[str]:
    """To be called when all fields have been read."""
    for name in _MEANT_FOR_OTHERS:
        fields.get(name)
    return ["model"] * (fields.text("model", model.name) != model.name) + fields.unknown


def _sampling(fields: Fields, vocab_size: int) -> dict[str, Any]:
    return {
        "temperature": fields.number("temperature", 1.0, 0, 2),
        "top_p": fields.number("top_p", 1.0, 1e-9, 1),
        "top_k": max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),  # -1 is how some clients say: all
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 1e-3, 10),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "logit_bias": _logit_bias(fields, vocab_size),
    }


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float] | None:
    bias = fields.get("logit_bias", {})
    if not isinstance(bias, dict):
        raise fields.wrong("logit_bias", f"expected an object, not {kind_of(bias)}")
    if len(bias) > MOST_BIASES:
        raise fields.wrong("logit_bias", f"it has {len(bias)} entries; expected {MOST_BIASES} at most")
    found: dict[int, float] = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise fields.wrong("logit_bias", f"its keys are token ids, from 0 to {vocab_size - 1}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise fields.wrong("logit_bias", "its values are numbers from -100 to 100")
        found[int(token)] = -math.inf if value == -100 else float(value)
    return found or None


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"expected a string or a list of {MAX_STOPS} at most")
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stops):
        raise fields.wrong("stop", f"each must be a string of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)
