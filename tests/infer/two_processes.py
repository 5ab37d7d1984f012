"""An engine over several processes, and over one. Run by test_two_processes.py, one call for each process.

python -m tests.infer.two_processes AXES DTYPE FILE    AXES: tensor=2 and the like; DTYPE: of the cache; process 0
writes answers and stats as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from glm45_jax.config import ParallelConfig
from glm45_jax.infer import Engine, EngineOptions, follow
from glm45_jax.infer.grammar import regex_source
from glm45_jax.model import param_shardings
from glm45_jax.parallel import SERVING_RULES
from glm45_jax.train import DistributedConfig
from glm45_jax.train.distributed import ending_together
from tests.support import random_params, small_config, small_tokenizer

PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 2], list(range(20, 60))]


def answers(engine: Engine) -> list[Any]:
    """Of every kind: plain, with penalties and biases, with a grammar, with the likeliest tokens."""
    found = engine.generate_batch(PROMPTS, 12)
    found += engine.generate_batch(PROMPTS[:2], 9, presence_penalty=0.5, logit_bias={7: 2.0}, seed=3)
    grammar = engine.grammars.compile(regex_source("(the|cat|dog| )+"))
    likely = engine.submit(PROMPTS[0], 5, grammar=grammar, top_logprobs=3)
    tops = [[token for token, _ in place] for delta in likely for place in delta.top]
    scored = [[token for token, _ in place] for place in engine.score(PROMPTS[1], 2).top]
    return [*(one.answer for one in found), likely.result().answer, tops, scored]


def main(axes: str, cache: str, file: str) -> None:
    from glm45_jax.cli.serve import serving_mesh

    tokenizer = small_tokenizer()
    config = small_config(
        num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=384, eos_token_id=tokenizer.eos_ids
    ).replace(parallel=ParallelConfig(rules=SERVING_RULES))  # fmt: skip
    mesh = serving_mesh(axes)
    assert mesh is not None
    options = EngineOptions(
        slots=4, cache_tokens=256, page_size=4, step_tokens=32, drafts=1, cache_dtype=cache, warm_up=False
    )
    with jax.set_mesh(mesh):
        place = lambda tree: jax.tree.map(_put, tree, param_shardings(config, mesh))  # noqa: E731
        first, second = (place(random_params(config, seed)) for seed in (0, 1))
        if jax.process_index():
            return follow(first, config, iter([second]).__next__)
        with Engine(first, config, tokenizer=tokenizer, options=options) as engine:
            found = answers(engine)
            engine.update_params(second)
            found += answers(engine)
        Path(file).write_text(json.dumps({"answers": found, "stats": engine.stats()}))


def _put(x: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: jax.device_get(x)[index])


if __name__ == "__main__":
    with ending_together(DistributedConfig(heartbeat_timeout_seconds=10)):
        main(*sys.argv[1:])
