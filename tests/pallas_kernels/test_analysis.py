"""The byte counter against bytes counted by hand, and against the copies that the interpreter performs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.analysis import UnknownValueError, count_traffic, performed_copies
from pallas_kernels.analysis.traffic import described

f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
KIB = 1024


def shape(*sizes: int, dtype=f32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def copy_kernel(x_ref, o_ref) -> None:
    o_ref[...] = x_ref[...]


def blocked(grid, in_map, out_map, block=(8, 128), out_shape=(32, 256), **options):
    return pl.pallas_call(
        copy_kernel,
        out_shape=shape(*out_shape),
        grid=grid,
        in_specs=[pl.BlockSpec(block, in_map)],
        out_specs=pl.BlockSpec(block, out_map),
        **options,
    )


def operands(traffic) -> dict:
    (kernel,) = traffic.kernels
    return {o.name: o for o in kernel.operands}


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_a_block_is_fetched_when_its_index_changes() -> None:
    """The operand's index follows the slow axis: fetched once in each row of the grid; the result's every step."""
    counted = operands(count_traffic(blocked((4, 2), lambda i, j: (i, 0), lambda i, j: (i, j)), shape(32, 128)))
    assert counted["x_ref"].fetches == 4 and counted["x_ref"].read_bytes == 4 * 4 * KIB
    assert counted["o_ref"].write_backs == 8 and counted["o_ref"].written_bytes == 8 * 4 * KIB
    assert counted["x_ref"].written_bytes == 0 and counted["o_ref"].read_bytes == 0


def test_a_block_that_is_left_and_entered_again_is_fetched_again() -> None:
    """The same blocks, indexed by the fast axis: fetched at every step, though there are only two of them."""
    counted = operands(count_traffic(blocked((4, 2), lambda i, j: (j, 0), lambda i, j: (i, j)), shape(16, 128)))
    assert counted["x_ref"].fetches == 8


def test_a_block_that_never_changes_is_fetched_once() -> None:
    counted = operands(count_traffic(blocked((4, 2), lambda i, j: (0, 0), lambda i, j: (0, 0)), shape(8, 128)))
    assert counted["x_ref"].fetches == 1 and counted["o_ref"].write_backs == 1


def test_only_what_lies_inside_the_array_counts() -> None:
    f = blocked((3, 2), lambda i, j: (i, j), lambda i, j: (i, j), out_shape=(20, 200))
    traffic = count_traffic(f, shape(20, 200))
    assert traffic.read_bytes == traffic.written_bytes == 20 * 200 * 4
    assert traffic.total_bytes == 2 * 20 * 200 * 4


@pytest.mark.parametrize(("dtype", "item"), [(bf16, 2), (jnp.int8, 1), (jnp.float8_e4m3fn, 1), (jnp.int4, 0.5)])
def test_bytes_of_an_element(dtype, item: float) -> None:
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    f = pl.pallas_call(kernel, out_shape=shape(64, 128, dtype=dtype))
    traffic = count_traffic(f, shape(64, 128, dtype=dtype))
    assert traffic.read_bytes == traffic.written_bytes == 64 * 128 * item


def test_squeezed_axes_and_operands_without_blocks() -> None:
    def kernel(x_ref, table_ref, scale_ref, o_ref):
        o_ref[...] = x_ref[...] * table_ref[0:1] * scale_ref[0]

    f = pl.pallas_call(
        kernel,
        out_shape=shape(4, 8, 128),
        grid=(4,),
        in_specs=[
            pl.BlockSpec((None, 8, 128), lambda i: (3 - i, 0, 0)),
            pl.BlockSpec(memory_space=pltpu.VMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=pl.BlockSpec((pl.Squeezed(), 8, 128), lambda i: (i, 0, 0)),
    )
    counted = operands(count_traffic(f, shape(4, 8, 128), shape(16, 128), shape(2)))
    assert counted["x_ref"].read_bytes == counted["o_ref"].written_bytes == 4 * 4 * KIB
    assert counted["table_ref"].read_bytes == 8 * KIB and counted["scale_ref"].read_bytes == 8


def test_an_aliased_operand_is_read_and_written() -> None:
    f = blocked((4, 2), lambda i, j: (i, j), lambda i, j: (i, j), input_output_aliases={0: 0})
    traffic = count_traffic(f, shape(32, 256))
    assert (traffic.read_bytes, traffic.written_bytes) == (32 * KIB, 32 * KIB)


def test_a_large_grid_is_counted_at_once() -> None:
    f = blocked((1000, 400), lambda i, j: (i, j), lambda i, j: (i, 0), out_shape=(8000, 128))
    (kernel,) = count_traffic(f, shape(8000, 400 * 128)).kernels
    assert kernel.steps == 400_000
    assert (kernel.read_bytes, kernel.written_bytes) == (400_000 * 4 * KIB, 1000 * 4 * KIB)


def test_an_empty_grid_moves_nothing() -> None:
    f = blocked((0, 2), lambda i, j: (i, j), lambda i, j: (i, j))
    assert count_traffic(f, shape(32, 256)).total_bytes == 0


# --- what is known ---------------------------------------------------------------------------------------------------


def gather_rows(ids: jax.Array, x: jax.Array, count=None) -> jax.Array:
    """Block i of the result is block ids[i] of x, for the first `count`."""

    def kernel(ids_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...]

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(ids.shape[0] if count is None else count,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, ids: (ids[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, ids: (i, 0)),
    )
    return pl.pallas_call(kernel, out_shape=shape(ids.shape[0] * 8, 128), grid_spec=grid_spec)(ids, x)


def test_prefetched_scalars_say_which_blocks() -> None:
    ids = np.array([3, 3, 3, 0, 1, 1], np.int32)
    counted = operands(count_traffic(gather_rows, ids, shape(32, 128)))
    assert counted["x_ref"].fetches == 3 and counted["x_ref"].read_bytes == 3 * 4 * KIB
    assert counted["ids_ref"].read_bytes == 6 * 4


def test_a_grid_whose_size_is_computed() -> None:
    """Scalars are followed through the program: sums, sorting, a loop, a jitted function."""

    @jax.jit
    def steer(sizes):
        order = jnp.argsort(sizes)
        total = jax.lax.fori_loop(0, 3, lambda i, n: n + sizes[i], 0)
        return jnp.repeat(order, 2, total_repeat_length=8).astype(i32), total

    def f(sizes, x):
        ids, count = steer(sizes)
        return gather_rows(ids, x, count)

    (kernel,) = count_traffic(f, np.array([3, 1, 2, 0], np.int32), shape(32, 128)).kernels
    assert kernel.grid == (6,)  # blocks 3 3 1 1 2 2
    assert kernel.operands[1].fetches == 3 and kernel.operands[2].write_backs == 6


@pytest.mark.parametrize("what", ["grid", "block"])
def test_what_has_to_be_known_and_is_not_is_an_error(what: str) -> None:
    ids = shape(6, dtype=i32)
    f = (lambda ids, x: gather_rows(ids, x, ids[0])) if what == "grid" else gather_rows
    with pytest.raises(UnknownValueError, match="were not given"):
        count_traffic(f, ids, shape(32, 128))


def test_the_platforms_branch_is_walked() -> None:
    def f(x):
        double = lambda x: x * 2  # noqa: E731
        return jax.lax.platform_dependent(x, tpu=pl.pallas_call(copy_kernel, out_shape=shape(8, 128)), default=double)

    assert len(count_traffic(f, shape(8, 128)).kernels) == 1
    assert len(count_traffic(f, shape(8, 128), platform="cpu").kernels) == 0


def test_kernels_inside_of_loops_gradients_and_shard_map() -> None:
    copy = pl.pallas_call(copy_kernel, out_shape=shape(8, 128))

    @jax.custom_vjp
    def op(x):
        return copy(x)

    op.defvjp(lambda x: (op(x), None), lambda _, g: (copy(copy(g)),))
    layers = lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(op)(x), None), x, None, length=5)[0].sum()  # noqa: E731
    assert len(count_traffic(layers, shape(8, 128)).kernels) == 5
    assert len(count_traffic(jax.value_and_grad(layers), shape(8, 128)).kernels) == 15  # one forward, two backward

    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(gather_rows, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False)
    (kernel,) = count_traffic(sharded, np.array([1, 1, 2, 3], np.int32), shape(32, 128)).kernels
    assert kernel.grid == (2,) and kernel.operands[1].fetches == 1  # the first device has the first two


def test_what_nobody_needs_does_not_count() -> None:
    """The gradient of an op whose backward pass needs no forward result, as the compiler would leave it."""
    copy = pl.pallas_call(copy_kernel, out_shape=shape(8, 128))

    @jax.custom_vjp
    def op(x):
        return copy(x)

    op.defvjp(lambda x: (op(x), None), lambda _, g: (copy(g),))
    gradient = lambda x, g: jax.vjp(jax.jit(lambda x: op(x * 2)), x)[1](g)[0]  # noqa: E731
    assert len(count_traffic(gradient, shape(8, 128), shape(8, 128)).kernels) == 1


def test_a_branch_that_nobody_knows_counts_as_taken() -> None:
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, pl.pallas_call(copy_kernel, out_shape=shape(8, 128)), lambda x: x, x)

    traffic = count_traffic(f, shape(8, 128))
    assert traffic.total_bytes == 8 * KIB and "upper bound" in traffic.notes[0]


def test_with_a_mesh_in_force() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.set_mesh(mesh):
        traffic = count_traffic(gather_rows, np.array([1, 1, 2], np.int32), shape(32, 128))
    assert operands(traffic)["x_ref"].fetches == 2


# --- copies of the kernel's own, and products ------------------------------------------------------------------------


def streamed(ids: jax.Array, x: jax.Array) -> jax.Array:
    """Copies x's blocks named by ids into VMEM, two buffers by turns; a negative id names none. The sum comes back."""

    def kernel(ids_ref, x_ref, o_ref, buffers, semaphores, turn):
        i = pl.program_id(0)

        @pl.when(i == 0)
        def _():
            turn[0] = 0
            o_ref[...] = jnp.zeros_like(o_ref)

        @pl.when(ids_ref[i] >= 0)
        def _():
            slot = turn[0] % 2
            copy = pltpu.make_async_copy(x_ref.at[ids_ref[i]], buffers.at[slot], semaphores.at[slot])
            copy.start()
            copy.wait()
            turn[0] = turn[0] + 1
            o_ref[...] += jnp.dot(buffers[slot], jnp.ones((128, 128)), preferred_element_type=f32)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(ids.shape[0],),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((8, 128), lambda i, ids: (0, 0)),
        scratch_shapes=[pltpu.VMEM((2, 8, 128), f32), pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), i32)],
    )
    return pl.pallas_call(kernel, out_shape=shape(8, 128), grid_spec=grid_spec)(ids, x)


