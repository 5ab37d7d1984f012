"""Every implementation of linear_cross_entropy against float64: values and gradients, at awkward sizes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import chunked, cpu, statistics
from pallas_kernels.linear_cross_entropy.api import weighted_linear_cross_entropy
from pallas_kernels.linear_cross_entropy.problem import Tiling
from tests.pallas_kernels.support import IMPLEMENTATIONS, on
from tests.support import quick_jit

SMALL = Tiling(128, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    columns: int
    temperature: float = 1.0
    valid: int | None = None
    transpose: bool = False


CASES = {
    "a tile": Case(128, 8, 128),
    "one token": Case(1, 5, 300, temperature=0.6),
    "one column": Case(3, 4, 1),
    "primes": Case(131, 7, 257, temperature=1.7, transpose=True),
    "over a tile": Case(129, 16, 385, valid=200),
    "padding beyond tiles": Case(17, 3, 500, temperature=0.3, valid=128, transpose=True),
    "one real column": Case(5, 3, 140, valid=1),
}
QUICK = ("primes", "over a tile")


def inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Float64 values that float32 holds, logits of about one; some targets are no columns."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(case.tokens, case.width)).astype(np.float32)
    head = (rng.normal(size=(case.width, case.columns)) / case.width**0.5).astype(np.float32)
    targets = rng.integers(0, case.columns, case.tokens)
    targets[::7] = rng.choice([0, -1, -100, case.columns, (case.valid or case.columns) - 1], targets[::7].shape)
    return hidden.astype(np.float64), head.astype(np.float64), targets


def expected(case: Case, hidden, head, targets, dloss, dentropy):
    """Loss, entropy, and the gradients of sum(loss * dloss + entropy * dentropy), in float64."""
    valid = case.columns if case.valid is None else case.valid
    z = hidden @ head[:, :valid] / case.temperature
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p, known = np.exp(log_p), (targets >= 0) & (targets < valid)
    one_hot = (np.arange(valid) == targets[:, None]).astype(float)
    loss, entropy = -(one_hot * log_p).sum(1), -(p * log_p).sum(1)
    dz = (dloss * known)[:, None] * (p - one_hot) - dentropy[:, None] * p * (log_p + entropy[:, None])
    dz = np.pad(dz / case.temperature, ((0, 0), (0, case.columns - valid)))
    return loss, entropy, dz @ head.T, hidden.T @ dz


def computed(case: Case, implementation: str, arrays, dloss, dentropy, dtype=jnp.float32):
    hidden, head, targets = arrays

    def op(hidden, head):
        return linear_cross_entropy(
            hidden, head, jnp.asarray(targets), temperature=case.temperature, valid_vocab=case.valid, tiling=SMALL,
            return_entropy=True, transpose_head=case.transpose, implementation=implementation,
        )  # fmt: skip

    @quick_jit
    def with_gradients(hidden, head, *cotangents):
        out, pull = jax.vjp(op, hidden, head)
        return *out, *pull(cotangents)

    given = (hidden, head.T if case.transpose else head)
    with on(implementation):
        out = with_gradients(*(jnp.asarray(x, dtype) for x in given), *map(jnp.float32, (dloss, dentropy)))
    *out, dhead = jax.tree.map(np.asarray, out)
    return *out, dhead.T if case.transpose else dhead


def assert_close(got, want, relative: float, terms: float = 1.0) -> None:
    """Within a share of the largest value, or of the size of the terms: where they cancel, rounding stays."""
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * max(terms, np.abs(want).max()))


def check(case: Case, implementation: str, seed: int) -> None:
    arrays = inputs(case, seed)
    dloss, dentropy = np.random.default_rng(seed + 1).normal(size=(2, case.tokens))
    got = computed(case, implementation, arrays, dloss, dentropy)
    sizes = [1.0] * 4
    if implementation == "tpu" and case.temperature < 1:
        # kernel and backward pass sum a logit in two orders: their difference stays where a probability is 1
        size = 1 / case.temperature  # of logits, and of what gradients are sums of: dhead over the tokens
        sizes = [size, size, size, size * case.tokens**0.5]
    for value, want, terms in zip(got, expected(case, *arrays, dloss, dentropy), sizes):
        assert value.dtype == np.float32
        assert_close(value, want, 5e-6, terms)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_values_and_gradients(case: str, implementation: str) -> None:
    check(CASES[case], implementation, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "cpu", "tpu"])
def test_random_shapes(implementation: str) -> None:
    sizes = st.sampled_from([1, 2, 3, 127, 128, 129, 131, 257])

    @settings(max_examples=3 if implementation == "tpu" else 6, deadline=None, derandomize=True)
    @given(
        sizes, st.sampled_from([1, 3, 16, 130]), sizes, st.sampled_from([0.25, 1.0, 3.0]), st.floats(0, 1),
        st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def run(tokens, width, columns, temperature, share, transpose, seed):
        valid = max(1, round(share * columns))
        check(Case(tokens, width, columns, temperature, valid, transpose), implementation, seed)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_chunks_with_a_rest(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 columns, of which the last has 45."""
    small = {f.__name__: functools.partial(f, most_logits=1) for f in (chunked.forward, chunked.backward)}
    monkeypatch.setitem(statistics._FORWARD, "cpu", small["forward"])
    monkeypatch.setitem(statistics._BACKWARD, "cpu", small["backward"])
    monkeypatch.setitem(statistics._BACKWARD, "tpu", small["backward"])
    check(Case(9, 6, 301, temperature=0.8), implementation, seed=3)


