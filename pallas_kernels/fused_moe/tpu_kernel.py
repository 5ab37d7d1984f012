"""The body of the TPU's fused MoE kernel, and where its blocks come from. See `tpu`.

Axes: T tokens (padded), D model, F expert width, R tokens of an expert at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fused_moe.tiling import Shape, Tiling
from pallas_kernels.grouped_matmul import tpu_scale


@dataclasses.dataclass(frozen=True)
class Frame:
    """All that is static of one call."""

    tiling: Tiling
    shape: Shape
    cores: int
    scale_kinds: tuple[str | None, ...]
    transpose_rhs: bool

    @property
    def width_steps(self) -> int:
        return -(-self.shape.width // self.tiling.width)

    @property
    def model_steps(self) -> int:
        return -(-self.shape.model // self.tiling.model)

    def block(self, which: int) -> tuple[int, int]:
        """Of gate, up or down, as it lies in memory."""
        block = (self.shape.width, self.tiling.model) if which == 2 else (self.shape.model, self.tiling.width)
        return block[::-1] if self.transpose_rhs else block


def specs(frame: Frame, scales: Sequence[jax.Array]) -> tuple[list[pl.BlockSpec], pl.BlockSpec, list[Any]]:
    """Of the inputs (tokens, their ranks and weights, matrices, scales), of the sums, and the scratch."""
    shape, tiling = frame.shape, frame.tiling
    tokens = pl.BlockSpec((shape.padded, shape.model), lambda c, i, s, *_: (0, 0))
    by_token = pl.BlockSpec((None, 1, shape.padded), lambda c, i, s, *scalars: (_item(frame, c, i, scalars[2]), 0, 0))
    matrices = [pl.BlockSpec((None, None, *frame.block(w)), _index(frame, w)) for w in range(3)]
    quantised = [w for w in range(3) if frame.scale_kinds[w] is not None]
    factors = [_scale_spec(frame, which, scale) for which, scale in zip(quantised, scales)]
    sums = pl.BlockSpec((None, shape.padded, shape.model), lambda c, i, s, *_: (c, 0, 0))
    gathered = pltpu.VMEM((shape.padded, shape.model), shape.dtypes[0])
    hidden = pltpu.VMEM((shape.padded, frame.width_steps * tiling.width), shape.dtypes[0])
    dense = [pltpu.VMEM(frame.block(which), shape.dtypes[0]) for which in quantised]
    return [tokens, by_token, by_token, *matrices, *factors], sums, [gathered, hidden, *dense]


def _item(frame: Frame, core, i, count):
    """The core's i-th expert; where it has none left, the one before."""
    item = i * frame.cores + core
    return jnp.maximum(jnp.where(item < count[0], item, item - frame.cores), 0)


def _place(frame: Frame, which: int, core, i, s, count):
    """Which expert's block of gate, up or down, and which block of it, is in VMEM at step s.

    Blocks change only where their own steps begin: every step has the next one's blocks to fetch, and no others. A core
    that has no expert left fetches nothing; one that never had one is given a block, as a kernel must be.
    """
    item = _item(frame, core, i, count)
    has_one = i * frame.cores + core < count[0]
    if which < 2:
        left = jnp.where(i > 0, frame.width_steps - 1, 0)
        return item, jnp.where(has_one, jnp.minimum(s, frame.width_steps - 1), left)
    before = ((s < frame.width_steps) | jnp.logical_not(has_one)) & (i > 0)  # still the expert's before, its last block
    block = jnp.where(has_one, jnp.maximum(s - frame.width_steps, 0), 0)
    block = jnp.where(before, frame.model_steps - 1, block)
    return jnp.where(before, _item(frame, core, i - 1, count), item), block


def _index(frame: Frame, which: int):
    def index(core, i, s, experts, tokens, count, layer):
        item, block = _place(frame, which, core, i, s, count)
        return (layer[0], experts[item], *((block, 0) if frame.transpose_rhs else (0, block)))

    return index


def _scale_spec(frame: Frame, which: int, scale: jax.Array) -> pl.BlockSpec:
    size = frame.tiling.model if which == 2 else frame.tiling.width

    def index(core, i, s, experts, tokens, count, layer):
        item, block = _place(frame, which, core, i, s, count)
        return layer[0], experts[item], 0, (block if frame.scale_kinds[which] == tpu_scale.COLUMNS else 0)

    per_channel = frame.scale_kinds[which] == tpu_scale.COLUMNS
    return pl.BlockSpec((None, None, *((1, size) if per_channel else scale.shape[2:])), index)