def test_copies_and_products_are_counted_where_they_happen() -> None:
    traffic = count_traffic(streamed, np.array([0, -1, 3, 3, -1], np.int32), shape(4, 8, 128))
    counted = operands(traffic)
    assert counted["x_ref"].read_bytes == 3 * 4 * KIB and counted["x_ref"].written_bytes == 0
    assert traffic.kernels[0].copies_started == 3
    assert traffic.flops == 3 * 2 * 8 * 128 * 128
    assert counted["o_ref"].write_backs == 1


def pipelined(sizes: jax.Array, x: jax.Array) -> jax.Array:
    """`emit_pipeline` over as many blocks as each group has, with a loop over the groups outside of it."""

    def kernel(sizes_ref, x_ref, o_ref):
        def body(x_block, o_block):
            o_block[...] = x_block[...] * 2

        def group(g, start):
            block = pl.BlockSpec((8, 128), lambda i: (start + i, 0))
            pltpu.emit_pipeline(body, grid=(sizes_ref[g],), in_specs=[block], out_specs=[block])(x_ref, o_ref)
            return start + sizes_ref[g]

        jax.lax.fori_loop(0, sizes_ref.shape[0], group, 0)

    far = pl.BlockSpec(memory_space=pl.ANY)
    grid_spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(), in_specs=[far], out_specs=far)
    return pl.pallas_call(kernel, out_shape=shape(*x.shape), grid_spec=grid_spec)(sizes, x)


