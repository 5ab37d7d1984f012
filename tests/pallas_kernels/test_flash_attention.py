"""Every implementation of flash_attention against float64: values and gradients, at awkward sizes and masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention
from pallas_kernels.chip import CHIPS
from pallas_kernels.flash_attention import cpu
from pallas_kernels.flash_attention.problem import SEES_NOTHING, Tiling
from pallas_kernels.flash_attention.ranges import key_ranges
from pallas_kernels.flash_attention.tiling import Shape, backward_bytes, choose, forward_bytes
from tests.pallas_kernels.support import IMPLEMENTATIONS, on
from tests.support import quick_jit

SMALL = Tiling(block_q=128, block_kv=128, resident=128, rows=128)


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    batch: int = 1
    causal: bool = True
    q_offset: int = 0
    segments: str = ""  # "packed": in order; "mixed": in none
    scale: float | None = None
    tiling: Tiling | None = SMALL


CASES = {
    "a tile": Case(128, 128),
    "one query": Case(1, 1),
    "one query at the end": Case(1, 130, q_offset=129),
    "groups, over a tile": Case(129, 129, heads=6, kv_heads=2, batch=2),
    "several pieces of keys": Case(300, 300, tiling=Tiling(128, 128, 256, 64)),
    "queries later": Case(140, 260, q_offset=120),
    "queries before all keys": Case(260, 140, q_offset=-150),
    "not causal": Case(150, 260, causal=False, scale=-0.7),
    "packed": Case(270, 270, segments="packed", batch=2),
    "mixed ids": Case(130, 200, segments="mixed", causal=False),
    "packed, later": Case(40, 257, segments="packed", q_offset=200, tiling=Tiling(32, 128, 128, 16)),
    "chosen tiles": Case(37, 37, heads=3, kv_heads=3, segments="packed", tiling=None),
}
FAST = ("one query at the end", "groups, over a tile", "queries before all keys", "mixed ids")


def inputs(case: Case, seed: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """q, k, v, dout, dlse in float64 that float32 holds; segment ids."""
    rng = np.random.default_rng(seed)
    c = case
    q_shape = (c.batch, c.queries, c.heads, c.head_dim)
    kv_shape = (c.batch, c.keys, c.kv_heads, c.head_dim)
    arrays = [rng.normal(size=shape) for shape in (q_shape, kv_shape, kv_shape, q_shape, q_shape[:-1])]
    segments = {}
    if c.segments:
        ids = [rng.integers(-1, 3, (c.batch, n)) for n in (c.queries, c.keys)]
        if c.segments == "packed":
            ids = [np.sort(x, axis=1) for x in ids]
        if c.queries == c.keys:
            ids = ids[:1]
        segments = dict(zip(("segment_ids", "kv_segment_ids"), ids))
    return [x.astype(np.float32).astype(np.float64) for x in arrays], segments


def expected(case: Case, q, k, v, dout, dlse, segments: dict[str, np.ndarray]) -> list[np.ndarray]:
    """out, lse, dq, dk, dv in float64."""
    groups, scale = case.heads // case.kv_heads, case.scale or case.head_dim**-0.5
    keys, values = (np.repeat(x, groups, axis=2) for x in (k, v))
    seen = np.ones((1, case.queries, case.keys), bool)
    if case.causal:
        seen = (np.arange(case.keys) <= np.arange(case.queries)[:, None] + case.q_offset)[None]
    if segments:
        ids, *kv_ids = segments.values()
        seen = seen & (ids[:, :, None] == (kv_ids[0] if kv_ids else ids)[:, None])
    seen = np.broadcast_to(seen, (case.batch, case.queries, case.keys))[:, None]
    scores = np.where(seen, scale * np.einsum("bshd,bthd->bhst", q, keys), -np.inf)
    largest = np.max(scores, axis=-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    some = np.where(total > 0, total, 1)
    lse = np.where(total > 0, largest + np.log(some), SEES_NOTHING)[..., 0]
    weights = weights / some
    out = np.einsum("bhst,bthd->bshd", weights, values)
    dweights = np.einsum("bshd,bthd->bhst", dout, values)
    delta = (weights * dweights).sum(-1, keepdims=True) - dlse.swapaxes(1, 2)[..., None]
    dscores = scale * weights * (dweights - delta)
    dq = np.einsum("bhst,bthd->bshd", dscores, keys)
    shared = lambda x: x.reshape(*x.shape[:2], case.kv_heads, groups, -1).sum(3)  # noqa: E731
    dk, dv = (shared(np.einsum("bhst,bshd->bthd", a, b)) for a, b in ((dscores, q), (weights, dout)))
    return [out, lse.swapaxes(1, 2), dq, dk, dv]


def options(case: Case, segments: dict[str, np.ndarray], implementation: str) -> dict[str, Any]:
    return dict(
        causal=case.causal, scale=case.scale, return_lse=True, implementation=implementation, tiling=case.tiling,
        **{name: jnp.asarray(ids) for name, ids in segments.items()},
    )  # fmt: skip


def computed(case: Case, implementation: str, arrays, segments, dtype: Any = jnp.float32, traced: bool = False):
    told = options(case, segments, implementation)

    @quick_jit
    def with_gradients(q_offset, q, k, v, *cotangents):
        offset = q_offset if traced else case.q_offset
        out, pull = jax.vjp(lambda *x: flash_attention(*x, q_offset=offset, **told), q, k, v)
        return *out, *pull(cotangents)

    q, k, v, dout = (jnp.asarray(x, dtype) for x in arrays[:4])
    with on(implementation):
        out = with_gradients(jnp.int32(case.q_offset), q, k, v, dout, jnp.float32(arrays[4]))
        return jax.tree.map(np.asarray, out)


def assert_close(got, want, relative: float) -> None:
    """Within a share of the largest value; a log-sum-exp of nothing is no value."""
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    nothing = want == SEES_NOTHING
    assert np.array_equal(got == np.float32(SEES_NOTHING), nothing)
    got, want = (np.where(nothing, 0, x) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * max(1, np.abs(want).max()))


def check(case: Case, implementation: str, seed: int = 0, traced: bool = False) -> None:
    arrays, segments = inputs(case, seed)
    got = computed(case, implementation, arrays, segments, traced=traced)
    for value, want in zip(got, expected(case, *arrays, segments), strict=True):
        assert value.dtype == np.float32
        assert_close(value, want, 3e-6)


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in CASES])
def test_values_and_gradients(case: str, implementation: str) -> None:
    check(CASES[case], implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "cpu", "tpu"])
@pytest.mark.parametrize("case", ["queries later", "several pieces of keys"])
def test_a_place_known_only_at_run_time(case: str, implementation: str) -> None:
    check(CASES[case], implementation, traced=True)


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "examples"), [("reference", 8), ("cpu", 8), ("tpu", 5)])
def test_random_shapes(implementation: str, examples: int) -> None:
    sizes = st.sampled_from([1, 2, 17, 127, 128, 129, 131, 257])

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        sizes, sizes, st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]), st.sampled_from([1, 5, 64, 130]),
        st.booleans(), st.integers(-140, 260), st.sampled_from(["", "packed", "mixed"]), st.integers(0, 99),
    )  # fmt: skip
    def run(queries, keys, heads, head_dim, causal, q_offset, segments, seed):
        check(Case(queries, keys, *heads, head_dim, 1, causal, q_offset, segments), implementation, seed)

    run()


@pytest.mark.parametrize("path", ["unrolled", "a loop"])
def test_chunks_on_cpu(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks divide neither the length nor the segments."""
    if path == "a loop":
        monkeypatch.setattr(cpu, "_SCORE_BYTES", 1 << 16)
    case = Case(300, 300, heads=4, kv_heads=2, batch=2, segments="packed")
    chunk = cpu._chunk(2 * 4, 300, 300)
    assert 8 * chunk < 300 if path == "a loop" else 128 <= chunk < 300
    check(case, "cpu")


