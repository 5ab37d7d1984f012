"""Serving beside transformers on this machine's CPU: tokens per second of many requests at once, same weights, one run.

32 requests of 64 tokens, 128 new tokens each, to the engine as a library; to transformers' `generate` as one batch,
with each of its implementations of the experts, and to its continuous batching where that runs; and to llama.cpp's
server, over HTTP, where one is given (`llama_cpp.py` says how to build it). Beside them what the bare compiled steps of
those shapes take, without an engine around them. Then speculation: drafts against none, at several loads.

    python scripts/bench_serving.py                                       # a random model of the benchmark's sizes
    python scripts/bench_serving.py --checkpoint runs/quickstart/model    # a trained one: acceptance means something
    python scripts/bench_serving.py --only speculation --checkpoint runs/quickstart/model
    python scripts/bench_serving.py --only throughput --llama-server build/bin/llama-server
    python scripts/bench_serving.py --json docs/proofs/serving.json

Sides alternate, so that a machine whose speed drifts slows all; medians and their ratios are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_peers import DECODE, EXPERTS, alternate, make_pair
from circumstances import circumstances, write_figures
from llama_cpp import completing, serving, write_gguf

REQUESTS, PROMPT, NEW = 32, 64, 128
WAVES = 4  # of requests, to see what drafts give


def load_pair(checkpoint: Path) -> Any:
    """A checkpoint in Hugging Face's format, in transformers and in JAX."""
    import torch
    from transformers import Glm4MoeForCausalLM

    import glm45_jax as glm

    model = Glm4MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, *glm.load_checkpoint(checkpoint, dtype="float32")