def test_emit_pipeline() -> None:
    traffic = count_traffic(pipelined, np.array([2, 0, 3], np.int32), shape(64, 128), chip="v5p")
    counted = operands(traffic)
    assert counted["x_ref"].read_bytes == counted["o_ref"].written_bytes == 5 * 4 * KIB


def rows_copied(rows: jax.Array, x: jax.Array) -> jax.Array:
    """From one place in main memory to another, as many rows as said, for each step of the grid."""

    def kernel(rows_ref, x_ref, o_ref, semaphore):
        i = pl.program_id(0)
        part = pl.ds(i * 8, rows_ref[i])
        copy = pltpu.make_async_copy(x_ref.at[part], o_ref.at[part], semaphore)
        copy.start()
        copy.wait()

    far = pl.BlockSpec(memory_space=pl.ANY)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=rows.shape, in_specs=[far], out_specs=far, scratch_shapes=[pltpu.SemaphoreType.DMA]
    )
    return pl.pallas_call(kernel, out_shape=shape(*x.shape), grid_spec=grid_spec)(rows, x)


def test_copies_whose_size_is_computed() -> None:
    counted = operands(count_traffic(rows_copied, np.array([8, 3, 0, 1], np.int32), shape(32, 128)))
    assert counted["x_ref"].read_bytes == counted["o_ref"].written_bytes == 12 * 128 * 4