def test_the_portable_program_does_not_grow_with_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SCORE_BYTES", 1 << 16)

    def size(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, heads, length, 8), jnp.float32) for heads in (4, 2))
        op = lambda q, k: flash_attention(q, k, k, heads_first=True, implementation="cpu")  # noqa: E731
        return str(jax.make_jaxpr(op)(q, k)).count(" = ")

    assert size(1024) == size(4096)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """As good as bfloat16 is; the log-sum-exp is a float32 number of bfloat16 factors."""
    case = Case(131, 131, heads=4, head_dim=64, segments="packed")
    arrays, segments = inputs(case)
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:4]] + arrays[4:]
    got = computed(case, implementation, arrays, segments, jnp.bfloat16)
    assert [x.dtype for x in got] == [jnp.bfloat16, np.float32, *[jnp.bfloat16] * 3]
    for value, want, bound in zip(got, expected(case, *arrays, segments), (8e-3, 3e-6, 1e-2, 1e-2, 1e-2)):
        assert_close(value, want, bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores(implementation: str) -> None:
    """Scores of plus and minus 1e4: no overflow; each query takes the value of the largest, that of its own place."""
    size = jnp.arange(1.0, 131)[None, :, None, None]
    told: dict[str, Any] = {"scale": 1.0, "return_lse": True, "tiling": SMALL, "implementation": implementation}
    with on(implementation):
        out, lse = quick_jit(lambda q, k: flash_attention(q, k, k, **told))(jnp.full((1, 130, 1, 1), 1e2), size)
    np.testing.assert_allclose(out, size, rtol=1e-6)
    np.testing.assert_allclose(lse, 1e2 * size[..., 0], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_of_the_keys_combine(implementation: str) -> None:
    """Context parallelism: two pieces put together by their log-sum-exp are the whole, gradients too."""
    case = Case(130, 130, tiling=SMALL)
    (q, k, v, dout, _), _ = inputs(case)
    q, k, v, dout = (jnp.asarray(x, jnp.float32) for x in (q, k, v, dout))
    op = lambda *args, **more: flash_attention(*args, implementation=implementation, tiling=SMALL, **more)  # noqa: E731

    def pieces(q, k, v):
        (a, a_lse), (b, b_lse) = (
            op(q, k[:, cut], v[:, cut], q_offset=-start, return_lse=True)
            for cut, start in ((slice(0, 50), 0), (slice(50, 130), 50))
        )
        lse = jnp.logaddexp(a_lse, b_lse)
        return a * jnp.exp(a_lse - lse)[..., None] + b * jnp.exp(b_lse - lse)[..., None]

    def with_gradients(function, q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    with on(implementation):
        want, got = (quick_jit(with_gradients, static_argnums=0)(function, q, k, v, dout) for function in (op, pieces))
    for value, right in zip(got, want):
        np.testing.assert_allclose(value, right, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_first_is_the_same(implementation: str) -> None:
    case = Case(20, 20, heads=4, kv_heads=2)
    (q, k, v, *_), _ = inputs(case)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    with on(implementation):
        told: dict[str, Any] = {"return_lse": True, "implementation": implementation}
        out, lse = quick_jit(lambda *x: flash_attention(*x, **told))(q, k, v)
        turned = [x.swapaxes(1, 2) for x in (q, k, v)]
        first = quick_jit(lambda *x: flash_attention(*x, heads_first=True, **told))(*turned)
    for value, right in zip(first, (out, lse)):
        np.testing.assert_array_equal(value.swapaxes(1, 2), right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_scan_and_remat(implementation: str) -> None:
    case = Case(20, 20, batch=2)
    (q, k, v, *_), _ = inputs(case)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))

    def loss(q, k, v):
        return (flash_attention(q, k, v, implementation=implementation) ** 2).sum()

    one_by_one = tuple(x[:, None] for x in (q, k, v))
    with on(implementation):
        value, gradients = quick_jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
        scanned = quick_jit(lambda *x: jax.lax.scan(lambda c, x: (c + loss(*x), None), 0.0, x)[0])(*one_by_one)
        # the interpreter does not know remat; test_aot.py compiles it
        one = loss if implementation == "tpu" else jax.checkpoint(loss)
        mapped, mapped_gradients = quick_jit(jax.vmap(jax.value_and_grad(one, (0, 1, 2))))(*one_by_one)
    np.testing.assert_allclose(scanned, value, rtol=1e-6)
    np.testing.assert_allclose(mapped.sum(), value, rtol=1e-6)
    for a, b in zip(mapped_gradients, gradients):
        np.testing.assert_allclose(a[:, 0], b, atol=1e-6)


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", ["queries", "offsets", "segments"])
def test_what_is_mapped_over_part_of_the_arguments(mapped: str, implementation: str) -> None:
    """Three calls in one: of other queries to the same keys, at other offsets, with other segments."""
    (q, k, v, *_), _ = inputs(Case(20, 40, batch=2))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 2, 40)), jnp.int32)
    arguments = {"queries": jnp.stack([q, 2 * q, -q]), "offsets": jnp.array([20, 3, 0], jnp.int32), "segments": ids}

    def attend(x):
        queries = x if mapped == "queries" else q
        options = {"q_offset": x} if mapped == "offsets" else {"q_offset": 20}
        if mapped == "segments":
            options |= {"segment_ids": x[:, 20:], "kv_segment_ids": x}
        return flash_attention(queries, k, v, return_lse=True, implementation=implementation, **options)

    with on(implementation):
        found = quick_jit(jax.vmap(attend))(arguments[mapped])
        right = [quick_jit(attend)(x) for x in arguments[mapped]]
    for a, b in zip(found, zip(*right)):
        np.testing.assert_allclose(a, jnp.stack(b), atol=1e-6)


