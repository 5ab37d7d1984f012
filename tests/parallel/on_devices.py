"""The model on meshes of eight CPU devices against one device. Run by test_spread.py in a process that has eight.

python -m tests.parallel.on_devices CASE...    prints one JSON object a case
"""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import glm45_jax as glm
from glm45_jax.config import ModelConfig, ParallelConfig
from glm45_jax.infer.calibrate import cache_dtype_of, cache_scales
from glm45_jax.model import param_shardings, quantize_params, shardings_of
from glm45_jax.parallel import SERVING_RULES, make_mesh
from glm45_jax.plan.collectives import count_collectives
from glm45_jax.train.config import TrainConfig
from glm45_jax.train.step import gradients
from tests.support import quick_jit, random_params, small_config

BATCH, LENGTH = 8, 16


class Case(NamedTuple):
    mesh: dict[str, int]
    parallel: dict[str, Any] = {}  # noqa: RUF012
    model: dict[str, Any] = {}  # noqa: RUF012
    accumulation: int = 1
    skewed: bool = False  # every token to the experts of one device


A2A, RING = {"dispatch": "all_to_all"}, {"dispatch": "all_gather"}
# 40 numbers divide by 5; expert axes of 160 experts are of such sizes
FIVE = {"hidden_size": 40, "n_routed_experts": 10, "head_dim": 8}
CASES = {
    "fsdp": Case({"data": 2, "fsdp": 2}, accumulation=2),
    "ring": Case({"expert": 4}, RING),
    "a2a-chunks": Case({"fsdp": 2, "expert": 4}, {**A2A, "expert_chunks": 4}, accumulation=2),
    "a2a-narrow": Case({"expert": 8}, A2A, {"remat": "none", "mtp_own_head": True, "mtp_own_embed": True}),
    "a2a-skewed": Case({"expert": 4}, {**A2A, "expert_chunks": 3}, skewed=True),
    "five": Case({"expert": 5}, A2A, FIVE),
    "tensor-kv": Case({"tensor": 8}, A2A, {"num_attention_heads": 8, "remat": "save_block_outputs"}),
    "context": Case({"context": 4}),
    "context-tensor": Case({"fsdp": 2, "context": 2, "tensor": 2}, A2A),
    "data-expert-context": Case({"data": 2, "expert": 2, "context": 2}, A2A),
    "expert-tensor": Case({"fsdp": 2, "expert": 2, "tensor": 2}, A2A, accumulation=2),
    "pipeline": Case({"pipeline": 2, "fsdp": 2}),
    "pipeline-rounds": Case(
        {"pipeline": 2, "expert": 2}, {**A2A, "microbatches": 4, "pipeline_repeats": 2}, {"num_hidden_layers": 6}
    ),
    "pipeline-tensor": Case({"pipeline": 4, "tensor": 2}, {}, {"num_hidden_layers": 6}),
    "pipeline-context": Case({"pipeline": 2, "context": 2, "expert": 2}, A2A, {"tie_word_embeddings": True}),
    "groups": Case({"fsdp": 2, "expert": 2}, {}, {"n_group": 4, "topk_group": 2, "n_shared_experts": 0}),
}


def config_of(case: Case) -> ModelConfig:
    return small_config(**{"num_nextn_predict_layers": 1, "remat": "full"} | case.model)


def mesh_of(case: Case) -> Any:
    return make_mesh(jax.devices()[: math.prod(case.mesh.values())], **case.mesh)


def packed_batch(config: ModelConfig, rows: int) -> dict[str, jax.Array]:
    """Rows of one, two and three segments, with padding behind some, and targets left out."""
    rng = np.random.default_rng(1)
    place = np.arange(LENGTH)
    ends = [(LENGTH,), (9, 14), (3, 5, LENGTH), (7, LENGTH)]
    segments = np.stack([np.searchsorted(ends[i % 4], place, side="right") + 1 for i in range(rows)])
    segments = np.where(segments > [[len(ends[i % 4])] for i in range(rows)], 0, segments)
    return {
        "tokens": jnp.asarray(rng.integers(0, config.vocab_size, (rows, LENGTH)), jnp.int32),
        "segment_ids": jnp.asarray(segments, jnp.int32),
        "loss_mask": jnp.asarray(rng.random((rows, LENGTH)) < 0.8),
    }


def params_of(config: ModelConfig, skewed: bool) -> Any:
    def skew(path: Any, x: jax.Array) -> jax.Array:
        return x.at[..., :2].add(100.0) if "router" in jax.tree_util.keystr(path) and x.shape[-1] == 8 else x

    params = random_params(config)
    return jax.tree_util.tree_map_with_path(skew, params) if skewed else params


