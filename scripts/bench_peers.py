"""Speed beside transformers on this machine's CPU: prefill, decode and a training step, same weights, one run.

Both sides get the same random weights in float32 and the same number of threads. Runs alternate, so that a machine
whose speed drifts slows both; medians and their ratio are printed. transformers takes the best of its implementations
of the experts. The blocked MoE layer stands beside one dense product of the same work, and a decoded token's experts
beside their number, of which only the chosen ones may be read. Beside decoding stands what reading the weights allows:
those that a step needs, each once, at the speed at which this machine reads a large matrix.

    python scripts/bench_peers.py                    # everything
    python scripts/bench_peers.py --json docs/proofs/peers.json
    python scripts/bench_peers.py --only decode --batches 8
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from circumstances import circumstances

DECODE = {
    "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 12, "first_k_dense_replace": 1,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 512, "intermediate_size": 2816, "n_shared_experts": 1,
}  # fmt: skip
TRAIN = {
    "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 6, "first_k_dense_replace": 1,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 256, "intermediate_size": 1408, "n_shared_experts": 1,
}  # fmt: skip
CONTEXT, NEW_TOKENS = 256, 64
# The third, "batched_mm", copies the weights for every routed row: slowest by far at batch 1 (5 tokens/s where the
# others make 21), and more memory than most machines have in prefill (17 GB) and training.
EXPERTS = ("eager", "grouped_mm")


def make_pair(sizes: dict, directory: str):
    """A transformers model with random weights, and the same in JAX."""
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    import glm45_jax as glm
    from glm45_jax.config import get_preset

    config = get_preset("tiny", num_nextn_predict_layers=0, max_position_embeddings=4096, **sizes)
    torch.manual_seed(0)
    hf = {k: v for k, v in config.to_hf("v5").items() if k not in ("architectures", "model_type", "glm45_jax")}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**hf)).to(torch.float32).eval()
    model.save_pretrained(directory)
    return model, *glm.load_checkpoint(directory, dtype="float32")


def alternate(rounds: int, sides: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
    """Seconds of each side's calls, in turn, there and back (what ran before matters), after one warm-up."""
    times: dict[Any, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def report(task: str, tokens: int, times: dict[str, list[float]], allowed: float | None = None) -> dict:
    rates = {name: tokens / statistics.median(t) for name, t in times.items()}
    peer = max((name for name in rates if name != "glm45_jax"), key=rates.__getitem__)
    row = {"task": task, "tokens_per_s": rates, "best_peer": peer, "ratio": rates["glm45_jax"] / rates[peer]}
    shown = "  ".join(f"{name} {rate:8.1f}" for name, rate in rates.items())
    bound = ""
    if allowed is not None:
        row |= {"memory_allows_tokens_per_s": allowed, "memory_allows_ratio": allowed / rates[peer]}
        bound = f"; memory allows {allowed:.1f}, {row['memory_allows_ratio']:.2f}x"
    print(f"{task:24s} {shown}  tokens/s   ratio {row['ratio']:.2f}x{bound}", flush=True)
    return row


@functools.cache
def memory_speed() -> float:
    """Bytes per second of a product of a matrix of 1 GiB and a vector, the fastest of several."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((1 << 14, 1 << 14)), jnp.ones(1 << 14)
    product = jax.jit(lambda m, v: m @ v)
    times = alternate(5, {"product": lambda: jax.block_until_ready(product(matrix, vector))})
    return matrix.nbytes / min(times["product"])


def weights_read(params, config, batch: int) -> float:
    """Bytes of the weights that a step of `batch` tokens needs, with experts chosen evenly and independently."""
    import jax

    chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch

    def share(path) -> float:
        names = {key.key for key in path}
        return 0.0 if "embed" in names else chosen if "experts" in names else 1.0

    return sum(x.nbytes * share(path) for path, x in jax.tree_util.tree_leaves_with_path(params))


def prefill(pair, rounds: int) -> list[dict]:
    import jax
    import numpy as np
    import torch

    import glm45_jax as glm

    model, config, params = pair
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 1024))
    step = jax.jit(lambda p, t: glm.prefill(p, config, glm.init_cache(config, 1, 1024), t))

    def torch_prefill(experts: str):
        def call():
            model.set_experts_implementation(experts)
            with torch.inference_mode():
                model(torch.tensor(tokens), logits_to_keep=1, use_cache=True)

        return call

    sides = {"glm45_jax": lambda: jax.block_until_ready(step(params, tokens))}
    sides |= {experts: torch_prefill(experts) for experts in EXPERTS}
    return [report("prefill 1x1024", 1024, alternate(rounds, sides))]


def decode(pair, rounds: int, batches: tuple[int, ...]) -> list[dict]:
    return [_decode(pair, rounds, batch) for batch in batches]


def _decode(pair, rounds: int, batch: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    import glm45_jax as glm

    model, config, params = pair
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, CONTEXT))
    first = jax.jit(lambda p, t: glm.prefill(p, config, glm.init_cache(config, batch, CONTEXT + NEW_TOKENS), t))
    logits, cache = first(params, tokens)

    @jax.jit
    def rest(p, logits, cache):
        def step(_, carry):
            token, cache = carry
            logits, cache = glm.decode_step(p, config, cache, token)
            return jnp.argmax(logits, -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, NEW_TOKENS, step, (jnp.argmax(logits, -1).astype(jnp.int32), cache))

    def torch_side(experts: str):
        import copy

        model.set_experts_implementation(experts)
        with torch.inference_mode():
            out = model(torch.tensor(tokens), logits_to_keep=1, use_cache=True)

        def call():
            model.set_experts_implementation(experts)
            past, token = copy.deepcopy(out.past_key_values), out.logits[:, -1:].argmax(-1)
            with torch.inference_mode():
                for _ in range(NEW_TOKENS):
                    step = model(token, past_key_values=past, use_cache=True)
                    past, token = step.past_key_values, step.logits[:, -1:].argmax(-1)

        return call

    sides = {"glm45_jax": lambda: jax.block_until_ready(rest(params, logits, cache))}
    sides |= {experts: torch_side(experts) for experts in EXPERTS}
    allowed = batch * memory_speed() / weights_read(params, config, batch)
    return report(f"decode batch {batch}", batch * NEW_TOKENS, alternate(rounds, sides), allowed)


def train(pair, rounds: int) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import torch

    import glm45_jax as glm

    model, config, params = pair
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 512))
    optimizer = optax.adamw(1e-4)

    def step(state, tokens):
        params, opt_state = state
        loss = lambda p: glm.loss_fn(p, config, {"tokens": tokens}, balance_weight=0.0)[0]  # noqa: E731
        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step, donate_argnums=0)
    state = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

    def jax_side():
        state[0] = jax.block_until_ready(jitted(state[0], tokens))

    def torch_side(experts: str):
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def call():
            model.set_experts_implementation(experts)
            ids = torch.tensor(tokens)
            model(ids, labels=ids, use_cache=False).loss.backward()
            adamw.step()
            adamw.zero_grad()

        return call

    model.train()
    sides = {"glm45_jax": jax_side} | {experts: torch_side(experts) for experts in EXPERTS}
    return [report("train step 4x512", 2048, alternate(rounds, sides))]


def moe(rounds: int) -> list[dict]:
    return [_blocked(rounds, dtype) for dtype in ("float32", "bfloat16")] + [_chosen_experts(rounds)]


def _experts(num_experts: int, dtype: str) -> list:
    import jax

    dim, width = DECODE["hidden_size"], DECODE["moe_intermediate_size"]
    shapes = [(num_experts, width, dim)] * 2 + [(num_experts, dim, width)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) * dim**-0.5 for key, shape in zip(keys, shapes)]


def _blocked(rounds: int, dtype: str) -> dict:
    """GFLOP/s of 1024 tokens' routed experts, in blocks, and of one product [M, D] x [D, 3F]."""
    import jax
    import numpy as np

    from pallas_kernels import grouped_matmul, grouped_swiglu

    rows, dim, width = 1024 * DECODE["num_experts_per_tok"], DECODE["hidden_size"], DECODE["moe_intermediate_size"]
    num_experts = DECODE["n_routed_experts"]
    x = jax.random.normal(jax.random.key(1), (rows, dim), dtype)
    dense = jax.random.normal(jax.random.key(2), (3 * width, dim), dtype)
    sizes = np.bincount(np.random.default_rng(0).integers(0, num_experts, rows), minlength=num_experts)

    @jax.jit
    def blocked(x, gate, up, down, sizes):
        hidden = grouped_swiglu(x, gate, up, sizes, transpose_rhs=True)
        return grouped_matmul(hidden, down, sizes, transpose_rhs=True)

    product = jax.jit(lambda x, dense: x @ dense.T)
    weights = _experts(num_experts, dtype)
    sides = {
        "blocked": lambda: jax.block_until_ready(blocked(x, *weights, sizes)),
        "dense": lambda: jax.block_until_ready(product(x, dense)),
    }
    work = 2e-9 * rows * dim * 3 * width
    rates = {name: work / statistics.median(t) for name, t in alternate(rounds, sides).items()}
    share = rates["blocked"] / rates["dense"]
    print(
        f"MoE layer {dtype:14s} {rates['blocked']:8.1f}  dense {rates['dense']:8.1f}  GFLOP/s   share {share:.2f}",
        flush=True,
    )
    return {"task": f"blocked MoE layer {dtype}", "gflop_per_s": rates, "ratio": share}


def _chosen_experts(rounds: int) -> dict:
    """Milliseconds of one token's experts, of 32, 64 and 128."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import fused_moe

    top_k, repeats = DECODE["num_experts_per_tok"], 64
    x, shares = jnp.ones((1, DECODE["hidden_size"])), jnp.full((1, top_k), 1 / top_k)

    @jax.jit
    def tokens(x, gate, up, down):
        def token(i, x):  # other experts each time, so that none is still in the cache
            chosen = (jnp.arange(top_k) * 7 + i * 5)[None] % gate.shape[0]
            return fused_moe(x, gate, up, down, chosen, shares, transpose_rhs=True)

        return jax.lax.fori_loop(0, repeats, token, x)

    def side(num_experts: int):
        weights = _experts(num_experts, "float32")
        return lambda: jax.block_until_ready(tokens(x, *weights))

    times = alternate(rounds, {str(n): side(n) for n in (32, 64, 128)})
    milliseconds = {n: 1e3 * statistics.median(t) / repeats for n, t in times.items()}
    ratio = milliseconds["128"] / milliseconds["32"]
    shown = "  ".join(f"E={n} {t:.2f}" for n, t in milliseconds.items())
    print(f"one token's experts      {shown}  ms   ratio {ratio:.2f}x", flush=True)
    return {"task": "one token's experts", "milliseconds": milliseconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode", "train", "moe"], help="one task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="decode batch sizes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    import torch

    about = circumstances("jax", "torch", "transformers")
    torch.set_num_threads(2)
    rows: list[dict] = []
    if args.only in (None, "moe"):
        rows += moe(args.rounds)
    with tempfile.TemporaryDirectory() as directory:
        if args.only in (None, "prefill", "decode"):
            pair = make_pair(DECODE, directory)
            if args.only != "decode":
                rows += prefill(pair, args.rounds)
            if args.only != "prefill":
                rows += decode(pair, max(2, args.rounds - 2), tuple(args.batches))
            del pair
    with tempfile.TemporaryDirectory() as directory:
        if args.only in (None, "train"):
            rows += train(make_pair(TRAIN, directory), args.rounds)
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