def test_what_waits_for_the_backward_pass_can_be_kept() -> None:
    """A policy that saves "kept" runs the forward pass once; one that saves nothing runs it again."""
    (q, k, v, *_), _ = inputs(Case(16, 16))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    op = lambda q, k, v: flash_attention(q, k, v, implementation="cpu").sum()  # noqa: E731

    def exponentials(policy) -> int:
        return count(jax.make_jaxpr(jax.grad(jax.checkpoint(op, policy=policy)))(q, k, v))

    def count(jaxpr) -> int:  # printed, a function that is called twice stands there once
        has_equations = lambda x: hasattr(x, "eqns")  # noqa: E731
        params = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=has_equations)]
        own = sum(eqn.primitive.name == "exp" for eqn in jaxpr.eqns)
        return own + sum(count(x) for x in params if has_equations(x))

    names = jax.checkpoint_policies.save_only_these_names
    assert exponentials(names("kept")) < exponentials(names("other"))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "cpu", "tpu"])
def test_inside_a_checked_shard_map(implementation: str) -> None:
    case = Case(140, 140, tiling=SMALL)
    (q, k, v, *_), _ = inputs(case)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(q, k, v):
        return flash_attention(q, k, v, implementation=implementation, tiling=SMALL).sum()[None]

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    with on(implementation):
        got = quick_jit(jax.grad(lambda *x: mapped(*x).sum(), (0, 1, 2)))(q, k, v)
        want = quick_jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2)))(q, k, v)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["reference", "cpu", "tpu"])
