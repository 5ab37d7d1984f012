"""Muon: the momentum of every matrix, brought near an orthogonal one by Newton-Schulz iterations shared by all devices.

Under a mesh no device repeats another's work. Matrices of one shape that are cut alike make a `Job`, done in one of two
ways, whichever costs a device fewer operations:

  whole   an all-to-all turns pieces of every matrix into whole matrices of a part of the batch; each device iterates
          on its own, and a second all-to-all brings them back
  rows    for few, long matrices, such as the output head: the long side stays cut, and the Gram matrix of the short
          side is summed over the devices at every iteration

Sources: arXiv 2508.06471 section 2.4 (N = 5, momentum 0.95, update RMS 0.2), arXiv 2502.16982 (update RMS; a Muon
that gathers whole matrices), optax.contrib.muon (bias correction of the momentum).

Axes: b matrices (layers times experts), o rows (out), i columns (in).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero (Jordan, 2024)
_WORKING_BYTES = 1 << 30  # what the iterations hold at a time; more matrices are done one part after another
_ALONE = 4  # a leaf with so many matrices for each device loses little by padding, and makes a job by itself

Dtype = Literal["float32", "bfloat16"]
Names = tuple[str, ...]


class MuonState(NamedTuple):
    """Steps taken, and the running mean of gradients."""

    count: jax.typing.ArrayLike
    momentum: optax.Params


def scale_by_muon(
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    update_rms: float = 0.2,
    eps: float = 1e-8,
    ns_dtype: Dtype | None = None,
    momentum_dtype: Dtype = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's direction for a tree of matrices [..., out, in], every leading axis a batch of separate matrices.

    The same numbers as `optax.contrib.scale_by_muon` with `MuonDimensionNumbers(-1, -2)` and its scaling by
    `consistent_rms`. The update takes `scale`, a number that multiplies every gradient first (clipping).

    Args:
      ns_dtype: of the iterations and of what devices exchange for them; None: float32 on CPU, bfloat16 elsewhere.
      momentum_dtype: of the state.
      shardings: the tree of `NamedSharding`s of the parameters over the mesh given to it (it may hold more than the
        updates do). With it the work is divided over the mesh in force; without, every device does what lies on it.
    """
    solve = functools.partial(orthogonalize, steps=ns_steps, eps=eps)

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=jnp.dtype(momentum_dtype)))

    def update(
        updates: Any, state: Any, params: Any = None, *, scale: jax.typing.ArrayLike = 1.0, **_: Any
    ) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.count)
        ahead, now = (1 - momentum ** jnp.float32(count + n) for n in (1, 0))  # of the bias correction
        weights = (momentum / ahead, scale * (1 - momentum) / now) if nesterov else (1 / now, jnp.zeros(()))

        def moved(mean: jax.Array, gradient: jax.Array) -> jax.Array:
            mean, gradient = mean.astype(jnp.float32), gradient.astype(jnp.float32)
            return (momentum * mean + (1 - momentum) * scale * gradient).astype(momentum_dtype)

        means = jax.tree.map(moved, state.momentum, updates)
        leaves = jax.tree_util.tree_flatten_with_path(updates)[0]
        paths, gradients = [path for path, _ in leaves], tuple(leaf for _, leaf in leaves)
        mesh = jax.sharding.get_abstract_mesh()
        shapes = [x.shape for x in gradients]
        divided = shardings is not None and not mesh.empty and mesh.size > 1
        sizes = dict(mesh.shape) if divided else {}
        specs = _specs(shardings(mesh), paths, sizes) if shardings and divided else [PartitionSpec()] * len(shapes)
        jobs = plan_jobs(shapes, specs, sizes, ns_steps=ns_steps)
        run = functools.partial(_directions, jobs=jobs, solve=solve, ns_dtype=ns_dtype)
        if divided:
            run = _on_mesh(run, mesh, specs)
        directions = run(jnp.stack(weights), tuple(jax.tree.leaves(means)), gradients)
        scaled = [update_rms * max(x.shape[-2:]) ** 0.5 * x for x in directions]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), MuonState(count, means)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalize(
    x: Float[Array, "... o i"],
    steps: int = 5,
    eps: float = 1e-8,
    *,
    tall: bool | None = None,
    sum_over: Names = (),
) -> Float[Array, "... o i"]:
    """Brings the singular values of every matrix near 1 by `steps` of the quintic Newton-Schulz iteration.

    Works on the smaller Gram matrix: X (bA + cA^2) with A = X^T X where rows are more than columns, (bA + cA^2) X with
    A = X X^T otherwise. The two give the same result. Products of bfloat16 matrices are summed in float32.

    Args:
      tall: which of the two; by the shape unless given.
      sum_over: mesh axes over which the long side is cut, inside `jax.shard_map`.
    """
    a, b, c = NS_COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1] if tall is None else tall
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    total = (lambda y: jax.lax.psum(y, sum_over)) if sum_over else (lambda y: y)
    square = jnp.square(x.astype(jnp.float32))
    norm = jnp.sqrt(total(jnp.sum(square, axis=(-2, -1), keepdims=True)))
    x = (x / (norm + eps)).astype(x.dtype)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        across = x.mT
        gram = total(product(across, x) if tall else product(x, across))
        low = gram.astype(x.dtype)
        poly = (b * gram + c * product(low, low)).astype(x.dtype)
        return (a * x + (product(x, poly) if tall else product(poly, x))).astype(x.dtype)

    return jax.lax.fori_loop(0, steps, iterate, x)  # a loop compiles faster than its unrolling, and runs as fast


