"""`glm45 plan kernels` and `glm45 bench kernels`: what they say, cheaply."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.cli import main
from glm45_jax.config import get_preset
from glm45_jax.plan.kernels import Sizes, cases_of, group_sizes, kernel_cases
from glm45_jax.plan.peers import peers
from pallas_kernels.analysis.timing import random_arrays, time_by_turns

SMALL = ("--rows", "64", "--tokens", "32", "--sequence", "32", "--experts", "4")


def output(capsys, *args: str) -> str:
    assert main(list(args)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_plan_counts_without_compiling(capsys) -> None:
    (forward, dlhs, drhs) = json.loads(
        output(capsys, "plan", "kernels", "--op", "grouped_matmul", "--no-compile", "--json")
    )
    assert forward["case"].startswith("grouped_matmul/forward, [8192, 1408] x [16, 4096, 1408]")
    assert forward["least_bytes"] == 2 * (8192 * 1408 + 16 * 4096 * 1408 + 8192 * 4096) + 16 * 4
    assert forward["flops"] == forward["kernel_flops"] == 2 * 8192 * 4096 * 1408
    for report in (forward, dlhs, drhs):
        assert 1 <= report["bytes_over_least"] < 2 and report["chip"] == "v5p"
        assert report["memory_us"] == pytest.approx(report["counted_bytes"] / 2.77e6)


@pytest.mark.slow
def test_plan_prints_a_table(capsys) -> None:
    out = output(capsys, "plan", "kernels", "--op", "grouped_matmul", "--no-compile", "--chip", "v5e", "v6e")
    assert all(word in out for word in ("grouped_matmul", "forward", "drhs", "v5e", "v6e", "least"))


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_an_unknown_preset_is_the_users_error(command: str, capsys) -> None:
    assert main([command, "kernels", "--model", "glm-5"]) == 2
    assert "glm-4.5-air" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_times_the_implementations_by_turns(capsys) -> None:
    args = ("bench", "kernels", "--op", "grouped_matmul", "--model", "tiny", "--seconds", "0", *SMALL)
    rows = json.loads(output(capsys, *args, "--json"))["rows"]
    directions, names = ("forward", "dlhs", "drhs"), ("reference", "cpu", "dense, one matrix")
    expected = {(f"grouped_matmul/{d}", name) for d in directions for name in names}
    assert {(r["case"].split(",")[0], r["implementation"]) for r in rows} == expected
    for row in rows:
        assert row["calls"] >= 3 and row["seconds"] >= row["fastest_seconds"] > 0
        assert row["share_of_bound"] > 0 and row["bound"] in ("products", "memory") and row["peak_measured"]
    assert "speed-up" in output(capsys, *args)


@pytest.mark.slow
def test_the_dense_product_beside_a_grouped_one_is_the_same_work() -> None:
    """With all rows in the first group, it gives what the kernel gives."""
    for case in kernel_cases("tiny", "grouped_matmul", "cpu", rows=24, experts=4, dtype="float32"):
        arguments = list(random_arrays(case.arguments))
        arguments[2] = jnp.array([24, 0, 0, 0], jnp.int32)
        dense = peers(case, "cpu")["dense, one matrix"](*arguments)
        own = case.function(*arguments)
        np.testing.assert_allclose(dense, own[0] if own.ndim == 3 else own, atol=1e-5)


@pytest.mark.slow
def test_only_the_implementations_asked_for_are_timed(capsys) -> None:
    args = ("bench", "kernels", "--op", "fused_moe", "--implementation", "cpu", "--model", "tiny", "--seconds", "0")
    rows = json.loads(output(capsys, *args, *SMALL, "--json"))["rows"]
    assert {r["implementation"] for r in rows} == {"cpu"} and rows[0]["times_the_reference"] is None


def test_what_cannot_run_is_said() -> None:
    def broken(x):
        raise NotImplementedError("not here")

    times = time_by_turns({"double": lambda x: x * 2, "broken": broken}, (jnp.ones(4),), seconds=0)
    assert times["broken"] == "NotImplementedError: not here" and len(times["double"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["glm-4.5", "glm-4.5-air"])
def test_every_call_is_as_its_figures_say(model: str) -> None:
    """The least bytes hold the results, as shapes say; steering arrays are concrete and fit."""
    import jax

    from glm45_jax.plan.kernels import nbytes

    cases = kernel_cases(model)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        out = jax.eval_shape(case.function, *case.arguments)
        if case.op != "paged_attention":  # which returns the whole cache, of which little changes
            assert nbytes(out) < case.least_bytes
        assert case.flops > 0


@pytest.mark.slow
def test_the_calls_run() -> None:
    """At small sizes, every call of `plan` and `bench` computes something finite."""
    import jax

    for case in kernel_cases("tiny", rows=64, tokens=32, sequence=32, experts=4, decoded=(1, 4), dtype="float32"):
        out = jax.jit(case.function)(*random_arrays(case.arguments))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out)), case.name


@pytest.mark.slow
@pytest.mark.parametrize("which", ["decode", "mixed"])
def test_what_plan_counts_is_what_the_interpreter_performs(which: str) -> None:
    """For the kernel that moves everything by copies of its own, at small widths."""
    from pallas_kernels.analysis import count_traffic, performed_copies
    from pallas_kernels.analysis.traffic import described

    config = get_preset("tiny", num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    sizes = Sizes(decoded=(3,), tokens=48, sequence=48, page_size=16, dtype="float32")
    (case,) = [c for c in cases_of(config, sizes, "paged_attention", "tpu") if f"/{which}," in c.name]
    with described("v5p"):
        performed = performed_copies(case.function, *random_arrays(case.arguments))
    (kernel,) = count_traffic(case.function, *case.arguments, chip="v5p").kernels
    own = [o for o in kernel.operands if not o.fetches]
    assert performed.copies == kernel.copies_started > 0
    assert performed.read_bytes == sum(o.read_bytes for o in own)
    assert performed.written_bytes == sum(o.written_bytes for o in own)


def test_groups() -> None:
    assert group_sizes(8192, 16, "balanced").tolist() == [512] * 16
    assert sorted(group_sizes(10, 4, "balanced")) == [2, 2, 3, 3]
    zipf = group_sizes(8192, 16, "zipf")
    assert zipf.sum() == 8192 and zipf[0] == pytest.approx(2 * zipf[1], abs=1) and (np.diff(zipf) <= 1).all()
    assert sorted(group_sizes(8192, 16, "one")) == [0] * 15 + [8192]
    with pytest.raises(ValueError, match="zipf"):
        group_sizes(1, 1, "some")


@pytest.mark.slow
def test_plan_of_skewed_groups(capsys) -> None:
    """All rows on one expert: the other experts' weights need not be read, nor are they counted as needed."""
    args = ("plan", "kernels", "--op", "grouped_matmul", "--no-compile", "--json", "--groups")
    balanced, one = (json.loads(output(capsys, *args, how))[0] for how in ("balanced", "one"))
    assert balanced["least_bytes"] - one["least_bytes"] == 15 * 4096 * 1408 * 2
    assert one["counted_bytes"] < balanced["counted_bytes"]
