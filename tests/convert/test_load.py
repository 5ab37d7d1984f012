"""Loading: dtypes, straight into shardings, and no byte more than a process's own."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glm45_jax import convert
from glm45_jax.errors import UserError
from tests.convert.support import flat, make, run_python, same


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    convert.from_hf(make(folder / "hf"), folder / "own")
    return folder


@pytest.mark.parametrize("dtype", ["float32", jnp.float16, np.float32, jnp.bfloat16])
def test_dtype(dtype, made) -> None:
    _, stored = convert.load_checkpoint(made / "own")
    for path in ("own", "hf"):
        config, params = convert.load_checkpoint(made / path, dtype=dtype)
        name = jnp.dtype(dtype).name
        assert (config.dtype, config.param_dtype) == (name, name)
        for leaf, (old, new) in zip(flat(params), zip(flat(stored).values(), flat(params).values())):
            wanted = np.float32 if leaf.endswith("router.bias") else jnp.dtype(dtype)
            assert same(new, np.asarray(old).astype(wanted)), leaf


def test_stored_dtypes_by_default(made) -> None:
    config, params = convert.load_checkpoint(made / "hf")
    dtypes = {leaf: a.dtype for leaf, a in flat(params).items()}
    assert {d for leaf, d in dtypes.items() if not leaf.endswith("router.bias")} == {np.dtype(ml_dtypes.bfloat16)}
    assert dtypes["mtp.block.moe.router.bias"] == np.float32
    assert config.param_dtype == "bfloat16"


def test_other_dtypes_are_refused(made) -> None:
    for dtype in ("int8", "nonsense", jnp.float8_e4m3fn):
        with pytest.raises(UserError, match="choose one of float32, bfloat16, float16"):
            convert.load_checkpoint(made / "own", dtype=dtype)


def test_arrays_may_be_donated(made) -> None:
    """Loaded without a copy, they must still be as good as any other: donated, changed, the file untouched."""
    params = convert.load_checkpoint(made / "own", dtype="float32")[1]["mtp"]["block"]["attention"]
    again = convert.load_checkpoint(made / "own", dtype="float32")[1]["mtp"]["block"]["attention"]
    doubled = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2, tree), donate_argnums=0)(params)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == 2 * np.asarray(b)).all()), doubled, again))
    )


MESHES = """
import json, sys, jax, numpy as np
from glm45_jax import convert, model, parallel
from glm45_jax.convert import pieces
count, whole = [0], pieces.read_exactly
def counting(file, buffer, offset, path):
    count[0] += buffer.size
    whole(file, buffer, offset, path)
pieces.read_exactly = counting
path = sys.argv[1]
config, plain = convert.load_checkpoint(path)
out = []
for sizes in ({"fsdp": 8}, {"expert": 8}, {"tensor": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}, {"data": 8}):
    count[0] = 0
    mesh = parallel.make_mesh(**sizes)
    _, params = convert.load_checkpoint(path, mesh=mesh)
    shardings = model.param_shardings(config, mesh)
    ok = jax.tree.map(lambda a, b, s: a.sharding == s and a.dtype == b.dtype and
                      np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, plain, shardings)
    distinct = sum(shard.data.nbytes for a in jax.tree.leaves(params)
                   for shard in {str(s.index): s for s in a.addressable_shards}.values())
    divided = sum(not a.sharding.is_fully_replicated for a in jax.tree.leaves(params))
    out.append({"ok": all(jax.tree.leaves(ok)), "read": count[0], "distinct": distinct, "divided": divided})
print(json.dumps(out))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("path", ["own", "hf"])
def test_into_meshes(path, made) -> None:
    """Every array in its sharding, each distinct slice read once and nothing else."""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    rows = json.loads(run_python(MESHES, str(made / path), env=env))
    for row in rows:
        assert row["ok"] and row["read"] == row["distinct"], row
    assert [row["divided"] > 0 for row in rows] == [True, True, True, True, False]


PROCESSES = """
import sys, jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from glm45_jax import convert, parallel
from glm45_jax.convert import pieces
import numpy as np
count, whole = [0], pieces.read_exactly
def counting(file, buffer, offset, path):
    count[0] += buffer.size
    whole(file, buffer, offset, path)
pieces.read_exactly = counting
config, params = convert.load_checkpoint(sys.argv[1] + "/own", mesh=parallel.make_mesh(expert=2, fsdp=2))
distinct = [{str(s.index): s.data.nbytes for s in a.addressable_shards} for a in jax.tree.leaves(params)]
own = sum(sum(slices.values()) for slices in distinct)
assert count[0] == own, (count, own)
total = sum(a.nbytes for a in jax.tree.leaves(params))
assert own < 0.75 * total, (own, total)
convert.export_hf(params, config, sys.argv[1] + "/gathered")
convert.save_checkpoint(params, config, sys.argv[1] + "/saved")
jax.experimental.multihost_utils.sync_global_devices("saved")
"""


@pytest.mark.slow
def test_two_processes(made) -> None:
    """Each reads its own half; gathered again by both, the first writes all of it."""
    import os
    import socket
    import subprocess
    import sys

    from tests.convert.support import ROOT, raw_tensors

    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    code = "import jax.experimental.multihost_utils\n" + PROCESSES
    args = [[sys.executable, "-c", code, str(made), address, str(i)] for i in range(2)]
    running = [subprocess.Popen(a, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) for a in args]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert raw_tensors(made / "gathered") == raw_tensors(made / "hf")
    assert convert.verify(made / "saved") == convert.verify(made / "own")
