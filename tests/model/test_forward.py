"""What must hold of the forward pass whatever the weights: causality, packing, padding, positions, transformations."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.config import RematPolicy
from glm45_jax.errors import UserError
from glm45_jax.model.decoder import rows_of
from tests.support import quick_jit, random_params, random_tokens, small_config

CONFIG = small_config()
LENGTH = 12
forward = quick_jit(glm.forward, static_argnames=("config", "collect"))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(CONFIG, 2, LENGTH)


def close(a, b, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)


def test_shapes_and_dtypes(params, tokens) -> None:
    out = forward(params, config=CONFIG, tokens=tokens, collect=("hidden_states", "router"))
    layers, moe = CONFIG.num_hidden_layers, CONFIG.num_moe_layers
    assert out.logits.shape == (2, LENGTH, CONFIG.vocab_size) and out.logits.dtype == jnp.float32
    assert out.hidden.shape == (2, LENGTH, CONFIG.hidden_size)
    assert out.hidden_states.shape == (layers + 1, 2, LENGTH, CONFIG.hidden_size)
    assert out.router.logits.shape == (moe, 2, LENGTH, CONFIG.n_routed_experts)
    assert out.router.indices.shape == out.router.weights.shape == (moe, 2, LENGTH, CONFIG.num_experts_per_tok)
    plain = forward(params, config=CONFIG, tokens=tokens)
    assert plain.hidden_states is None and plain.router is None
    close(plain.logits, out.logits)


def test_the_future_is_not_seen(params, tokens) -> None:
    changed = tokens.at[:, 8].set((tokens[:, 8] + 1) % CONFIG.vocab_size)
    a = forward(params, config=CONFIG, tokens=tokens).logits
    b = forward(params, config=CONFIG, tokens=changed).logits
    close(a[:, :8], b[:, :8])
    assert all(np.abs(a[:, t] - b[:, t]).max() > 1e-3 for t in range(8, LENGTH)), "the past is not seen either"


def run(params, tokens, **given):
    """Logits with every argument given explicitly, so that all calls share one compilation."""
    defaults = {"positions": jnp.arange(LENGTH), "segment_ids": 1, "attention_mask": 1}
    filled = {name: jnp.broadcast_to(value, tokens.shape) for name, value in (defaults | given).items()}
    return forward(params, config=CONFIG, tokens=tokens, **filled).logits


def test_padding_changes_nothing(params, tokens) -> None:
    alone = run(params, tokens)[:, :7]  # the future is not seen, as tested above
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < 7, tokens.shape).astype(jnp.int32)
    close(run(params, tokens.at[:, 7:].set(3), attention_mask=mask)[:, :7], alone)
    left, left_mask = jnp.roll(tokens, 5, axis=1), jnp.roll(mask, 5, axis=1)
    close(run(params, left, attention_mask=left_mask)[:, 5:], alone)
    close(run(params, left, attention_mask=left_mask, positions=jnp.clip(jnp.arange(LENGTH) - 5, 0))[:, 5:], alone)
    assert np.abs(run(params, left)[:, 5:] - alone).max() > 1e-2, "the mask has no effect"


def test_a_row_of_padding_alone_is_finite(params, tokens) -> None:
    out = run(params, tokens, attention_mask=jnp.array([[1], [0]]))
    assert bool(jnp.isfinite(out).all())
    close(out[0], run(params, tokens)[0])


def test_packed_segments_equal_separate_sequences(params, tokens) -> None:
    cuts = [(0, 5), (5, 8), (8, 12)]
    segments = jnp.array([1] * 5 + [2] * 3 + [3] * 4)
    packed = run(params, tokens, segment_ids=segments)
    for start, stop in cuts:
        alone = run(params, jnp.roll(tokens, -start, axis=1))[:, : stop - start]
        close(packed[:, start:stop], alone)
    assert np.abs(run(params, tokens)[:, 5:] - packed[:, 5:]).max() > 1e-2, "segments have no effect"


def test_segments_and_mask_together(params, tokens) -> None:
    """Padding inside a packed row is no one's context."""
    mask = jnp.ones_like(tokens).at[:, 4:6].set(0)
    out = run(params, tokens, segment_ids=jnp.array([1] * 6 + [2] * 6), attention_mask=mask)
    close(out[:, :4], run(params, tokens)[:, :4])
    close(out[:, 6:], run(params, jnp.roll(tokens, -6, axis=1))[:, :6])
    split = jnp.ones_like(tokens).at[:, 4:6].set(0)  # without segments the later tokens see the first
    assert np.abs(run(params, tokens, attention_mask=split)[:, 6:] - out[:, 6:]).max() > 1e-2