@pytest.mark.parametrize(("columns", "most", "size"), [(151552, 160 << 7, 18944), (301, 1, 128), (100, 1, 100)])
def test_chunks_are_alike_where_there_is_a_way(columns: int, most: int, size: int) -> None:
    assert chunked.chunk_columns(1, columns, most) == size


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """Loss and entropy are float32 numbers of bfloat16 factors; gradients are as good as bfloat16 is."""
    case = Case(37, 64, 300, valid=290, transpose=True)
    hidden, head, targets = inputs(case)
    hidden, head = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, head))
    dloss, dentropy = np.random.default_rng(1).normal(size=(2, case.tokens))
    got = computed(case, implementation, (hidden, head, targets), dloss, dentropy, jnp.bfloat16)
    want = expected(case, hidden, head, targets, dloss, dentropy)
    assert [x.dtype for x in got] == [np.float32, np.float32, jnp.bfloat16, jnp.bfloat16]
    for value, right, bound in zip(got, want, (5e-6, 5e-6, 8e-3, 8e-3)):
        assert_close(value, right, bound)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_head_in_another_dtype_keeps_its_gradient(implementation: str) -> None:
    """Master weights in float32 take part as bfloat16, and their gradient isn't rounded to it."""
    hidden, head, targets = (jnp.asarray(x) for x in inputs(Case(20, 8, 130)))
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.float32)

    def loss(head):
        return linear_cross_entropy(hidden, head, targets, implementation=implementation, tiling=SMALL).sum()

    with on(implementation):
        value, gradient = quick_jit(jax.value_and_grad(loss))(head)
        rounded, _ = quick_jit(jax.value_and_grad(loss))(head.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.float32 and (gradient != gradient.astype(jnp.bfloat16)).any()
    assert value == rounded


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits(implementation: str) -> None:
    """Logits of plus and minus 1e4: no overflow, the loss of the certain token 0, the entropy 0."""
    hidden = jnp.ones((2, 1))
    head = jnp.linspace(-1e4, 1e4, 200)[None]
    op = functools.partial(linear_cross_entropy, return_entropy=True, implementation=implementation, tiling=SMALL)
    with on(implementation):
        loss, entropy = quick_jit(op)(hidden, head, jnp.array([199, 0]))
    np.testing.assert_allclose(loss, [0, 2e4], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(entropy, [0, 0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_that_are_no_columns(implementation: str) -> None:
    """No loss and no gradient from them, but an entropy."""
    hidden, head, _ = (jnp.asarray(x, jnp.float32) for x in inputs(Case(4, 6, 140)))
    targets = jnp.array([-1, 140, 130, 3])

    def op(hidden):
        return linear_cross_entropy(
            hidden, head, targets, valid_vocab=130, return_entropy=True, implementation=implementation, tiling=SMALL
        )

    @quick_jit
    def with_gradient(hidden):
        out, pull = jax.vjp(op, hidden)
        return *out, *pull((jnp.ones(4), jnp.zeros(4)))

    with on(implementation):
        loss, entropy, gradient = with_gradient(hidden)
    assert (loss[:3] == 0).all() and loss[3] > 0 and (entropy > 0).all()
    assert (gradient[:3] == 0).all() and (gradient[3] != 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["primes", pytest.param("over a tile", marks=pytest.mark.slow)])
def test_weighted_sum(case: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MOST_LOGITS", 50 * CASES[case].columns)  # several chunks of tokens
    arrays, c = inputs(CASES[case]), CASES[case]
    weights = np.random.default_rng(1).normal(size=c.tokens)

    def op(hidden, head):
        return 3 * weighted_linear_cross_entropy(
            hidden, head, jnp.asarray(arrays[2]), jnp.float32(weights), temperature=c.temperature, tiling=SMALL,
            valid_vocab=c.valid, transpose_head=c.transpose, implementation=implementation,
        )  # fmt: skip

    given = [jnp.float32(x) for x in (arrays[0], arrays[1].T if c.transpose else arrays[1])]
    with on(implementation):
        alone = quick_jit(op)(*given)
        total, (dhidden, dhead) = quick_jit(jax.value_and_grad(op, argnums=(0, 1)))(*given)
    loss, _, *want = expected(c, *arrays, 3 * weights, np.zeros(c.tokens))
    assert_close(total, 3 * (weights * loss).sum(), 5e-6)
    assert_close(alone, 3 * (weights * loss).sum(), 5e-6)
    for value, right in zip((dhidden, dhead.T if c.transpose else dhead), want):
        assert_close(value, right, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_and_remat(implementation: str) -> None:
    hidden, head, targets = (jnp.asarray(x) for x in inputs(Case(6, 4, 130)))
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)

    def loss(hidden, targets):
        return linear_cross_entropy(hidden, head, targets, implementation=implementation, tiling=SMALL).sum()

    # the interpreter's effects cannot be recomputed; nothing else of a kernel stands against it
    again = loss if implementation == "tpu" else jax.checkpoint(loss)
    halves = hidden.reshape(2, 3, 4), targets.reshape(2, 3)
    with on(implementation):
        mapped = quick_jit(jax.vmap(jax.value_and_grad(again)))(*halves)
        value, gradient = quick_jit(jax.value_and_grad(loss))(hidden, targets)
    np.testing.assert_allclose(mapped[0].sum(), value, rtol=1e-6)
    np.testing.assert_allclose(mapped[1].reshape(6, 4), gradient, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "tpu"])
def test_no_tokens(implementation: str) -> None:
    hidden, head, targets = jnp.zeros((0, 3)), jnp.ones((3, 5)), jnp.zeros(0, int)
    loss, entropy = linear_cross_entropy(hidden, head, targets, return_entropy=True, implementation=implementation)
    assert loss.shape == entropy.shape == (0,)
    total, gradient = jax.value_and_grad(
        lambda head: weighted_linear_cross_entropy(hidden, head, targets, jnp.zeros(0), implementation=implementation)
    )(head)
    assert total == 0 and (gradient == 0).all()


@pytest.mark.slow
def test_the_portable_forms_never_hold_all_logits() -> None:
    """Temporary bytes of the compiled gradient: 64 MiB of logits at a time, far below all of them."""
    tokens, width, columns = 2048, 16, 65536
    shapes = jnp.zeros((tokens, width)), jnp.zeros((columns, width)), jnp.zeros(tokens, int)
    for op in (linear_cross_entropy, functools.partial(weighted_linear_cross_entropy, weights=jnp.ones(tokens))):
        total = lambda *args, op=op: op(*args, transpose_head=True, implementation="cpu").sum()  # noqa: E731
        compiled = quick_jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * columns / 2


BAD = {
    "don't fit": {"head": jnp.zeros((5, 4))},
    "one integer each": {"targets": jnp.zeros(3, int)},
    "targets float32": {"targets": jnp.zeros(2)},
    "valid_vocab 6 of a head with 5": {"valid_vocab": 6},
    "valid_vocab 0": {"valid_vocab": 0},
    "temperature is 0": {"temperature": 0.0},
    "multiples of 128": {"tiling": Tiling(100, 128)},
    "no chip is called 'v0'": {"chip": "v0"},
    "no implementation is called fast": {"implementation": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused(message: str) -> None:
    good = {"hidden": jnp.zeros((2, 4)), "head": jnp.zeros((4, 5)), "targets": jnp.zeros(2, int)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**good | BAD[message])