def throughput(pair: Any, name: str, rounds: int, llama: Path | None, checkpoint: Path) -> dict[str, Any]:
    """Tokens per second of all requests together, of each side; llama.cpp's server is that at `llama`, if any."""
    from glm45_jax.infer import Engine, EngineOptions

    model, config, params = pair
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (REQUESTS, PROMPT))
    options = EngineOptions(
        slots=REQUESTS, cache_tokens=REQUESTS * (PROMPT + NEW + 16), step_tokens=REQUESTS * PROMPT,
        warm_up=False,  # what is needed is compiled in the round that does not count
    )  # fmt: skip
    answers: dict[str, list[list[int]]] = {}
    with Engine(params, config, options=options) as engine, contextlib.ExitStack() as stack:

        def ours() -> None:
            engine.update_params(params)  # nothing of the last round may be found in the cache
            answers["ours"] = [one.answer for one in engine.generate_batch(prompts.tolist(), NEW, stop_ids=[])]

        sides: dict[str, Callable[[], None]] = {"glm45_jax": ours, "bare steps": _bare_steps(params, config, prompts)}
        sides |= {experts: _generate(model, prompts, experts) for experts in EXPERTS}
        continuous = _continuous(model, prompts)
        sides |= {"continuous": continuous} if continuous else {}
        if llama is not None:
            ours()
            unused = min(set(range(config.vocab_size)).difference(*answers["ours"]))
            model_file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.gguf")
            write_gguf(checkpoint, model_file, unused)
            address = stack.enter_context(serving(llama, model_file, REQUESTS, PROMPT + NEW + 8, threads=2))
            ask = completing(address, prompts.tolist(), NEW)
            sides["llama.cpp"] = lambda: answers.update(theirs=ask())
        times = alternate(rounds, sides)
    rates = {side: REQUESTS * NEW / statistics.median(t) for side, t in times.items()}
    peers = {side: rate for side, rate in rates.items() if side not in ("glm45_jax", "bare steps", "llama.cpp")}
    best = max(peers, key=peers.__getitem__)
    row = {
        "task": f"{REQUESTS} requests, {PROMPT} + {NEW} tokens, {name}", "tokens_per_s": rates, "best_peer": best,
        "ratio": rates["glm45_jax"] / rates[best], "share_of_bare_steps": rates["glm45_jax"] / rates["bare steps"],
    }  # fmt: skip
    if "theirs" in answers:
        row["llama_cpp"] = {"ratio": rates["glm45_jax"] / rates["llama.cpp"], **_agreement(**answers)}
    shown = "  ".join(f"{side} {rate:.0f}" for side, rate in rates.items())
    print(f"{row['task']}: {shown} tokens/s; {row['ratio']:.2f}x of {best}, "
          f"{row['share_of_bare_steps']:.0%} of the bare steps; {row.get('llama_cpp', '')}", flush=True)  # fmt: skip
    return row


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """How much of the greedy answers is the same: their first tokens, and all up to the first difference."""
    same = [[a == b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    return {
        "same_first_tokens": statistics.mean(one[0] for one in same),
        "same_until_the_first_difference": statistics.mean([*one, False].index(False) / NEW for one in same),
    }


def _bare_steps(params: Any, config: Any, prompts: np.ndarray) -> Callable[[], None]:
    """All prompts read in one step, then one step after another for all; nothing comes back before the end."""
    import jax
    import jax.numpy as jnp

    import glm45_jax as glm

    rows = len(prompts)
    first = jax.jit(lambda p, t: glm.prefill(p, config, glm.init_cache(config, rows, PROMPT + NEW), t))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(p: Any, cache: Any, token: Any) -> Any:
        logits, cache = glm.decode_step(p, config, cache, token)
        return jnp.argmax(logits, -1).astype(jnp.int32), cache

    def call() -> None:
        logits, cache = first(params, prompts)
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        for _ in range(NEW - 1):
            token, cache = step(params, cache, token)
        jax.block_until_ready(token)

    return call


def _generate(model: Any, prompts: np.ndarray, experts: str) -> Callable[[], None]:
    import torch

    tokens = torch.tensor(prompts)

    def call() -> None:
        model.set_experts_implementation(experts)
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    return call


def _continuous(model: Any, prompts: np.ndarray) -> Callable[[], None] | None:
    """transformers' continuous batching, where it runs on a CPU."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(  # without, it takes nine tenths of the memory for its cache
        page_size=32, num_blocks=len(prompts) * (PROMPT + NEW + 64) // 32, max_batch_tokens=prompts.size,
        max_requests_per_batch=len(prompts),
    )  # fmt: skip

    def call() -> None:
        model.set_experts_implementation("grouped_mm")
        answers = model.generate_batch(prompts.tolist(), settings, sizes, warmup=False)
        assert all(len(answer.generated_tokens) == NEW for answer in answers.values()), "answers were cut"

    try:
        call()
    except Exception as error:
        print(f"transformers' continuous batching does not run here: {type(error).__name__}: {error}", flush=True)
        return None
    return call


def speculation(
    params: Any, config: Any, tokenizer: Any, prompts: list[list[int]], rounds: int, loads: list[int]
) -> list[dict]:
    """Engines with one and two drafts against one without, at several loads: their times, and what was accepted.

    Four waves, each when the one before has ended; and the same requests all at once, where each that ends makes room
    for the next. A second engine without drafts says what such ratios are worth: its own should be one.
    """
    import jax

    from glm45_jax.infer import Engine, EngineOptions

    rows = []
    for together in loads:
        some, engines = (prompts * together)[: max(4, together)], {}
        for name, drafts in (("none", 0), ("none again", 0), ("1 drafts", 1), ("2 drafts", 2)):
            options = EngineOptions(
                slots=together, cache_tokens=together * 1024, step_tokens=max(256, together * 3), drafts=drafts
            )
            engines[name] = Engine(params, config, tokenizer=tokenizer, options=options)
        for how, batches in {"in waves": [some] * WAVES, "refilled": [some * WAVES]}.items():
            call = lambda engine, batches: [engine.generate_batch(batch, NEW) for batch in batches]  # noqa: E731
            times = alternate(rounds, {n: functools.partial(call, engine, batches) for n, engine in engines.items()})
            for name in ("none again", "1 drafts", "2 drafts"):
                stats = engines[name].stats()
                ratios = [a / b for a, b in zip(times["none"], times[name])]
                row = {
                    "task": f"speculation, {together} at once {how}, {name}",
                    "speed_up": statistics.median(ratios), "of_rounds": [min(ratios), max(ratios)],
                    "of_all_rounds": sum(times["none"]) / sum(times[name]), "rounds": rounds,
                    "acceptance": stats["drafts_accepted"] / max(1, stats["drafts_given"]),
                    "given": stats["drafts_given"],
                }  # fmt: skip
                print(f"{row['task']}: {row['speed_up']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}; "
                      f"of all rounds together {row['of_all_rounds']:.2f}x), "
                      f"{row['acceptance']:.0%} of {row['given']} accepted", flush=True)  # fmt: skip
                rows.append(row)
        for engine in engines.values():
            engine.close()
        jax.clear_caches()  # a process has room for the memory maps of some thousand programs
    return rows


def _problems(tokenizer: Any, count: int = 16) -> list[list[int]]:
    """Held-out prompts of the quickstart's kinds, as its examination asks them."""
    from glm45_jax.data.generated import call_conversation, draw_sum, sum_conversation

    rng = random.Random(1)
    talks = [
        sum_conversation(draw_sum(rng, test=True), rng) if i % 2 else call_conversation(rng, test=True)[0]
        for i in range(count)
    ]
    return [tokenizer.encode_chat(talk["messages"][:1], talk.get("tools"), enable_thinking=True) for talk in talks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a trained model in Hugging Face's format")
    parser.add_argument("--only", choices=["throughput", "speculation"], help="one task")
    parser.add_argument("--loads", type=int, nargs="*", default=[1, 4, 16], help="requests at once, to see speculation")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, to stand beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of other models")
    args = parser.parse_args()
    import torch

    about = circumstances("jax", "torch", "transformers")
    torch.set_num_threads(2)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        name = args.checkpoint.name if args.checkpoint else "the benchmark's sizes"
        if args.only != "speculation":
            pair = load_pair(args.checkpoint) if args.checkpoint else make_pair(DECODE, directory)
            rows.append(throughput(pair, name, args.rounds, args.llama_server, args.checkpoint or Path(directory)))
            del pair
        if args.checkpoint and args.only != "throughput":
            import glm45_jax as glm
            from glm45_jax.text import Tokenizer

            config, params = glm.load_checkpoint(args.checkpoint, dtype="float32")
            tokenizer = Tokenizer.load(args.checkpoint)
            rows += speculation(params, config, tokenizer, _problems(tokenizer), args.rounds, args.loads)
    if args.json:
        kept = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        new = {row["task"] for row in rows}
        rows = [{**row, "commit": about["commit"]} for row in rows]
        write_figures(args.json, about | {"rows": [row for row in kept if row["task"] not in new] + rows})


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"{time.monotonic() - start:.0f} s")