def test_positions_are_relative_and_matter(params, tokens) -> None:
    base = run(params, tokens)
    close(forward(params, config=CONFIG, tokens=tokens).logits, base)
    close(run(params, tokens, positions=jnp.arange(LENGTH) + 50), base, atol=1e-4)
    stretched = run(params, tokens, positions=3 * jnp.arange(LENGTH))
    assert np.abs(stretched[:, 1:] - base[:, 1:]).max() > 1e-2


def test_defaults_of_the_rows() -> None:
    """Positions count from the row's start, and restart with each segment where segments are given; padding is 0."""
    tokens = jnp.zeros((1, 6), jnp.int32)
    segments, mask = jnp.array([[1, 1, 2, 2, 2, 0]]), jnp.array([[0, 1, 1, 1, 0, 1]])
    plain, packed, padded = rows_of(tokens), rows_of(tokens, None, segments), rows_of(tokens, None, None, mask)
    np.testing.assert_array_equal(plain.positions, [[0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(packed.positions, [[0, 1, 0, 1, 2, 0]])
    np.testing.assert_array_equal(padded.positions, plain.positions)
    assert len(set(np.asarray(plain.segment_ids)[0])) == 1 and (np.asarray(plain.segment_ids) > 0).all()
    np.testing.assert_array_equal(packed.segment_ids, segments)
    np.testing.assert_array_equal(np.asarray(padded.segment_ids) == 0, np.asarray(mask) == 0)


@pytest.mark.parametrize("name", ["positions", "segment_ids", "attention_mask"])
def test_wrong_shapes_are_named(name: str, params, tokens) -> None:
    wrong: dict[str, Any] = {name: jnp.ones((2, LENGTH + 1), jnp.int32)}
    with pytest.raises(UserError, match=name):
        glm.forward(params, CONFIG, tokens, **wrong)


def test_unknown_collections_are_named(params, tokens) -> None:
    with pytest.raises(UserError, match="attentions"):
        glm.forward(params, CONFIG, tokens, collect=("attentions",))


# --- transformations -------------------------------------------------------------------------------------------------


def test_compiled_as_users_do(params, tokens) -> None:
    close(
        jax.jit(glm.forward, static_argnums=1)(params, CONFIG, tokens).logits,
        forward(params, config=CONFIG, tokens=tokens).logits,
    )


@pytest.mark.slow
def test_vmap_over_models(params, tokens) -> None:
    other = random_params(CONFIG, seed=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    out = quick_jit(jax.vmap(lambda p: glm.forward(p, CONFIG, tokens).logits))(stacked)
    close(out[0], forward(params, config=CONFIG, tokens=tokens).logits)
    close(out[1], forward(other, config=CONFIG, tokens=tokens).logits)


def test_vmap_over_sequences(params, tokens) -> None:
    out = quick_jit(jax.vmap(lambda row: glm.forward(params, CONFIG, row[None]).logits[0]))(tokens)
    close(out, forward(params, config=CONFIG, tokens=tokens).logits)


@functools.partial(quick_jit, static_argnums=1)
def gradient(params, config, tokens):
    return jax.grad(lambda p: jnp.square(glm.forward(p, config, tokens).logits).mean())(params)


@pytest.mark.slow
def test_every_parameter_has_a_gradient_but_the_selection_bias(params, tokens) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, CONFIG, tokens)):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.isfinite(leaf).all()), name
        assert bool((leaf != 0).any()) == ("['router']['bias']" not in name), name


@pytest.mark.slow
def test_gradients_are_the_slopes(params, tokens) -> None:
    """Against central differences along a random direction: the hand-written derivatives inside are right."""
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) * 1e-2, params)
    for kind in ("moe_layers",):  # the selection bias moves choices, not values
        direction[kind]["moe"]["router"]["bias"] *= 0

    def loss(p):
        return jnp.square(forward(p, config=CONFIG, tokens=tokens).logits).mean()

    moved = [loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (0.02, -0.02)]
    slope = (moved[0] - moved[1]) / 0.04
    products = jax.tree.map(lambda g, d: jnp.vdot(g, d), gradient(params, CONFIG, tokens), direction)
    assert float(slope) == pytest.approx(float(sum(jax.tree.leaves(products))), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=[] if p == "full" else pytest.mark.slow) for p in get_args(RematPolicy) if p != "none"],
)
def test_remat_changes_no_gradient(policy: str, params, tokens) -> None:
    plain, again = gradient(params, CONFIG, tokens), gradient(params, CONFIG.replace(remat=policy), tokens)
    jax.tree.map(lambda a, b: close(a, b, atol=1e-6), plain, again)