# --- who does what ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Matrices of one shape that the mesh cuts alike, orthogonalised together. All numbers are of one device."""

    leaves: tuple[int, ...]  # which of the leaves
    turned: tuple[bool, ...]  # of each, whether its matrices are transposed to join the first's
    held: int  # matrices of which the device holds a piece
    shape: tuple[int, int]  # of a whole matrix
    batch_axes: Names  # mesh axes, each of several devices, that cut layers or experts,
    row_axes: Names  # rows,
    column_axes: Names  # and columns
    free_axes: Names  # mesh axes over which the leaves are repeated: they share the work too
    devices: int  # that share `held` matrices
    by_rows: bool  # the way called `rows` above
    at_once: int  # matrices, of those held, that are worked on at a time
    ns_steps: int

    @property
    def axes(self) -> Names:
        return self.row_axes + self.column_axes + self.free_axes

    @property
    def parts(self) -> int:
        """How many times `at_once` matrices are done."""
        return -(-self.held // self.at_once)

    @property
    def flops(self) -> float:
        """Of the matrix products."""
        if self.by_rows:
            return self.parts * self.at_once * _flops(self.shape, self.ns_steps, self.devices)
        return self.parts * self.at_once // self.devices * _flops(self.shape, self.ns_steps)

    def bytes_sent(self, sizes: Mapping[str, int], itemsize: int = 2) -> dict[str, float]:
        """Bytes that leave the device, by collective."""
        o, i = self.shape
        rows, columns, free = (
            math.prod(sizes[a] for a in n) for n in (self.row_axes, self.column_axes, self.free_axes)
        )
        matrices = self.parts * self.at_once
        piece = matrices * o * i / (rows * columns * free) * itemsize
        cut = (columns if o >= i else rows) if self.by_rows else rows * columns
        sent = {"all_to_all": 2 * piece * (1 - 1 / cut), "all_gather": piece * (free - 1)}
        if self.by_rows:  # a ring's all-reduce of float32 Gram matrices
            sent["all_reduce"] = 8 * matrices * min(o, i) ** 2 * self.ns_steps * (1 - 1 / self.devices)
        return {name: bytes for name, bytes in sent.items() if bytes}


def _flops(shape: tuple[int, int], steps: int, cut: int = 1) -> float:
    """Of the products of one matrix whose long side is cut in `cut` pieces."""
    short, long = min(shape), max(shape)
    return steps * (4.0 * -(-long // cut) * short**2 + 2.0 * short**3)


def plan_jobs(
    shapes: Sequence[tuple[int, ...]],
    specs: Sequence[PartitionSpec],
    sizes: Mapping[str, int],
    *,
    ns_steps: int = 5,
    working_bytes: int = _WORKING_BYTES,
) -> list[Job]:
    """The jobs that bring all leaves [..., o, i], cut by `specs` over mesh axes of these `sizes`, to their directions.

    Leaves with few matrices for the devices are pooled where their shapes, turned or not, and cuts agree: three
    layers of one and ninety of another kind keep more devices busy together than one after another.
    """
    sizes = {name: size for name, size in sizes.items() if size > 1}
    pools: dict[Any, list[tuple[int, int, bool]]] = {}
    for number, (shape, spec) in enumerate(zip(shapes, specs)):
        names = [_names(entry, sizes) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
        *batch, rows, columns = names
        cut = math.prod(sizes[name] for axes in batch for name in axes)
        held = math.prod(shape[:-2]) // cut
        free = tuple(name for name in sizes if not any(name in axes for axes in names))
        devices = math.prod(sizes[name] for name in rows + columns + free)
        turned = devices > 1 and shape[-2] > shape[-1]
        sides = (shape[-1], shape[-2], columns, rows) if turned else (shape[-2], shape[-1], rows, columns)
        alone = devices == 1 or held >= _ALONE * devices
        over = tuple(name for axes in batch for name in axes)
        pools.setdefault((*sides, free, over, number if alone else None), []).append((number, held, turned))
    return [_job(key, members, sizes, ns_steps, working_bytes) for key, members in pools.items()]


def _job(
    key: Any, members: list[tuple[int, int, bool]], sizes: Mapping[str, int], ns_steps: int, working_bytes: int
) -> Job:
    short, long, rows, columns, free, batch, _ = key
    numbers, helds, turned = zip(*members)
    if all(turned):  # none need be turned then
        short, long, rows, columns, turned = long, short, columns, rows, (False,) * len(turned)
    shape, held = (short, long), sum(helds)
    devices = math.prod(sizes[name] for name in rows + columns + free)
    whole, by_rows = -(-held // devices) * _flops(shape, ns_steps), held * _flops(shape, ns_steps, devices)
    is_by_rows = devices > 1 and by_rows < whole
    # float32: X twice and once as it is exchanged, Gram matrix, its square and the polynomial
    each = 4 * (3 * short * long // (devices if is_by_rows else 1) + 3 * min(shape) ** 2)
    shared = 1 if is_by_rows else devices
    parts = -(-held // (shared * max(1, working_bytes // each)))
    at_once = shared * -(-held // (shared * parts))
    return Job(
        leaves=numbers, turned=turned, held=held, shape=shape, batch_axes=batch, row_axes=rows, column_axes=columns,
        free_axes=free, devices=devices, by_rows=is_by_rows, at_once=at_once, ns_steps=ns_steps,
    )  # fmt: skip


def _names(entry: Any, sizes: Mapping[str, int]) -> Names:
    """The mesh axes of an entry of a PartitionSpec, those of one device left out."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return tuple(name for name in names if name in sizes)


def _specs(shardings: Any, paths: Sequence[Any], sizes: Mapping[str, int]) -> list[PartitionSpec]:
    """Of the leaves at `paths`, without mesh axes of one device; `shardings` may hold more leaves."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return [PartitionSpec(*(_names(entry, sizes) or None for entry in by_path[path].spec)) for path in paths]


# --- doing it --------------------------------------------------------------------------------------------------------

Take = Callable[[Any, int], Array]  # (first, count) -> pieces [count, o, i] of the matrices held


def _on_mesh(run: Callable[..., Any], mesh: Any, specs: list[PartitionSpec]) -> Callable[..., Any]:
    if any(kind == AxisType.Manual for kind in mesh.axis_types):
        raise ValueError("Muon divides its work over the mesh by itself: call the optimizer outside of jax.shard_map")
    mapped = jax.shard_map(run, in_specs=(PartitionSpec(), tuple(specs), tuple(specs)), out_specs=tuple(specs))
    if not any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return mapped

    def resharded(weights: Array, *trees: tuple[Array, ...]) -> Any:
        return mapped(weights, *(tuple(map(jax.sharding.reshard, tree, specs)) for tree in trees))

    return resharded


def _directions(
    weights: Float[Array, " 2"], means: tuple[Array, ...], gradients: tuple[Array, ...], *,
    jobs: list[Job], solve: Callable[..., Array], ns_dtype: Dtype | None,
) -> tuple[Array, ...]:  # fmt: skip
    """The orthogonalised weights[0] * mean + weights[1] * gradient of every leaf, in float32; the device's part."""
    results: dict[int, Array] = {}
    for job in jobs:
        chosen = tuple((means[n], gradients[n]) for n in job.leaves)

        def in_dtype(weights: Array, chosen: Any, *, dtype: Dtype, job: Job = job) -> tuple[Array, ...]:
            return tuple(x.astype(jnp.float32) for x in _do(job, weights, chosen, jnp.dtype(dtype), solve))

        if ns_dtype is None:
            done = jax.lax.platform_dependent(
                weights,
                chosen,
                cpu=functools.partial(in_dtype, dtype="float32"),
                default=functools.partial(in_dtype, dtype="bfloat16"),
            )
        else:
            done = in_dtype(weights, chosen, dtype=ns_dtype)
        results |= zip(job.leaves, done)
    return tuple(results[n] for n in range(len(means)))


def _do(job: Job, weights: Array, chosen: Any, dtype: Any, solve: Callable[..., Array]) -> list[Array]:
    """One job: the directions of its leaves, in `dtype`."""

    def combined(mean: Array, gradient: Array) -> Array:
        return (weights[0] * mean.astype(jnp.float32) + weights[1] * gradient.astype(jnp.float32)).astype(dtype)

    shapes = [mean.shape for mean, _ in chosen]
    flat = [tuple(x.reshape(-1, *x.shape[-2:]) for x in pair) for pair in chosen]
    if len(flat) == 1:  # combined part by part: no second copy of a large leaf
        take: Take = lambda first, count: combined(*(_rows_at(x, first, count) for x in flat[0]))  # noqa: E731
    else:
        pieces = [combined(*pair) for pair in flat]
        pool = jnp.concatenate([x.mT if turn else x for x, turn in zip(pieces, job.turned)])
        take = lambda first, count: _rows_at(pool, first, count)  # noqa: E731
    out = _in_parts(job, take, solve)
    ends = [sum(x.shape[0] for x, _ in flat[: n + 1]) for n in range(len(flat) - 1)]
    parts = jnp.split(out, ends) if ends else [out]
    return [(x.mT if turn else x).reshape(shape) for x, turn, shape in zip(parts, job.turned, shapes)]


def _rows_at(x: Array, first: Any, count: int) -> Array:
    return x if count == x.shape[0] else jax.lax.dynamic_slice_in_dim(x, first, count)


def _in_parts(job: Job, take: Take, solve: Callable[..., Array]) -> Float[Array, "b o i"]:
    """`at_once` matrices at a time. The last part begins early enough to be a full one: some matrices are done twice,
    with the same result, and nothing is padded, which would copy the leaf."""
    finish = functools.partial(_by_rows if job.by_rows else _whole, job, solve=solve)
    if job.parts == 1:
        return finish(take(0, job.held))
    count, last = job.at_once, job.held - job.at_once

    def part(n: Any, out: Array) -> Array:
        first = jnp.minimum(n * count, last)
        return jax.lax.dynamic_update_slice_in_dim(out, finish(take(first, count)), first, 0)

    like = jax.eval_shape(lambda: take(0, count))
    out = jnp.zeros((job.held, *like.shape[1:]), like.dtype)
    cut = job.batch_axes + job.row_axes + job.column_axes
    out = jax.lax.pcast(out, cut, to="varying") if cut else out
    return jax.lax.fori_loop(0, job.parts, part, out)


def _whole(job: Job, x: Float[Array, "b o i"], *, solve: Callable[..., Array]) -> Float[Array, "b o i"]:
    """Pieces of all matrices to whole ones of the device's own, and back."""
    held = x.shape[0]
    x = _pad(x, 0, job.devices)
    x = _own_part(x, 0, job.free_axes)
    x = _exchange(x, job.row_axes, 0, 1)
    x = _exchange(x, job.column_axes, 0, 2)
    x = solve(x)
    x = _exchange(x, job.column_axes, 2, 0)
    x = _exchange(x, job.row_axes, 1, 0)
    return _gather(x, 0, job.free_axes)[:held]


def _by_rows(job: Job, x: Float[Array, "b o i"], *, solve: Callable[..., Array]) -> Float[Array, "b o i"]:
    """The short side whole, the long one cut over all the job's devices."""
    tall = job.shape[0] > job.shape[1]
    long, short = (1, 2) if tall else (2, 1)
    short_axes = job.column_axes if tall else job.row_axes
    others = math.prod(jax.lax.axis_size(name) for name in short_axes + job.free_axes)
    held = x.shape[long]
    x = _pad(x, long, others)  # with zeros, of which a Gram matrix knows nothing
    x = _own_part(x, long, job.free_axes)
    x = _exchange(x, short_axes, long, short)
    x = solve(x, tall=tall, sum_over=job.axes)
    x = _exchange(x, short_axes, short, long)
    x = _gather(x, long, job.free_axes)
    return jax.lax.slice_in_dim(x, 0, held, axis=long)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if n == axis else 0) for n in range(x.ndim)]) if extra else x


def _own_part(x: Array, axis: int, names: Names) -> Array:
    if not names:
        return x
    size = x.shape[axis] // math.prod(jax.lax.axis_size(name) for name in names)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(names) * size, size, axis)


def _exchange(x: Array, names: Names, cut: int, join: int) -> Array:
    if not names:
        return x
    x = jax.lax.optimization_barrier(x)  # XLA on CPU gives padding another layout than the rest, and then refuses both
    return jax.lax.all_to_all(x, names, cut, join, tiled=True)


def _gather(x: Array, axis: int, names: Names) -> Array:
    return jax.lax.all_gather(x, names, axis=axis, tiled=True, to="invarying") if names else x
