"""Serving over HTTP, as OpenAI's and Anthropic's clients ask.

    with Engine(params, config, tokenizer=tokenizer) as engine:
        run(App(engine, "glm-4.5-air"))

`App` is an ASGI application: a request is read and checked (`asked.py`), its answers come from the engine
(`answers.py`) and are written in the form of its route (`chat.py`, `completions.py`). Other forms are translated into a
chat request (`translated.py`) and their answers cut into blocks (`blocks.py`): Anthropic's `messages.py`, OpenAI's
`responses.py`. `forms.py` has their errors and streams, `page.html` the page. `guard.py` stands before all.
Needs the `serve` extra.
"""

from glm45_jax.serve.app import App
from glm45_jax.serve.options import ServeOptions
from glm45_jax.serve.run import bind, run

__all__ = ["App", "ServeOptions", "bind", "run"]