def count_products(jaxpr) -> int:
    """With those of every program inside, as often as it is called (its text may name a shared one once)."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        inside = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        total += sum(count_products(getattr(x, "jaxpr", x)) for x in inside if hasattr(x, "eqns"))
    return total


@pytest.mark.slow
def test_remat_policies_recompute_more_and_more() -> None:
    def products(policy: str) -> int:
        """Matrix products in the program of the gradient."""
        config = CONFIG.replace(remat=policy)
        loss = lambda p, t: glm.forward(p, config, t).logits.sum()  # noqa: E731
        program = jax.make_jaxpr(jax.grad(loss))(glm.abstract_params(config), jnp.zeros((1, 8), jnp.int32))
        return count_products(program.jaxpr)

    counts = {policy: products(policy) for policy in get_args(RematPolicy)}
    assert counts["none"] <= counts["dots"] < counts["full"]
    assert counts["none"] < counts["save_block_outputs"] < counts["full"]


def test_the_program_does_not_grow_with_depth() -> None:
    def size(layers: int) -> int:
        config = small_config(num_hidden_layers=layers)
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        program = jax.make_jaxpr(lambda p, t: glm.forward(p, config, t).logits)
        return str(program(glm.abstract_params(config), tokens)).count(" = ")

    assert size(4) == size(8)


def test_bfloat16_computes_near_float32(params, tokens) -> None:
    config = CONFIG.replace(dtype="bfloat16")
    out = forward(params, config=config, tokens=tokens)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    exact = forward(params, config=CONFIG, tokens=tokens).logits
    # a few tokens route differently; most logits stay near
    assert float(jnp.median(jnp.abs(out.logits - exact))) < 0.05


# --- the MTP layer ---------------------------------------------------------------------------------------------------


MTP = small_config(num_nextn_predict_layers=1, mtp_own_embed=True, mtp_own_head=True)
mtp_forward = quick_jit(glm.mtp_forward, static_argnums=1)


def test_mtp_sees_the_next_token_and_no_further(tokens) -> None:
    params = random_params(MTP)
    a = mtp_forward(params, MTP, tokens).logits
    assert a.shape == (2, LENGTH - 1, MTP.vocab_size) and a.dtype == jnp.float32
    b = mtp_forward(params, MTP, tokens.at[:, 8].set((tokens[:, 8] + 1) % MTP.vocab_size)).logits
    close(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7] - b[:, 7]).max() > 1e-3


def test_mtp_takes_the_hidden_states_at_hand(tokens) -> None:
    params = random_params(MTP)
    hidden = forward(params, config=MTP, tokens=tokens).hidden
    close(mtp_forward(params, MTP, tokens, hidden=hidden).logits, mtp_forward(params, MTP, tokens).logits)


def test_mtp_respects_padding(tokens) -> None:
    params = random_params(MTP)
    alone = mtp_forward(params, MTP, tokens).logits[:, :6]  # of the first 7 tokens
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < 7, tokens.shape).astype(jnp.int32)
    close(mtp_forward(params, MTP, tokens.at[:, 7:].set(3), attention_mask=mask).logits[:, :6], alone)
    left = mtp_forward(params, MTP, jnp.roll(tokens, 5, axis=1), attention_mask=jnp.roll(mask, 5, axis=1))
    close(left.logits[:, 5:], alone)


def test_a_model_without_mtp_says_so(params, tokens) -> None:
    with pytest.raises(UserError, match="no MTP layer"):
        glm.mtp_forward(params, CONFIG, tokens)
