"""FLOPs, bytes and activations of one device from the jaxpr: loops, branches, shard_map, kernels, by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from glm45_jax.plan.count import count
from pallas_kernels import flash_attention, grouped_matmul
from pallas_kernels.analysis.traffic import described

N = 256
ONE = 2.0 * N**3  # FLOPs of a product of two [N, N]


def counted(f, *args, platform="tpu", devices=1, values=None):
    return count(jax.make_jaxpr(f)(*args), values or [None] * len(jax.tree.leaves(args)), platform, devices)


def square(*lead: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*lead, N, N), dtype)


def test_loops_are_counted_with_their_rounds() -> None:
    def f(x, w):
        x = jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]
        return jax.lax.fori_loop(0, 3, lambda _, c: jax.lax.fori_loop(0, 2, lambda _, c: c @ c, c), x)

    assert counted(f, square(), square(7)).xla_flops == (7 + 3 * 2) * ONE


def test_a_while_loop_whose_ends_are_known() -> None:
    def f(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 2, c[1] @ c[1]), (1, x))[1]

    n = jax.ShapeDtypeStruct((), jnp.int32)
    known = counted(f, square(), n, values=[None, np.int32(10)])
    assert known.xla_flops == 5 * ONE  # 1, 3, 5, 7, 9
    assert not known.notes
    unknown = counted(f, square(), n)
    assert unknown.xla_flops == ONE
    assert any("ends by its data" in note for note in unknown.notes)


def test_the_dearest_branch_counts_and_the_platforms_own() -> None:
    dear, cheap = (lambda x: x @ x @ x), (lambda x: x @ x)
    assert counted(lambda x, p: jax.lax.cond(p, cheap, dear, x), square(), True).xla_flops == 2 * ONE
    of_platform = lambda x: jax.lax.platform_dependent(x, tpu=dear, cpu=cheap, default=lambda x: x)  # noqa: E731
    flops = [counted(of_platform, square(), platform=p).xla_flops for p in ("tpu", "cpu", "cuda")]
    assert flops == [2 * ONE, ONE, 0]


def test_what_is_recomputed_counts() -> None:
    layer = lambda x: jnp.sin(x @ x)  # noqa: E731
    grad = lambda f: counted(jax.value_and_grad(lambda x: f(x).sum()), square()).xla_flops  # noqa: E731
    assert grad(layer) == 3 * ONE
    assert grad(lambda x: layer(layer(x))) == 6 * ONE
    assert grad(jax.checkpoint(lambda x: layer(layer(x)))) == 8 * ONE


def test_ragged_products() -> None:
    x, w = jax.ShapeDtypeStruct((N, N), jnp.float32), jax.ShapeDtypeStruct((4, N, N), jnp.float32)
    sizes = np.full(4, N // 8, np.int32)
    f = lambda x, w, sizes: jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1](x)  # noqa: E731
    args = x, w, jax.ShapeDtypeStruct((4,), jnp.int32)
    assert counted(f, *args, values=[None, None, sizes]).xla_flops == 2 * ONE / 2  # half of the rows are in a group
    assert counted(f, *args).xla_flops == 2 * ONE
    assert counted(jax.lax.ragged_dot, *args).xla_flops == ONE


def test_inside_shard_map_a_device_counts_and_outside_its_share() -> None:
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)

    def f(x, w):
        inside = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
        return inside(x, w) @ w

    assert counted(f, square(), square(), devices=8).xla_flops == ONE / 4 + ONE / 8


def test_activations_are_what_one_loop_leaves_for_another() -> None:
    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.sin(c @ w), None)), x, w)[0].sum()

    saved = counted(jax.grad(loss), square(5), square()).saved_bytes
    assert saved == 5 * N * N * 4  # each layer's input; not the gradients, which nothing goes through


def test_flash_attention_counts_the_causal_half_and_grouped_matmul_the_rows_that_there_are() -> None:
    q = jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.bfloat16)
    with described("v5p"):
        attention = counted(flash_attention, q, q, q)
    full = 4.0 * 128 * 4096**2
    assert 0.5 <= attention.kernel_flops / full <= 0.75  # and the blocks on the diagonal
    assert set(attention.kernels) == {"flash_attention_forward"}

    rows, experts = 4096, 8
    lhs, rhs = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16), jax.ShapeDtypeStruct((experts, 512, 256), jnp.bfloat16)
    groups = jax.ShapeDtypeStruct((experts,), jnp.int32)
    sizes = np.full(experts, 128, np.int32)  # a quarter of the buffer
    with described("v5p"):
        some = counted(grouped_matmul, lhs, rhs, groups, values=[None, None, sizes])
        unknown = counted(grouped_matmul, lhs, rhs, groups)
    assert some.kernel_flops == 2.0 * 1024 * 512 * 256
    assert unknown.kernel_flops == 0
    assert any("not counted: grouped_matmul" in note for note in unknown.notes)


def test_routing_is_taken_to_be_balanced_through_collectives_and_layers() -> None:
    """Each of 4 devices routes 128 tokens of 2 choices to 8 experts, two of which are its own: 256 rows arrive."""
    device = AbstractDevice("TPU v5", 2, "tpu")
    mesh = AbstractMesh((4,), ("expert",), (AxisType.Auto,), abstract_device=device)

    def layer(x, w):
        _, chosen = jax.lax.top_k(x @ jnp.ones((512, 8), x.dtype), 2)
        sizes = jnp.bincount(chosen.reshape(-1), length=8).astype(jnp.int32)
        mine = jax.lax.all_to_all(sizes.reshape(4, 2), "expert", 0, 0).sum(0)
        rows = jnp.tile(x, (8, 1))  # room for the worst case
        return grouped_matmul(rows, w, mine)[:128], None

    def f(x, w):
        body = lambda x, w: jax.lax.scan(layer, x, w)[0]  # noqa: E731
        specs = (P("expert"), P(None, "expert"))
        return jax.shard_map(body, in_specs=specs, out_specs=specs[0], check_vma=False)(x, w)

    x = jax.ShapeDtypeStruct((4 * 128, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, 8, 512, 512), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        counts = counted(f, x, w, devices=4)
    assert not counts.notes
    (kernel,) = counts.kernels.values()
    assert kernel.calls == 3
    assert kernel.flops == 3 * 2.0 * 256 * 512 * 512


@pytest.mark.parametrize("tiled", [True, False])
def test_alike_devices_answer_a_gather_with_copies(tiled: bool) -> None:
    from glm45_jax.plan.count import _gathered

    x = np.arange(6).reshape(2, 3)
    got = _gathered(x, 4, {"all_gather_dimension": 1, "tiled": tiled})
    inside = functools.partial(jax.lax.all_gather, axis_name="i", axis=1, tiled=tiled)
    np.testing.assert_array_equal(got, jax.vmap(inside, axis_name="i")(np.stack([x] * 4))[0])


def test_a_ragged_exchange_sends_the_rows_that_there_are() -> None:
    """Three rounds of a loop, of which the last has nothing to send."""

    def f(rows, sizes):
        def here(rows, sizes):
            def step(i, into):
                now = jnp.where(i < 2, sizes, 0)
                return jax.lax.ragged_all_to_all(rows, into, 0 * sizes, now, 0 * sizes, now, axis_name="expert")

            return jax.lax.fori_loop(0, jnp.maximum(3, sizes[0]), step, rows[:6] * 0)

        mesh = AbstractMesh((2,), ("expert",), (AxisType.Auto,))
        return jax.shard_map(here, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert"), check_vma=False)(
            rows, sizes
        )

    args = jax.ShapeDtypeStruct((20, 8), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    found = counted(f, *args, values=[None, np.array([2, 3], np.int32)])
    assert found.ragged_room == 3 * 6 * 8 * 2  # of 10 rows held and 6 places to land
    assert found.ragged_sent == 2 * 5 * 8 * 2
