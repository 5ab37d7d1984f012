"""What the Pallas Mosaic GPU kernels share: a block's warpgroups, the ring of buffers between them, storing rows.

Every kernel has one shape: a block of three warpgroups on each multiprocessor, of which two compute with `wgmma` and
the third keeps a ring of buffers in shared memory filled by TMA. It runs ahead of the other two, over the borders
between tiles of the output, until the ring is full.
"""

from __future__ import annotations

import dataclasses
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


def shared_memory_bytes() -> int:
    """What the buffers of one block may take together."""
    return named_chip("h100").on_chip_bytes - _RESERVED_BYTES


def multiprocessors() -> int:
    """Of the device of the mesh in force."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "num_cores", None) or _MULTIPROCESSORS


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
) -> Any:
    """A kernel of `num_blocks` blocks at most, as many as there are multiprocessors: see `for_each_tile`.

    Inside a checked `shard_map` its results vary over every mesh axis that one of its arguments varies over.
    """
    run = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(min(num_blocks, multiprocessors()),),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approx_math
        ),
    )

    def alike(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        leaves = varying_alike(*leaves)
        return jax.tree.map(lambda out: varying_alike(out, *leaves)[0], run(*jax.tree.unflatten(tree, leaves)))

    return alike


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


def for_each_tile(num_tiles: Any, body: Callable[[Any, Any], Any]) -> None:
    """Calls `step = body(tile, step)` for this block's share of the tiles; `step` counts the ring's buffers used."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = (num_tiles - block + blocks - 1) // blocks
    lax.fori_loop(0, mine, lambda i, step: body(i * blocks + block, step), jnp.int32(0))


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
    """

    buffers: Sequence[Any]
    loaded: Any
    consumed: Any
    to_registers: bool = False

    @property
    def stages(self) -> int:
        return self.buffers[0].shape[0]

    @staticmethod
    def barriers(stages: int, buffers: int) -> dict[str, Any]:
        """The scratch types of `loaded` and `consumed`."""
        return {
            "loaded": plgpu.Barrier(num_arrivals=buffers, num_barriers=stages),
            "consumed": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        }

    def fill(self, step: Any, sources: Sequence[Any]) -> None:
        """Starts the copies of `step`, once its buffers are free."""
        slot = lax.rem(step, self.stages)

        @pl.when(step >= self.stages)
        def _wait():
            plgpu.barrier_wait(self.consumed.at[slot])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.loaded.at[slot])

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
    """A warpgroup's way from registers to the output: 64 rows, a piece of the columns at a time.

    Attributes:
      whole: swizzled [warpgroups, 64, columns], for 64 rows that are all stored.
      partial: the same without swizzling, of which TMA can copy any rows; None where all rows are stored or none.
    """

    whole: Any
    partial: Any = None

    @staticmethod
    def whole_buffer(dtype: Any) -> Any:
        return swizzled((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, swizzle_elements(dtype)), dtype)

    @staticmethod
    def partial_buffer(dtype: Any) -> Any:
        return plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, swizzle_elements(dtype)), dtype)

    @staticmethod
    def shared_bytes() -> int:
        """Of one of the two, whatever the type."""
        return COMPUTE_WARPGROUPS * WARPGROUP_ROWS * SWIZZLE_BYTES

    def rows(self, y: jax.Array, out: Any, row: Any, begin: Any, end: Any, column: Any) -> None:
        """Stores rows `begin` to `end` of `y` [64, n]; its first row and column are (`row`, `column`) of `out`.

        `row` and `column` are multiples of 8; columns past the last of `out` are left out.
        """
        warpgroup, width = lax.axis_index("warpgroup"), self.whole.shape[-1]
        whole, num_rows = self.whole.at[warpgroup], end - begin
        for at in range(0, y.shape[1], width):
            piece = y[:, at : at + width].astype(out.dtype)
            first = column + at if isinstance(column, int) else pl.multiple_of(column + at, width)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when((num_rows == WARPGROUP_ROWS) & (first < out.shape[1]))
            def _whole(piece=piece, first=first):
                whole[...] = piece
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(whole, out.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(first, width)])

            if self.partial is not None:
                partial = self.partial.at[warpgroup]

                @pl.when((num_rows > 0) & (num_rows < WARPGROUP_ROWS) & (first < out.shape[1]))
                def _partial(piece=piece, first=first, partial=partial):
                    partial[...] = piece
                    plgpu.commit_smem()
                    _copy_rows(partial, out, row, begin, end, first)


def _copy_rows(buffer: Any, out: Any, row: Any, begin: Any, end: Any, column: Any) -> None:
    """A TMA copy has a fixed number of rows: the bits of `end - begin` say which powers of two make it up."""
    size, columns = buffer.shape
    num_rows, offset = end - begin, begin
    while size := size // 2:
        taken = num_rows & size

        @pl.when(taken != 0)
        def _copy(size=size, offset=offset):
            source = buffer.at[pl.ds(offset, size)]
            plgpu.copy_smem_to_gmem(source, out.at[pl.ds(row + offset, size), pl.ds(column, columns)])

        offset += taken
