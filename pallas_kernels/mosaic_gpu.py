"""What the Pallas Mosaic GPU kernels share: a block's warpgroups, the ring of buffers between them, storing rows.

Every kernel has one shape: a block of three warpgroups on each multiprocessor, of which two compute with `wgmma` and
the third keeps a ring of buffers in shared memory filled by TMA. It runs ahead of the other two, over the borders
between tiles of the output, until the ring is full.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chip import named_chip
from pallas_kernels.mosaic import varying_alike

COMPUTE_WARPGROUPS = 2
LOADING_WARPGROUP = COMPUTE_WARPGROUPS
WARPGROUP_ROWS = 64  # of one wgmma instruction
ROW_ALIGNMENT = 8  # TMA moves a swizzled buffer from and to rows that are multiples of this
SWIZZLE_BYTES = 128  # a row of a swizzled buffer: as wide as all banks of shared memory
_RESERVED_BYTES = 3072  # barriers, and what the compiler keeps for reductions and alignment
_MULTIPROCESSORS = 132  # of an H100 SXM, where no device says its own number
_CLUSTER = 2  # blocks on neighbouring multiprocessors, where a kernel has what both of them need


def shared_memory_bytes() -> int:
    """What the buffers of one block may take together."""
    return named_chip("h100").on_chip_bytes - _RESERVED_BYTES


def multiprocessors() -> int:
    """Of the device of the mesh in force."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "num_cores", None) or _MULTIPROCESSORS


def cluster_size(worthwhile: bool) -> int:
    """How many blocks take neighbouring tiles together, and what these share from L2 once."""
    return _CLUSTER if worthwhile else 1


def rank(cluster: int) -> Any:
    """This block's number in its cluster."""
    return lax.axis_index("cluster") if cluster > 1 else jnp.int32(0)


def swizzle_elements(dtype: Any) -> int:
    """Columns of a swizzled buffer come in multiples of this."""
    return SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def swizzled(shape: Sequence[int], dtype: Any) -> Any:
    """A shared-memory buffer of which `wgmma` and registers read rows and columns without bank conflicts."""
    transforms = (
        plgpu.TilingTransform((ROW_ALIGNMENT, swizzle_elements(dtype))),
        plgpu.SwizzleTransform(SWIZZLE_BYTES),
    )
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def check_loadable(name: str, *matrices: jax.Array) -> None:
    """Raises NotImplementedError unless TMA can load these [..., rows, columns] to swizzled buffers."""
    for x in matrices:
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{name}: the Mosaic GPU kernel takes bfloat16, not {x.dtype}")
        if 0 in x.shape or x.shape[-1] % swizzle_elements(x.dtype) or x.shape[-2] % ROW_ALIGNMENT:
            raise NotImplementedError(f"{name}: the Mosaic GPU kernel takes [8 n, 64 n], not {x.shape}")


def check_whole(of: Any, size: int) -> None:
    """A vector is copied in pieces of `size`: its array must have a multiple of that.

    What is copied to or from one run of memory is cut off at the array's end alone, not at that of a row: the rest of
    the piece would be the next row's. (Swizzled matrices are cut off at every edge, and read as zeros past it.)
    """
    length = getattr(of, "ref", of).shape[-1]
    assert length % size == 0, f"vectors of {length} copied in pieces of {size}"


