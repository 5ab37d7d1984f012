"""Greedy continuations equal transformers', token by token, for every oracle."""

from __future__ import annotations

import numpy as np
import pytest

import glm45_jax as glm
from tests.support import oracle_paths

FAST = {"air", "raw_weights", "golden_b_glm45_bf16"}


@pytest.mark.few(1)
@pytest.mark.parametrize("path", oracle_paths("gen_full", fast=FAST))
def test_greedy_tokens(path, oracles) -> None:
    """Full prompts and, in the same batch, the shorter ones that transformers was given padded on the left."""
    o = oracles(path)
    ragged = [row[mask == 1] for row, mask in zip(o["gen_left_prompt"], o["gen_left_mask"])]
    expected = [row.tolist() for row in o["gen_full"]]
    expected += [row[len(row) - new_tokens(o) - len(p) :].tolist() for row, p in zip(o["gen_left"], ragged)]
    prompts = [row.tolist() for row in o["gen_prompt"]] + [row.tolist() for row in ragged]
    out = glm.generate(o.params, o.config, prompts, max_new_tokens=new_tokens(o), temperature=0.0)
    assert [list(map(int, row)) for row in out] == expected


def new_tokens(o) -> int:
    return o["gen_full"].shape[1] - o["gen_prompt"].shape[1]


def test_the_oracles_do_not_stop_early() -> None:
    for path in oracle_paths("gen_full"):
        with np.load(path.values[0] / "oracle.npz") as file:
            assert file["gen_full"].shape[1] > file["gen_prompt"].shape[1]
