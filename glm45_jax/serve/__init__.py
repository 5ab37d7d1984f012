"""Serving over HTTP, as OpenAI's clients ask.

    with Engine(params, config, tokenizer=tokenizer) as engine:
        run(App(engine, "glm-4.5-air"))

`App` is an ASGI application: a request is read and checked (`asked.py`), its answers come from the engine
(`answers.py`) and are written in the form of its route (`chat.py`, `completions.py`). `guard.py` stands before all.
Needs the `serve` extra.
"""

from glm45_jax.serve.app import App
from glm45_jax.serve.options import ServeOptions
from glm45_jax.serve.run import bind, run

__all__ = ["App", "ServeOptions", "bind", "run"]
