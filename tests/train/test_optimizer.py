"""Each parameter is updated by the rule of its group, and Muon's rule is the one for single matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.model import abstract_params, init_params
from glm45_jax.train.muon import NS_COEFFICIENTS, orthogonalize, scale_by_muon
from glm45_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule, parameter_groups
from tests.support import quick_jit

ATTENTION = {
    "attention.q.weight": "muon", "attention.k.weight": "muon", "attention.v.weight": "muon",
    "attention.o.weight": "muon", "attention.q.bias": "adamw_1d", "attention.k.bias": "adamw_1d",
    "attention.v.bias": "adamw_1d", "input_norm.scale": "adamw_1d", "post_attention_norm.scale": "adamw_1d",
}  # fmt: skip
QK_NORM = {"attention.q_norm.scale": "adamw_1d", "attention.k_norm.scale": "adamw_1d"}
DENSE = {"mlp.gate.weight": "muon", "mlp.up.weight": "muon", "mlp.down.weight": "muon"}
MOE = {
    "moe.router.weight": "muon", "moe.router.bias": "frozen", "moe.experts.gate": "muon", "moe.experts.up": "muon",
    "moe.experts.down": "muon", "moe.shared.gate.weight": "muon", "moe.shared.up.weight": "muon",
    "moe.shared.down.weight": "muon",
}  # fmt: skip
AROUND = {
    "embed.weight": "adamw", "head.weight": "muon", "final_norm.scale": "adamw_1d", "mtp.enorm.scale": "adamw_1d",
    "mtp.hnorm.scale": "adamw_1d", "mtp.norm.scale": "adamw_1d", "mtp.eh_proj.weight": "muon",
}  # fmt: skip


def flat(tree):
    return {
        ".".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, str))[0]
    }


def under(prefix, groups):
    return {f"{prefix}.{name}": group for name, group in groups.items()}


@pytest.mark.parametrize(
    "preset, block, extra",
    [
        ("tiny", ATTENTION | QK_NORM, {}),
        ("glm-4.5-air", ATTENTION, {"mtp.embed.weight": "adamw", "mtp.head.weight": "muon"}),
        ("glm-4.5", ATTENTION | QK_NORM, {"mtp.embed.weight": "adamw", "mtp.head.weight": "muon"}),
    ],
)
def test_group_of_every_parameter(preset, block, extra):
    want = (
        AROUND
        | extra
        | under("dense_layers", block | DENSE)
        | under("moe_layers", block | MOE)
        | under("mtp.block", block | MOE)
    )
    config = get_preset(preset)
    assert flat(parameter_groups(config)) == want
    assert flat(abstract_params(config)).keys() == want.keys()
    without = flat(parameter_groups(config, OptimizerConfig(muon_head=False)))
    heads = {name: "adamw" for name in want if "head" in name}
    assert without == want | heads
    adamw = flat(parameter_groups(config, OptimizerConfig(name="adamw")))
    assert adamw == {name: "adamw" if group == "muon" else group for name, group in want.items()}


def numpy_muon(gradients, weight, lr, decay, beta=0.95, rms=0.2):
    """Muon on one matrix in float64, written out step by step; returns the weight after all gradients."""
    a, b, c = NS_COEFFICIENTS
    mean, weight = np.zeros(weight.shape), weight.astype(np.float64)
    for t, g in enumerate(np.asarray(gradients, np.float64), 1):
        mean = beta * mean + (1 - beta) * g
        x = beta * mean / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        x /= np.linalg.norm(x) + 1e-8
        for _ in range(5):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        weight = weight - lr * (rms * np.sqrt(max(weight.shape)) * x + decay * weight)
    return weight


def numpy_adamw(gradients, weight, lr, decay, b1=0.9, b2=0.95, eps=1e-8):
    m, v, weight = 0.0, 0.0, weight.astype(np.float64)
    for t, g in enumerate(np.asarray(gradients, np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight = weight - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * weight)
    return weight


def random_gradient(shape, rng):
    """Of very different sizes from matrix to matrix: whoever normalises over a stack of them is found out."""
    scale = 10.0 ** rng.integers(-3, 2, (*shape[:-2], 1, 1)) if len(shape) >= 2 else 1.0
    return (rng.normal(size=shape) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def three_steps():
    """Groups, parameters before and after three steps, and the gradients as clipped in float64."""
    config, rng = get_preset("tiny"), np.random.default_rng(0)
    params = quick_jit(lambda: init_params(config, jax.random.key(0)))()
    gradients = [jax.tree.map(lambda x: random_gradient(x.shape, rng), params) for _ in range(3)]
    rules = OptimizerConfig(clip_norm=0.5, learning_rate=0.02, min_learning_rate=0.02)
    optimizer = make_optimizer(config, rules, 10)
    state, update, after = quick_jit(optimizer.init)(params), quick_jit(optimizer.update), params
    clipped = []
    for g in gradients:
        updates, state = update(g, state, after)
        after = jax.tree.map(np.add, after, updates)
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(g)))
        clipped.append({name: x.astype(np.float64) * min(1, 0.5 / norm) for name, x in flat(g).items()})
    return flat(parameter_groups(config)), flat(params), flat(after), clipped


@pytest.mark.slow
def test_muon_of_stacks_is_muon_of_each_matrix(three_steps):
    """Against float64 on every matrix of every stack: layers, experts, q, k, v, o, router and head apart."""
    groups, before, after, gradients = three_steps
    checked = 0
    for name in (name for name, group in groups.items() if group == "muon"):
        history = np.stack([g[name] for g in gradients])
        for index in np.ndindex(before[name].shape[:-2]):
            want = numpy_muon(history[(slice(None), *index)], np.asarray(before[name][index]), 0.02, 0.1)
            np.testing.assert_allclose(after[name][index], want, atol=3e-6, err_msg=f"{name}{index}")
            checked += 1
    # two MoE layers and the MTP's, one dense layer, eh_proj, head; a layer has q, k, v, o, a shared expert, a router
    assert checked == 3 * (4 + 8 * 3 + 3 + 1) + (4 + 3) + 1 + 1


def test_what_is_not_muons(three_steps):
    """AdamW elsewhere; decay on embeddings, none on norms and biases; the selection bias never moves."""
    groups, before, after, gradients = three_steps
    for name, group in groups.items():
        if group == "frozen":
            np.testing.assert_array_equal(after[name], before[name])
        elif group != "muon":
            history = np.stack([g[name] for g in gradients])
            want = numpy_adamw(history, np.asarray(before[name]), 0.02, 0.1 if group == "adamw" else 0.0)
            np.testing.assert_allclose(after[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.few(1)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_optax(nesterov):
    shapes = {"stack": (2, 3, 24, 40), "tall": (2, 40, 24), "row": (1, 24)}
    dims = optax.contrib.MuonDimensionNumbers(-1, -2)
    theirs = optax.chain(
        optax.contrib.scale_by_muon(nesterov=nesterov, weight_dimension_numbers=dict.fromkeys(shapes, dims)),
        optax.contrib._muon.scale_by_shape(dict.fromkeys(shapes, dims), consistent_rms=0.2),
    )
    ours = scale_by_muon(nesterov=nesterov)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    states = theirs.init(params), ours.init(params)
    update_theirs, update_ours = quick_jit(theirs.update), quick_jit(ours.update)
    for step in range(4):
        keys = jax.random.split(jax.random.key(step), len(shapes))
        g = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
        want, state_theirs = update_theirs(g, states[0])
        got, state_ours = update_ours(g, states[1])
        states = state_theirs, state_ours
        for name in shapes:
            np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def test_orthogonalize_brings_singular_values_near_one():
    x = jax.random.normal(jax.random.key(0), (3, 64, 48)) * jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    values = jnp.linalg.svd(orthogonalize(x), compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.3
    assert not jnp.isnan(orthogonalize(jnp.zeros((2, 4, 3)))).any()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_is_float32_for_bfloat16_parameters(name):
    config = get_preset("small")
    optimizer = make_optimizer(config, OptimizerConfig(name=name), 10)
    params = abstract_params(config)
    assert flat(params)["moe_layers.moe.experts.up"].dtype == jnp.bfloat16
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    for tree in (state, updates, after):
        floats = [x.dtype.name for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert floats and set(floats) == {"float32"}


def test_schedule():
    rules = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    schedule = make_schedule(rules, 110)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10)], [0.0, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([schedule(60), schedule(110), schedule(500)], [0.55, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(make_schedule(OptimizerConfig(), 10)(0), 2.5e-4, rtol=1e-6)
    with pytest.raises(UserError, match="warmup_steps"):
        make_schedule(rules, 10)


def test_impossible_settings():
    with pytest.raises(UserError, match="learning_rate is 0") as error:
        OptimizerConfig(learning_rate=0, min_learning_rate=0, name="sgd", clip_norm=-1)  # pyright: ignore[reportArgumentType]
    assert "'sgd'" in str(error.value) and "clip_norm" in str(error.value)
