"""Collectives by kind and mesh axis: groups of every form, and programs compiled for eight CPU devices."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from glm45_jax.errors import UserError
from glm45_jax.parallel import AXES
from glm45_jax.plan.collectives import all_to_all_bytes, collectives, count_collectives, sent_bytes
from glm45_jax.plan.hlo import parse
from glm45_jax.plan.hlo_cost import memory_bytes
from glm45_jax.plan.replica_groups import parse_groups, varying_axes
from tests.support import ROOT

SIZES = dict(zip(AXES, (2, 2, 3, 2, 2, 2)))
EVERY = [c for n in range(len(AXES) + 1) for c in itertools.combinations(AXES, n)]


def groups_of(axes: tuple[str, ...]) -> np.ndarray:
    """Made the other way round: devices that differ along `axes` alone."""
    ids = np.arange(math.prod(SIZES.values())).reshape(*SIZES.values())
    apart = [i for i, a in enumerate(SIZES) if a not in axes]
    along = [i for i, a in enumerate(SIZES) if a in axes]
    return ids.transpose(*apart, *along).reshape(-1, math.prod(SIZES[a] for a in axes))


@pytest.mark.parametrize("axes", EVERY, ids="+".join)
def test_groups_of_every_combination_of_axes(axes: tuple[str, ...]) -> None:
    groups = groups_of(axes)
    assert varying_axes(groups, SIZES) == axes
    lists = "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in groups) + "}, channel_id=1"
    np.testing.assert_array_equal(parse_groups(lists, 96), groups)
    apart = [i for i, a in enumerate(SIZES) if a not in axes]
    order = [*apart, *(i for i, a in enumerate(SIZES) if a in axes)]
    iota = f"[{groups.shape[0]},{groups.shape[1]}]<=[{_commas(SIZES.values())}]T({_commas(order)}), dims"
    np.testing.assert_array_equal(parse_groups(iota, 96), groups)
    named, chosen = _commas(f"'{a}'={n}" for a, n in SIZES.items()), _commas(f"'{a}'" for a in axes)
    mesh = "mesh[" + named + "] {" + chosen + "}, x={y}"
    np.testing.assert_array_equal(parse_groups(mesh, 96), groups)


def _commas(items) -> str:
    return ",".join(map(str, items))


def test_other_forms_of_groups() -> None:
    np.testing.assert_array_equal(parse_groups("{}", 4), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(parse_groups("[2,4]<=[8]", 8), [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(parse_groups("mesh['a'=8] {'a':(2)2}", 8), [[0, 2], [1, 3], [4, 6], [5, 7]])
    ids = "mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}"
    np.testing.assert_array_equal(parse_groups(ids, 4), [[0, 2], [1, 3]])
    with pytest.raises(UserError, match="form that is not known"):
        parse_groups("what[is]this", 4)


def test_a_program_of_more_devices_than_the_mesh_is_refused() -> None:
    with pytest.raises(UserError, match="more than the 4 devices"):
        varying_axes(np.arange(8).reshape(2, 4), {"fsdp": 4})


MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
ROUNDS, ROWS, WIDTH = 5, 16, 32
EVERY_KIND = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from glm45_jax.parallel import make_mesh

def step(c, w):
    w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
    c = jax.lax.psum(c @ w, "tensor")
    c = jax.lax.all_to_all(c, "expert", 0, 0, tiled=True)
    c = jax.lax.ppermute(c, "fsdp", [(0, 1), (1, 0)])
    return jax.lax.psum_scatter(c, ("expert", "tensor"), scatter_dimension=0, tiled=True).repeat(4, 0), None

rounds, rows, width = map(int, sys.argv[1:4])
specs = (P(("fsdp", "expert")), P(None, "fsdp"))
with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
    inside = lambda x, w: jax.lax.scan(step, x, w)[0]
    f = jax.shard_map(inside, in_specs=specs, out_specs=specs[0], check_vma=False)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4 * rows, width), (rounds, width, width))]
    lowered = jax.jit(f).lower(*shapes)
open(sys.argv[4], "w").write(lowered.as_text())
open(sys.argv[5], "w").write(lowered.compile().as_text())
"""
KINDS = {
    ("all-gather", ("fsdp",)): 1,
    ("all-reduce", ("tensor",)): 1,
    ("all-to-all", ("expert",)): 1,
    ("collective-permute", ("fsdp",)): 1,
    ("reduce-scatter", ("expert", "tensor")): 1,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """StableHLO and compiled HLO of a loop with one of each collective, on eight CPU devices."""
    files = [tmp_path_factory.mktemp("texts") / name for name in ("lowered", "compiled")]
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    sizes = [str(n) for n in (ROUNDS, ROWS, WIDTH)]
    subprocess.run([sys.executable, "-c", EVERY_KIND, *sizes, *map(str, files)], env=env, cwd=ROOT, check=True)
    return files[0].read_text(), files[1].read_text()


def test_collectives_that_a_program_asks_for(texts) -> None:
    assert count_collectives(texts[0], MESH) == KINDS


def test_collectives_of_a_compiled_program(texts) -> None:
    assert count_collectives(texts[1], MESH) == KINDS
    found = collectives(parse(texts[1]), MESH)
    assert [c.times for c in found] == [ROUNDS] * 5
    rows = ROWS * WIDTH * 4  # bytes of one device's rows
    assert sent_bytes(found, MESH) == {
        "fsdp": ROUNDS * (WIDTH * WIDTH * 4 / 2 + rows),  # half a matrix gathered, the rows permuted
        "expert": ROUNDS * (rows / 2 + rows / 2),  # half of the rows exchanged, half of them scattered
        "tensor": ROUNDS * (rows + rows / 4),  # the sum of two is half scattered and half gathered; half of a half
    }


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_bytes_of_an_all_to_all_are_the_sum_of_distances(n: int) -> None:
    away = [min(d, n - d) for d in range(n)]
    assert all_to_all_bytes(n, n, "torus") == sum(away)
    assert all_to_all_bytes(n, n, "switch") == n - 1


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(UserError, match="no ENTRY"):
        parse("func.func @main")


LOOP = """HloModule jit_f, num_partitions=8
%body.1 (p: (s32[], bf16[8,128], s32[])) -> (s32[], bf16[8,128], s32[]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %ag-start = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %ag-done = bf16[64,128]{1,0} all-gather-done(%ag-start)
  ROOT %t = (s32[], bf16[8,128], s32[]) tuple(%next, %x, /*index=2*/%n)
}
%cond.1 (p: (s32[], bf16[8,128], s32[])) -> pred[] {
  %p = (s32[], bf16[8,128]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%all-reduce-scatter.1 (q: bf16[16,128]) -> bf16[8,128] {
  %q = bf16[16,128]{1,0} parameter(0)
  %ar = bf16[16,128]{1,0} all-reduce(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %part = bf16[8,128]{1,0} slice(%ar), slice={[0:8], [0:128]}
}
ENTRY %main (a: bf16[8,128], b: bf16[16,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[16,128]{1,0} parameter(1)
  %three = s32[] constant(3)
  %start = s32[] copy(%three)
  %limit = s32[] constant(LIMIT)
  %first = (s32[], bf16[8,128], s32[]) tuple(%start, %a, /*index=2*/%limit)
  %w = (s32[], bf16[8,128], s32[]) while(%first), condition=%cond.1, body=%body.1
  %f = bf16[8,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(("limit", "rounds"), [(3, 0), (4, 1), (12, 5), (13, 5), (14, 6)])
def test_a_loop_whose_limit_is_carried_and_a_scatter_that_is_a_fusion(limit: int, rounds: int) -> None:
    """What a TPU's program writes: no trip counts, asynchronous starts, a reduce-scatter as a fusion."""
    program = parse(LOOP.replace("LIMIT", str(limit)))
    gather, scatter = collectives(program, {"data": 4, "fsdp": 2})
    assert not program.notes
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", ("data", "fsdp"), rounds)
    assert gather.bytes == 8 * 128 * 2  # what goes in, of the pair that the start returns
    assert gather.sent_bytes() == {"data": rounds * 2 * 2048 * 3, "fsdp": rounds * 2048}
    assert (scatter.kind, scatter.axes, scatter.times) == ("reduce-scatter", ("fsdp",), 1)
    assert scatter.sent_bytes() == {"fsdp": 2048}


def test_a_loop_of_unknown_rounds_is_said() -> None:
    program = parse(LOOP.replace("s32[] constant(LIMIT)", "s32[] custom-call(%a)"))
    assert collectives(program, {"fsdp": 8})[0].times == 1
    assert any("not known" in note for note in program.notes)


SPARSECORE = """HloModule jit_step, num_partitions=8
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %s = bf16[]{:T(256)} add(%a, %b)
}, execution_thread="sparsecore"
%called (p: bf16[128,4096]) -> bf16[128,4096] {
  %p = bf16[128,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %r = bf16[128,4096]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"
%async (p: bf16[128,4096]) -> bf16[128,4096] {
  %p = bf16[128,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %c = bf16[128,4096]{1,0} custom-call(%p), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"
ENTRY %main (x: bf16[128,4096]) -> bf16[128,4096] {
  %x = bf16[128,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %start = ((), (), (s32[512]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %update = ((bf16[128,4096]{1,0}), bf16[128,4096]{1,0}, (s32[512]{0})) async-update(%start, %x), calls=%async
  ROOT %done = bf16[128,4096]{1,0:T(8,128)(2,1)} async-done(%update)
}
"""


def test_a_collective_that_the_sparsecore_runs_is_seen_once() -> None:
    program = parse(SPARSECORE)
    (found,) = collectives(program, {"data": 2, "tensor": 4})
    nbytes = 128 * 4096 * 2
    assert (found.kind, found.axes, found.bytes, found.times) == ("all-reduce", ("tensor",), nbytes, 1)
    assert sent_bytes([found], {"data": 2, "tensor": 4})["tensor"] == 2 * nbytes / 4 * 3
    assert memory_bytes(program) == 2 * nbytes  # read and written once, not by the call around it too