@functools.cache
def alone(config: ModelConfig, rows: int, skewed: bool) -> Any:
    """Gradients and metrics on one device."""
    train = TrainConfig(model=config, steps=1, batch_size=rows, seq_len=LENGTH)
    return quick_jit(lambda p, b: gradients(p, b, train))(params_of(config, skewed), packed_batch(config, rows))


def training(case: Case) -> dict[str, Any]:
    """How far gradients and metrics on the mesh are from those on one device, and the step's collectives."""
    config, rows = config_of(case), 10 if case.model == FIVE else BATCH * case.accumulation
    spread = config.replace(parallel=ParallelConfig(**case.parallel))
    train = TrainConfig(model=spread, steps=1, batch_size=rows, seq_len=LENGTH, accumulation=case.accumulation)
    mesh = mesh_of(case)
    params, batch = params_of(config, case.skewed), packed_batch(config, rows)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(spread, mesh))
        step = quick_jit(lambda p, b: gradients(p, b, train))
        lowered = step.lower(placed, batch)
        got = step(placed, batch)
    shardings = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, g.ndim), got[0], placed)
    counts = count_collectives(lowered.as_text(), mesh)
    return {
        "errors": errors(alone(config, rows, case.skewed), got),
        "gradients_lie_as_params": all(jax.tree.leaves(shardings)),
        "collectives": {f"{kind} {'+'.join(axes)}": n for (kind, axes), n in counts.items()},
    }


def errors(want: Any, got: Any) -> dict[str, float]:
    """The largest difference of each leaf, over the leaf's largest number."""
    out = {}
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(want)[0], jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        out[jax.tree_util.keystr(path)] = float(np.abs(a - b).max() / max(1e-3, np.abs(a).max()))
    return out


# --- whole forward passes and decoding -------------------------------------------------------------------------------


def forward_of(rows: int, length: int, form: str | None = None, **mesh: int) -> dict[str, Any]:
    """`forward`, `mtp_forward` and `loss_fn`, of sizes that the mesh does not divide; quantised without the loss."""
    config = small_config(num_nextn_predict_layers=1)
    params, batch = quantised(random_params(config), config, form), packed_batch(config, 8)
    tokens, segments = (batch[name][:rows, :length] for name in ("tokens", "segment_ids"))

    def run(params: Any) -> Any:
        out = glm.forward(params, config, tokens, segment_ids=segments, collect=("hidden_states", "router"))
        mtp = glm.mtp_forward(params, config, tokens, segment_ids=segments)
        loss = () if form else glm.loss_fn(params, config, {"tokens": tokens, "segment_ids": segments})
        return out, mtp, loss

    real = segments != 0  # what padding computes depends on what lies beside it, and nobody reads it
    keep = lambda x: x if x.ndim < 2 else x * _mask(x, real)  # noqa: E731
    want = jax.tree.map(keep, quick_jit(run)(params))
    on = make_mesh(jax.devices()[: math.prod(mesh.values())], **mesh)
    with jax.set_mesh(on):
        got = jax.tree.map(keep, quick_jit(run)(jax.device_put(params, shardings_of(params, config, on))))
    return {"errors": errors(want, got)}


def _mask(x: jax.Array, real: jax.Array) -> jax.Array:
    for lead in range(x.ndim - 1):
        for length in (real.shape[1], real.shape[1] - 1):
            if x.shape[lead : lead + 2] == (real.shape[0], length):
                mask = real[:, :length]
                return mask.reshape((1,) * lead + mask.shape + (1,) * (x.ndim - lead - 2))
    return jnp.ones((), x.dtype)


def decoding(rows: int, serving: bool, **mesh: int) -> dict[str, Any]:
    """Prefill of padded prompts, and steps after it."""
    config = small_config()
    params = random_params(config)
    tokens = packed_batch(config, 8)["tokens"][:rows, :9]
    mask = jnp.arange(9) < jnp.array([9, 4, 7, 9, 1, 2, 8, 9])[:rows, None]

    def run(params: Any, config: ModelConfig) -> Any:
        cache = glm.init_cache(config, rows, 12)
        logits, cache = glm.prefill(params, config, cache, tokens, attention_mask=mask)
        out = [logits]
        for _ in range(2):
            logits, cache = glm.decode_step(params, config, cache, jnp.argmax(logits, -1).astype(jnp.int32))
            out.append(logits)
        return out

    want = quick_jit(lambda p: run(p, config))(params)
    spread = config.replace(parallel=ParallelConfig(rules=SERVING_RULES if serving else ()))
    on = make_mesh(jax.devices()[: math.prod(mesh.values())], **mesh)
    with jax.set_mesh(on):
        placed = jax.device_put(params, param_shardings(spread, on))
        lowered = jax.jit(
            lambda p, c: glm.decode_step(p, spread, c, tokens[:, 0])
        ).lower(placed, jax.eval_shape(lambda: glm.init_cache(spread, rows, 12)))  # fmt: skip
        got = quick_jit(lambda p: run(p, spread))(placed)
    counts = count_collectives(lowered.as_text(), on)
    return {
        "errors": errors(want, got),
        "collectives": {f"{kind} {'+'.join(axes)}": n for (kind, axes), n in counts.items()},
    }