def test_nothing_to_attend(implementation: str) -> None:
    zeros = lambda *shape: jnp.zeros(shape)  # noqa: E731
    out, lse = flash_attention(
        zeros(1, 0, 2, 4), zeros(1, 3, 1, 4), zeros(1, 3, 1, 4), return_lse=True, implementation=implementation
    )
    assert out.shape == (1, 0, 2, 4) and lse.shape == (1, 0, 2)
    out, lse = flash_attention(
        jnp.ones((1, 2, 2, 4)), zeros(1, 0, 1, 4), zeros(1, 0, 1, 4), return_lse=True, implementation=implementation
    )
    assert (out == 0).all() and (lse == SEES_NOTHING).all()


# --- which blocks meet, and tilings ----------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("segments", ["", "packed", "mixed"])
@pytest.mark.parametrize("causal", [True, False])
def test_ranges_hold_all_that_is_seen_and_mask_all_that_is_not(causal: bool, segments: str) -> None:
    rng = np.random.default_rng(0)
    for q_offset in (-100, -1, 0, 31, 400):
        case = Case(130, 210, causal=causal, q_offset=q_offset, segments=segments, batch=2)
        _, ids = inputs(case, int(rng.integers(99)))
        pair = tuple(jnp.asarray(x) for x in ids.values()) or None
        got = np.asarray(key_ranges(130, 210, 32, 16, causal=causal, q_offset=jnp.int32(q_offset), segments=pair))
        seen = np.ones((len(got), 130, 210), bool)
        if causal:
            seen &= np.arange(210) <= np.arange(130)[:, None] + q_offset
        if segments:
            seen &= ids["segment_ids"][:, :, None] == ids["kv_segment_ids"][:, None]
        for b, i in np.ndindex(got.shape[:2]):
            first, full_first, full_end, end = got[b, i]
            assert first <= full_first <= full_end <= end
            rows = seen[b, i * 32 : i * 32 + 32]
            assert not rows[:, : first * 16].any() and not rows[:, end * 16 :].any()
            assert rows[:, full_first * 16 : full_end * 16].all() and full_end * 16 <= 210
            if not segments:
                whole = [rows[:, j * 16 : j * 16 + 16].all() for j in range(first, min(end, 210 // 16))]
                assert sum(whole) == full_end - full_first and (first == end or rows[:, (end - 1) * 16 :].any())


@pytest.mark.parametrize(
    "chip", [chip for chip in CHIPS.values() if chip.platform == "tpu"], ids=lambda chip: chip.name
)
def test_chosen_tilings_fit(chip) -> None:
    for groups in (1, 2, 5, 8, 12, 16):
        for length in (1, 100, 4096, 5000, 131072):
            for head_dim, dtype in ((64, jnp.bfloat16), (128, jnp.bfloat16), (128, jnp.float32), (256, jnp.bfloat16)):
                if groups * head_dim > 16 * 128:
                    continue  # too much for the smallest
                shape = Shape(groups, length, length, head_dim, dtype)
                for asked in (forward_bytes, backward_bytes):
                    tiling = choose(chip, shape, asked)
                    assert asked(tiling, shape) <= 0.9 * chip.on_chip_bytes
                    assert tiling.resident % tiling.block_kv == 0 and tiling.block_q % tiling.rows == 0
                    assert tiling.block_q % 128 == 0 or tiling.block_q >= length


BAD = {
    "don't fit": {"k": jnp.zeros((1, 3, 1, 8))},
    "2 query heads can't share 3": {"k": jnp.zeros((1, 2, 3, 4)), "v": jnp.zeros((1, 2, 3, 4))},
    "expected bfloat16 or float32": {"q": jnp.zeros((1, 2, 2, 4), jnp.bfloat16)},
    "give kv_segment_ids": {
        "segment_ids": jnp.zeros((1, 2), int),
        "k": jnp.zeros((1, 3, 1, 4)),
        "v": jnp.zeros((1, 3, 1, 4)),
    },
    "those of the queries, are not": {"kv_segment_ids": jnp.zeros((1, 2), int)},
    "expected integers": {"segment_ids": jnp.zeros((1, 2))},
    "resident of block_kv": {"tiling": Tiling(128, 128, 200, 128)},
    "no chip is called 'v0'": {"chip": "v0"},
    "no implementation is called fast": {"implementation": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused(message: str) -> None:
    good = {"q": jnp.zeros((1, 2, 2, 4)), "k": jnp.zeros((1, 2, 1, 4)), "v": jnp.zeros((1, 2, 1, 4))}
    with pytest.raises(ValueError, match=message):
        flash_attention(**good | BAD[message])
