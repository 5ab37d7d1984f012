"""Templates that nobody vouches for: what works in them, and how the hostile ones end."""

import os
import threading
import time

import pytest

from glm45_jax.errors import UserError
from glm45_jax.text import render_chat, sandbox, template_worker

# Rendering may take 5 s; the rest is for starting Python on a busy machine.
BOUND_SECONDS = 5 + 15
Q = [{"role": "user", "content": "q"}]


def render(template, messages=Q, **kwargs):
    return render_chat(messages, template=template, **kwargs)


def test_what_transformers_gives_templates():
    assert render("{% for m in messages %}{{ m.role ~ m['content'] }}{% endfor %}") == "userq"
    assert render("{{ tools | tojson }}", tools=[{"é": "<b>"}]) == '[{"é": "<b>"}]'
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, ensure_ascii=True, sort_keys=True) }}") == (
        '{\n "a": 1,\n "b": "\\u00e9"\n}'
    )
    assert render("{{ [1, 2] | tojson(separators=(',', ':')) }}") == "[1,2]"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}a{{ messages[0].content }}{% endgeneration %}b") == "aqb"
    assert render("{{ strftime_now('%Y') | int > 2000 }}") == "True"
    assert render("{% if true %}\n    {% set x = 1 %}\nx\n{% endif %}\n{# #}") == "x\n"
    assert render("{{ add_generation_prompt }} {{ enable_thinking }} {{ documents }} {{ mine }}", mine=3) == (
        "True True None 3"
    )


def test_messages_arrive_as_given_unless_the_template_writes_glm_calls():
    messages = [{"role": "odd", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    text = "{{ messages | tojson }}"
    assert (
        render(text, messages) == '[{"role": "odd", "content": null, "tool_calls": [{"name": "f", "arguments": "{}"}]}]'
    )
    messages[0]["role"] = "assistant"
    assert render("{# <arg_key> #}" + text, messages) == (
        '[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]'
    )


def test_any_text_passes_through_the_pipe():
    content = "\ud800 \x00 \ufdd0 é 🎉 " + "x" * 10**6
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


HOSTILE = {
    "memory by multiplication": ("{{ 'a' * 10 ** 10 }}", "memory"),
    "memory by doubling": (
        "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
        "memory",
    ),
    "memory by lists": ("{{ ([0] * 10 ** 9) | length }}", "memory"),
    "memory by centre": ("{{ 'a' | center(10 ** 10) }}", "memory"),
    "memory by a format width": ("{{ '%9999999999d' % 1 }}", "memory"),
    "memory by str.format": ("{{ '{:>9999999999}'.format(1) }}", "memory"),
    "memory by indentation": ("{{ ('a\n' * 10 ** 6) | indent(10 ** 6) }}", "memory"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 16 MiB"),
    "one long output": ("{{ 'a' * (17 * 2 ** 20) }}", "writes more than 16 MiB"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "nesting": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "Recursion"),
    "python's internals": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "internals by filter": ("{{ messages | attr('__init__') }}{{ (messages | attr('__init__')).x }}", "unsafe"),
    "changing the messages": ("{{ messages.append(1) }}", "unsafe"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "a syntax error": ("{% if %}", "line 1: Expected an expression"),
    "its own refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "a type error": ("{{ 1 + 'a' }}", "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_an_error(name):
    template, match = HOSTILE[name]
    with pytest.raises(UserError, match=match):
        render(template)
    assert render("{{ messages[0].content }}") == "q"  # and the next one works


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "arithmetic": "{{ 10 ** (10 ** 8) }}",  # one long operation of C code
}


@pytest.mark.slow
def test_endless_templates_are_stopped_and_do_not_hold_up_others():
    refused = []

    def run(template):
        with pytest.raises(UserError, match="not done after 5 s"):
            render(template)
        refused.append(time.monotonic() - start)

    threads = [threading.Thread(target=run, args=(template,)) for template in [*ENDLESS.values()] * 2]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    assert render("{{ messages[0].content }}") == "q"
    assert not refused
    for thread in threads:
        thread.join()
    assert len(refused) == len(threads)
    assert min(refused) > 4 and max(refused) < BOUND_SECONDS


def test_the_limit_is_the_parents_and_a_killed_worker_is_replaced(monkeypatch):
    monkeypatch.setattr(template_worker, "MAX_SECONDS", 0.5)
    for template in ENDLESS.values():
        start = time.monotonic()
        with pytest.raises(UserError, match=r"not done after 0\.5 s"):
            render(template)
        assert time.monotonic() - start < BOUND_SECONDS
    render("{{ 1 }}")
    worker = sandbox._idle[-1]
    worker._process.kill()
    worker._process.wait()
    assert render("{{ 1 }}") == "1"
    assert worker not in sandbox._idle


def test_workers_are_reused_and_do_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    sandbox._idle.clear()
    render("{{ 1 }}")
    worker = sandbox._idle[-1]
    render("{{ 1 }}")
    assert list(sandbox._idle) == [worker]
    environ = f"/proc/{worker._process.pid}/environ"
    if os.path.exists(environ):
        with open(environ, "rb") as file:
            assert b"s3cret" not in file.read()


def test_values_that_are_not_json_are_refused():
    with pytest.raises(UserError, match="plain JSON values"):
        render("{{ x }}", x=object())
    with pytest.raises(UserError, match=r"messages\[0\]: expected an object"):
        render("{{ 1 }}", messages=["q"])