def quantised(params: Any, config: ModelConfig, form: Any) -> Any:
    return params if form is None else quantize_params(params, config, form, head=True)


def paging(form: str | None = None, cache: str = "float32", **mesh: int) -> dict[str, Any]:
    """A step over pages, of a chunk of a prompt and two rows behind it, and the MTP layer's after it."""
    config = small_config(num_nextn_predict_layers=1, num_attention_heads=8)
    params, tokens = random_params(config), packed_batch(config, 8)["tokens"].reshape(-1)
    params, known = quantised(params, config, form), tokens[:9].tolist()

    def run(params: Any, config: ModelConfig) -> Any:
        table = jnp.arange(9).reshape(3, 3)
        scales = cache_scales(params, config, cache, [known]) if cache != "float32" else None
        pages = glm.model.init_pages(config, 9, 4, cache_dtype_of(cache), scales)
        out: list[Any] = []
        for starts, lengths in (([0, 6, 9, 10], [6, 3, 1]), ([0, 1, 2, 6], [7, 4, 5])):
            arrays = (tokens[:12], jnp.array(starts), jnp.array(lengths), table, jnp.int32(3))
            step = glm.model.paged_step(params, config, pages, glm.model.Ragged(*arrays), jnp.arange(starts[-1]))
            drafts = glm.model.mtp_paged_step(
                params,
                config,
                step.pages,
                glm.model.Ragged(tokens[1:13], *arrays[1:]),
                step.hidden,
                jnp.arange(starts[-1]),
            )
            pages = drafts.pages
            out += [step.logits, step.hidden[: starts[-1]], drafts.logits]
        return out

    want = quick_jit(lambda p: run(p, config))(params)
    spread = config.replace(parallel=ParallelConfig(rules=SERVING_RULES))
    on = make_mesh(jax.devices()[: math.prod(mesh.values())], **mesh)
    with jax.set_mesh(on):
        got = quick_jit(lambda p: run(p, spread))(jax.device_put(params, shardings_of(params, spread, on)))
    return {"errors": errors(want, got)}


def dropping() -> dict[str, Any]:
    """Choices dropped at half the mean load, and how many more than that the devices' experts were chosen for."""
    config = small_config().replace(parallel=ParallelConfig(dispatch="all_to_all", expert_capacity=0.5))
    on = make_mesh(jax.devices()[:4], expert=4)
    tokens = packed_batch(config, 8)["tokens"]
    with jax.set_mesh(on):
        placed = jax.device_put(random_params(config), param_shardings(config, on))
        router = quick_jit(lambda p: glm.forward(p, config, tokens, collect=("router",)).router)(placed)
    per_device = config.n_routed_experts // 4
    loads = np.stack([np.bincount(np.ravel(i) // per_device, minlength=4) for i in np.asarray(router.indices)])
    room = math.ceil(0.5 * tokens.size * config.num_experts_per_tok / 4)
    return {"errors": {}, "dropped": router.dropped.tolist(), "expected": np.maximum(loads - room, 0).sum(1).tolist()}


OTHERS = {
    "dropping": dropping,
    "forward-odd": lambda: forward_of(3, 13, fsdp=2, tensor=2),
    "forward-context": lambda: forward_of(3, 13, expert=2, context=2),
    "decode": lambda: decoding(8, True, data=2, expert=2, tensor=2),
    "decode-few-rows": lambda: decoding(1, True, expert=2, tensor=4),
    "paged": lambda: paging(expert=2, tensor=2),
    "paged-many-heads": lambda: paging(tensor=8),
    "quantised": lambda: forward_of(3, 13, "int8", fsdp=2, expert=2, tensor=2),
    "quantised-blocks": lambda: paging("fp8-block", expert=4),
    "quantised-paged": lambda: paging("fp8", "int8", expert=2, tensor=2),
    "quantised-paged-many-heads": lambda: paging("int8", "fp8", tensor=8),
    "decode-training-rules": lambda: decoding(8, False, fsdp=2, expert=2, tensor=2),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or (*CASES, *OTHERS):
        try:
            result = training(CASES[name]) if name in CASES else OTHERS[name]()
        except Exception:  # the other cases go on
            result = {"failed": traceback.format_exc()[-3000:]}
        print(json.dumps({"case": name, **result}), flush=True)