def kernel(frame: Frame, experts, tokens, count, layer, x, rank, weight, *refs):
    """One step: a block of gate and up, or of down, and all tokens that chose the expert."""
    num_scales = sum(kind is not None for kind in frame.scale_kinds)
    matrices, (out, gathered, hidden, *dense) = refs[:3], refs[3 + num_scales :]
    factors, dense = (tpu_scale.by_matrix(frame.scale_kinds, r) for r in (refs[3 : 3 + num_scales], dense))
    core, i, s = (pl.program_id(axis) for axis in range(3))
    item = i * frame.cores + core

    @pl.when((i == 0) & (s == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(item < count[0])
    def _():
        steps = jax.lax.div(tokens[item] + frame.tiling.rows - 1, frame.tiling.rows)
        scaling = tpu_scale.Scaling(frame.scale_kinds, factors)

        @pl.when(s == 0)
        def _():
            _for_rows(frame, steps, lambda at, first: _gather(x, rank, gathered, at, first))

        @pl.when(s < frame.width_steps)
        def _():
            gate, up = (_dense(frame, which, matrices, factors, dense, s) for which in (0, 1))
            _for_rows(frame, steps, lambda at, _: _activate(frame, gate, up, scaling, gathered, hidden, at, s))

        @pl.when(s >= frame.width_steps)
        def _():
            block = s - frame.width_steps
            down = _dense(frame, 2, matrices, factors, dense, block)
            columns = _columns(block, frame.tiling.model, frame.model_steps)
            _for_rows(
                frame, steps,
                lambda at, first: _combine(frame, down, scaling, rank, weight, hidden, out, at, first, columns),
            )  # fmt: skip


def _columns(block, size: int, steps: int) -> pl.Slice:
    """Of all columns, those of a block; one block may be no multiple of a register's lanes, so its place is static."""
    return pl.ds(0 if steps == 1 else pl.multiple_of(block * size, size), size)


def _for_rows(frame: Frame, steps, do) -> None:
    """Calls `do` with each slice of the expert's tokens and the rank of its first."""
    rows = frame.tiling.rows
    jax.lax.fori_loop(0, steps, lambda r, _: do(pl.ds(pl.multiple_of(r * rows, rows), rows), r * rows), None)


def _chosen(rank, first, rows: int) -> jax.Array:
    """[R, T]: a one where the token's rank is the row's."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, rank.shape[1]), 0) + first
    return (rank[...] == row).astype(jnp.float32)


def _gather(x, rank, gathered, at, first) -> None:
    ones = _chosen(rank, first, at.size).astype(x.dtype)
    gathered[at, :] = _dot(ones, x[...], ((1,), (0,))).astype(gathered.dtype)


def _activate(frame: Frame, gate, up, scaling, gathered, hidden, at, block) -> None:
    contract = ((1,), (1 if frame.transpose_rhs else 0,))
    g, u = (
        scaling.of_columns(which, _dot(gathered[at, :], matrix[...], contract))
        for which, matrix in ((0, gate), (1, up))
    )
    columns = _columns(block, frame.tiling.width, frame.width_steps)
    hidden[at, columns] = (jax.nn.silu(g) * u).astype(hidden.dtype)


def _combine(frame: Frame, down, scaling, rank, weight, hidden, out, at, first, columns) -> None:
    contract = ((1,), (1 if frame.transpose_rhs else 0,))
    answers = scaling.of_columns(2, _dot(hidden[at, : frame.shape.width], down[...], contract))
    share = jnp.where(_chosen(rank, first, at.size) > 0, weight[...], 0.0)  # another's weight may be NaN
    out[:, columns] += _dot(share, answers, ((0,), (0,)))


def _dense(frame: Frame, which: int, matrices, factors, dense, block) -> Any:
    """The block at hand, dequantised where it is quantised."""
    kind = frame.scale_kinds[which]
    if kind is None:
        return matrices[which]
    start = block * (frame.tiling.model if which == 2 else frame.tiling.width)
    first = (start, 0) if frame.transpose_rhs else (0, start)
    tpu_scale.fill(dense[which], matrices[which], factors[which], kind, *first)
    return dense[which]


def _dot(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