def pad_rows(x: jax.Array) -> jax.Array:
    """To a multiple of 8 rows, at least 8, which TMA needs: no copy where they are."""
    missing = -x.shape[0] % ROW_ALIGNMENT
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def kernel(
    body: Callable[..., None],
    out_type: Any,
    *,
    num_blocks: int,
    scratch_types: dict[str, Any],
    approx_math: bool = False,
    cluster: int = 1,
) -> Any:
    """A kernel of `num_blocks` clusters of blocks at most, as many as there are multiprocessors: see `for_each_tile`.

    Inside a checked `shard_map` its results vary over every mesh axis that one of its arguments varies over.
    """
    run = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(min(num_blocks, multiprocessors() // cluster),),
        grid_names=("block",),
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=_name(body),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approx_math
        ),
    )

    def alike(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        leaves = varying_alike(*leaves)
        return jax.tree.map(lambda out: varying_alike(out, *leaves)[0], run(*jax.tree.unflatten(tree, leaves)))

    return alike


def _name(body: Callable[..., None]) -> str:
    """The module of a kernel's body, `grouped_matmul_gpu_rows`: what profiles and plans call it."""
    return "_".join(getattr(body, "func", body).__module__.split(".")[-2:])


def specialise(load: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """Runs `load()` in the loading warpgroup and `compute(warpgroup)` in the others, which get its registers."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == LOADING_WARPGROUP)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        load()

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)


def for_each_tile(num_tiles: Any, body: Callable[[Any, Any], Any]) -> Any:
    """Calls `step = body(tile, step)` for this cluster's share of the tiles; `step` counts the ring's buffers used."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = (num_tiles - block + blocks - 1) // blocks
    return lax.fori_loop(0, mine, lambda i, step: body(i * blocks + block, step), jnp.int32(0))


def turn_of(tile: Any) -> Any:
    """How many tiles this block had before: the step of a ring that is filled once for a tile."""
    return lax.div(tile, lax.axis_size("block"))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers [stages, ...] that the loading warpgroup fills and both computing ones read, again and again.

    Attributes:
      loaded: a barrier for each stage, completed when TMA has written its buffers.
      consumed: one completed when both computing warpgroups have read them.
      to_registers: whether these read a buffer to registers, not by `wgmma` alone.
      shared: the numbers of the buffers that all blocks of the cluster fill alike: each loads a part for all.
    """

    buffers: Sequence[Any]
    loaded: Any
    consumed: Any
    to_registers: bool = False
    shared: Sequence[int] = ()

    @property
    def stages(self) -> int:
        return self.buffers[0].shape[0]

    @staticmethod
    def barriers(stages: int, buffers: int, cluster: int = 1) -> dict[str, Any]:
        """The scratch types of `loaded` and `consumed`; the blocks of a cluster wait for one another's readers."""
        of_all = {"num_arrivals": COMPUTE_WARPGROUPS, "num_barriers": stages}
        return {
            "loaded": plgpu.Barrier(num_arrivals=buffers, num_barriers=stages),
            "consumed": plgpu.ClusterBarrier(collective_axes=("cluster",), **of_all)
            if cluster > 1
            else plgpu.Barrier(**of_all),
        }

    def fill(self, step: Any, sources: Sequence[Any]) -> None:
        """Starts the copies of `step`, once its buffers are free."""
        slot = lax.rem(step, self.stages)

        @pl.when(step >= self.stages)
        def _wait():
            plgpu.barrier_wait(self.consumed.at[slot])

        for i, (source, buffer) in enumerate(zip(sources, self.buffers, strict=True)):
            if len(buffer.shape) == 2:  # [stages, n]
                check_whole(source, buffer.shape[1])
            together = {"collective_axes": "cluster"} if i in self.shared else {}
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.loaded.at[slot], **together)

    def drain(self, steps: Any) -> None:
        """In a cluster, waits until all `steps` are read: till then a neighbour writes to this block's barriers."""
        if not self.shared:
            return

        def one(step, _):
            plgpu.barrier_wait(self.consumed.at[lax.rem(step, self.stages)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, one, None)

    def wait(self, step: Any) -> list[Any]:
        """The buffers of `step`, once they are loaded."""
        slot = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.loaded.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def free(self, step: Any) -> None:
        if self.to_registers:
            plgpu.commit_smem()  # TMA must not write before every thread has read
        plgpu.barrier_arrive(self.consumed.at[lax.rem(step, self.stages)])

    def accumulate(self, step: Any, num_steps: Any, shapes: Sequence[Any], product: Callable[..., None]) -> Any:
        """Float32 sums over `num_steps` steps from `step`, of the shapes given.

        `product(k, buffers, accumulators)` issues one `wgmma` for each. They run on while the next step's are issued.
        """

        def run(*accumulators):
            def one(k, _):
                product(k, self.wait(step + k), accumulators)
                plgpu.wgmma_wait(len(accumulators))
                pl.when(k > 0)(lambda: self.free(step + k - 1))

            lax.fori_loop(0, num_steps, one, None)
            return [acc[...] for acc in accumulators]

        sums = pl.run_scoped(run, *(plgpu.ACC(shape) for shape in shapes))
        pl.when(num_steps > 0)(lambda: self.free(step + num_steps - 1))
        return sums

    def skip(self, step: Any, num_steps: Any) -> None:
        """What a warpgroup does that has no use for these steps."""

        def one(k, _):
            self.wait(step + k)
            self.free(step + k)

        lax.fori_loop(0, num_steps, one, None)


@dataclasses.dataclass(frozen=True)
class Store:
    """A warpgroup's way from registers to the output: 64 rows, a piece of the columns at a time, `slots` under way.

    Attributes:
      buffers: of each warpgroup one [slots, 64, columns], swizzled, for 64 rows that are all stored.
      partial: whether in the same memory is another without swizzling, of which TMA can copy any rows.
    """

    buffers: Sequence[Any]
    partial: bool = False
    slots: int = 2

    @staticmethod
    def scratch(dtype: Any, partial: bool = False, slots: int = 2) -> Any:
        """The scratch type of `buffers`; `partial`: where some of the 64 rows may not be stored."""
        shape = (slots, WARPGROUP_ROWS, swizzle_elements(dtype))
        one = (swizzled(shape, dtype), plgpu.SMEM(shape, dtype)) if partial else (swizzled(shape, dtype),)
        return [plgpu.RefUnion(*one) if partial else one[0]] * COMPUTE_WARPGROUPS

    @staticmethod
    def shared_bytes() -> int:
        """Of the two slots of all warpgroups, whatever the type."""
        return COMPUTE_WARPGROUPS * 2 * WARPGROUP_ROWS * SWIZZLE_BYTES

    def rows(self, y: jax.Array, out: Any, row: Any, begin: Any, end: Any, column: Any) -> None:
        """Stores rows `begin` to `end` of `y` [64, n]; its first row and column are (`row`, `column`) of `out`.

        `row` and `column` are multiples of 8; columns past the last of `out` are left out.
        """
        num_rows = end - begin

        def store(piece: jax.Array, whole: Any, partial: Any, first: Any) -> None:
            @pl.when(num_rows == WARPGROUP_ROWS)
            def _whole():
                whole[...] = piece
                plgpu.commit_smem()
                target = out.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(first, piece.shape[1])]
                plgpu.copy_smem_to_gmem(whole, target, commit_group=False)

            if partial is not None:

                @pl.when((num_rows > 0) & (num_rows < WARPGROUP_ROWS))
                def _partial():
                    partial[...] = piece
                    plgpu.commit_smem()
                    _copy_rows(partial, out, row, begin, end, first)

        warpgroup, width = lax.axis_index("warpgroup"), swizzle_elements(out.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, at in enumerate(range(0, y.shape[1], width)):
            piece = y[:, at : at + width].astype(out.dtype)
            first = column + at if isinstance(column, int) else pl.multiple_of(column + at, width)
            plgpu.wait_smem_to_gmem(self.slots - 1, wait_read_only=True)
            for number, buffer in enumerate(self.buffers):
                slot = i % self.slots
                whole, partial = (x.at[slot] for x in buffer) if self.partial else (buffer.at[slot], None)
                write = functools.partial(store, piece, whole, partial, first)
                pl.when((warpgroup == number) & (first < out.shape[1]))(write)
            plgpu.commit_smem_to_gmem_group()  # of a piece, stored or not: that is what is waited for


def _copy_rows(buffer: Any, out: Any, row: Any, begin: Any, end: Any, column: Any) -> None:
    """A TMA copy has a fixed number of rows: the bits of `end - begin` say which powers of two make it up."""
    size, columns = buffer.shape
    num_rows, offset = end - begin, begin
    while size := size // 2:
        taken = num_rows & size

        @pl.when(taken != 0)
        def _copy(size=size, offset=offset):
            target = out.at[pl.ds(row + offset, size), pl.ds(column, columns)]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(offset, size)], target, commit_group=False)

        offset += taken