def test_a_loop_of_unknown_length_around_copies_is_an_error() -> None:
    with pytest.raises(UnknownValueError, match="rounds of a loop"):
        count_traffic(pipelined, shape(3, dtype=i32), shape(64, 128), chip="v5p")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("f", "steering", "size"),
    [
        (streamed, [0, -1, 3, 3, -1], (4, 8, 128)),
        (pipelined, [2, 0, 3, 1], (64, 128)),
        (rows_copied, [8, 3, 0, 1], (32, 128)),
    ],
    ids=["streamed", "pipelined", "rows"],
)
def test_counted_is_what_the_interpreter_performs(f, steering: list[int], size: tuple[int, ...]) -> None:
    x = jnp.arange(np.prod(size), dtype=f32).reshape(size)
    steering = np.array(steering, np.int32)
    with described("v5p"):
        performed = performed_copies(f, steering, x)
    (kernel,) = count_traffic(f, steering, x, chip="v5p").kernels
    far = [o for o in kernel.operands if not o.fetches and not o.write_backs]
    assert performed.copies == kernel.copies_started > 0
    assert performed.read_bytes == sum(o.read_bytes for o in far) > 0
    assert performed.written_bytes == sum(o.written_bytes for o in far)


# --- against others --------------------------------------------------------------------------------------------------


def megablox(sizes: np.ndarray, tiling: tuple[int, int, int], m: int, k: int, n: int):
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox.gmm").gmm
    call = functools.partial(gmm, preferred_element_type=bf16, tiling=tiling)
    traffic = count_traffic(call, shape(m, k, dtype=bf16), shape(len(sizes), k, n, dtype=bf16), sizes)
    return operands(traffic), traffic


def test_megablox_at_true_shapes() -> None:
    """Balanced groups of one tile of rows: the rows are read for each of two tiles of columns, weights once."""
    m, k, n = 8192, 4096, 2816
    counted, traffic = megablox(np.full(16, 512, np.int32), (512, 1024, 1408), m, k, n)
    assert counted["lhs"].read_bytes == 2 * m * k * 2
    assert counted["rhs"].read_bytes == 16 * k * n * 2
    assert counted["out"].written_bytes == m * n * 2
    assert traffic.flops == 2 * m * k * n
    # a group that ends inside a tile of rows makes another visit of that tile
    ragged = np.array([100, 0, 924] + [512] * 12 + [1024], np.int32)
    assert megablox(ragged, (512, 1024, 1408), m, k, n)[1].flops == 2 * (m + 512) * k * n


# --- XLA's own operations --------------------------------------------------------------------------------------------


def test_what_xla_moves_is_a_figure_of_its_own() -> None:
    x, size = shape(256, 1024), 256 * 1024 * 4

    def swiglu(gate, up):
        return jax.nn.silu(gate) * up

    assert count_traffic(swiglu, x, x).xla_bytes == 3 * size  # one chain: two in, one out
    traffic = count_traffic(lambda a, b: a @ b.T, x, x)
    assert traffic.xla_flops == 2 * 256 * 256 * 1024 and traffic.total_bytes == 0
