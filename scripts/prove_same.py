"""The same requests have the same greedy answers, however they are served.

    python scripts/prove_same.py --json docs/proofs/same.json
    python scripts/prove_same.py --checkpoint runs/mini/model --requests 24

A small model in float32 and requests of odd lengths with common beginnings, some with grammars, are served one by one;
then all at once, in random order with random delays, in small chunks, with too little cache, without the prefix cache,
with drafts, and on meshes of eight virtual devices. All answers are compared with the first run's, token for token. A
first difference is allowed only where the two tokens' logits, by `forward`, lie less than 1e-4 apart; those places are
counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from circumstances import circumstances, write_figures

import glm45_jax as glm
from glm45_jax.infer import Engine, EngineOptions
from glm45_jax.infer.grammar import json_source, regex_source
from glm45_jax.parallel import SERVING_RULES, make_mesh
from glm45_jax.text import Tokenizer

ROOT = Path(__file__).parents[1]
NEAR = 1e-4  # of two logits that rounding may put into another order
SCHEMA = {
    "type": "object", "properties": {"cat": {"enum": ["sat", "ran"]}, "mats": {"type": "array", "maxItems": 2}},
    "required": ["cat", "mats"], "additionalProperties": False,
}  # fmt: skip
BASE: dict[str, Any] = {"slots": 8, "cache_tokens": 4096, "page_size": 8, "step_tokens": 64, "warm_up": False}


@dataclasses.dataclass(frozen=True)
class Options:
    """A proof."""

    requests: int = 40
    seeds: int = 3
    """Random orders of arrival."""
    checkpoint: Path | None = None
    """A trained model; without it a small random one."""
    json: Path | None = None
    """Where to write the figures."""
    mesh_run: str | None = None
    """For the script itself: one run on a mesh, as a process with eight devices; answers go to standard output."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. `grammar`: a source, or None."""

    prompt: list[int]
    most: int
    grammar: str | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to serve them.

    Attributes:
      sizes: what differs from `BASE`.
      seed: of the order and the delays; None: as they stand, all at once.
      alone: each when the one before has ended.
      mesh: axes of eight virtual devices; empty: one device.
      must: counts of the engine's that must not be 0, or the run shows nothing.
    """

    name: str
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    alone: bool = False
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    must: tuple[str, ...] = ()


def runs(seeds: int, longest: int) -> list[Run]:
    """All ways. The first is what the others are compared with. `longest`: tokens of a prompt with its answer."""
    little = {"cache_tokens": longest * 5 // 4, "page_size": 4}
    drafts = ("drafts_given", "drafts_accepted")
    found = [
        Run("one by one, without prefix cache", {"prefix_cache": False}, alone=True),
        Run("one by one", alone=True, must=("prefix_tokens_found",)),
        Run("all at once", must=("prefix_tokens_found",)),
        Run("all at once, without prefix cache", {"prefix_cache": False}),
        *(Run(f"random arrival {seed}", seed=seed, must=("prefix_tokens_found",)) for seed in range(seeds)),
        Run("chunks of 5 tokens", {"slots": 5, "step_tokens": 5, "page_size": 3}, seed=seeds),
        Run("one slot", {"slots": 1, "step_tokens": 7}),
        Run("little cache", little, must=("preempted",)),
        Run(
            "little cache, without prefix cache", little | {"prefix_cache": False}, seed=seeds + 1, must=("preempted",)
        ),
        Run("1 draft", {"drafts": 1}, must=drafts),
        Run("3 drafts", {"drafts": 3}, seed=seeds + 2, must=drafts),
        Run("3 drafts, little cache", little | {"drafts": 3}, must=("preempted", "drafts_given")),
        Run("3 drafts, one by one, without prefix cache", {"drafts": 3, "prefix_cache": False}, alone=True),
    ]
    meshes = ({"tensor": 8}, {"expert": 8}, {"expert": 4, "tensor": 2}, {"expert": 2, "tensor": 4})
    for mesh in meshes:
        found.append(Run("8 devices: " + ", ".join(f"{k} {v}" for k, v in mesh.items()), seed=seeds + 3, mesh=mesh))
    found.append(Run("8 devices, 3 drafts, little cache", little | {"drafts": 3}, mesh=meshes[2], must=("preempted",)))
    return found


# --- the model and what is asked -----------------------------------------------------------------------------------


def model(checkpoint: Path | None) -> tuple[Any, Any, Tokenizer]:
    """Config, parameters in float32, tokenizer."""
    if checkpoint is not None:
        return *glm.load_checkpoint(checkpoint, dtype="float32"), Tokenizer.load(checkpoint)
    from tests.support import random_params, small_config, small_tokenizer

    tokenizer = small_tokenizer()
    config = small_config(
        num_hidden_layers=3, hidden_size=64, vocab_size=384, max_position_embeddings=512, num_attention_heads=8,
        num_nextn_predict_layers=1, eos_token_id=tokenizer.eos_ids,
    )  # fmt: skip
    return config, agreeing(random_params(config)), tokenizer


def agreeing(params: Any) -> Any:
    """A random model whose MTP layer is sometimes right: both look mostly at the newest token."""

    def smaller(path: Any, x: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        adds = names[-1] == "down" or names[-2] in ("o", "down")
        return x * 0.25 if adds else x

    params = jax.tree_util.tree_map_with_path(smaller, params)
    width = params["embed"]["weight"].shape[1]
    params["mtp"]["eh_proj"]["weight"] = jax.numpy.eye(width, 2 * width) + 0.1 * params["mtp"]["eh_proj"]["weight"]
    params["mtp"]["norm"] = params["final_norm"]
    return params


def asks_of(count: int, vocab: int, seed: int = 0) -> list[Ask]:
    """Prompts of odd lengths, three out of four with one of three beginnings; every fifth with a grammar."""
    rng = random.Random(seed)
    tokens = lambda n: [rng.randrange(vocab) for _ in range(n)]  # noqa: E731
    beginnings = [tokens(n) for n in (17, 41, 67)]
    grammars = [json_source(SCHEMA), regex_source("(the|cat|sat|dog|ran| )+")]
    found = []
    for i in range(count):
        shared = beginnings[i % 3][: rng.randrange(1, 68)] if i % 4 else []
        prompt = shared + tokens(rng.randrange(1, 30, 2))
        found.append(Ask(prompt, rng.randrange(3, 40), grammars[i // 5 % 2] if i % 5 == 4 else None))
    return found


# --- one run -------------------------------------------------------------------------------------------------------


def serve(run: Run, params: Any, config: Any, tokenizer: Tokenizer, asks: list[Ask]) -> dict[str, Any]:
    """Answers in the order of `asks`, and the engine's counts. Under the run's mesh, if it has one."""
    options = EngineOptions(**BASE | {"cache_dtype": "float32"} | run.sizes)
    order, rng = list(range(len(asks))), random.Random(run.seed)
    if run.seed is not None:
        rng.shuffle(order)
    requests: dict[int, Any] = {}
    with Engine(params, config, tokenizer=tokenizer, options=options) as engine:
        engine._drafting.begins = lambda rows, without: options.drafts > 0  # whatever the clock says
        engine._drafting.goes_on = lambda rows, drafting: True
        for i in order:
            ask = asks[i]
            grammar = engine.grammars.compile(ask.grammar) if ask.grammar else None
            requests[i] = engine.submit(ask.prompt, ask.most, grammar=grammar)
            if run.alone:
                requests[i].result()
            if run.seed is not None and rng.random() < 0.25:  # some come together, or a quick machine has one at a time
                time.sleep(rng.random() * 0.1)
        answers = [requests[i].result().answer for i in range(len(asks))]
        stats = engine.stats()
    idle = [name for name in run.must if not stats[name]]
    if idle:
        raise SystemExit(f"{run.name}: {idle} are 0, so that the run shows nothing")
    return {"answers": answers, "stats": stats}


def serve_on_mesh(run: Run, options: Options) -> dict[str, Any]:
    """`serve` by a process with eight devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, "--requests", str(options.requests), "--seeds", str(options.seeds)]
    command += ["--checkpoint", str(options.checkpoint)] if options.checkpoint else []
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*command, "--mesh-run", run.name], env=env, cwd=ROOT, stdout=-1, stderr=errors, text=True
        )
        errors.seek(0)
        if done.returncode:
            raise SystemExit(f"{run.name}: {errors.read()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def mesh_run(run: Run, options: Options) -> None:
    """What `serve_on_mesh` starts."""
    config, params, tokenizer = model(options.checkpoint)
    asks = asks_of(options.requests, tokenizer.vocab_size)
    config = config.replace(parallel=dataclasses.replace(config.parallel, rules=SERVING_RULES))
    mesh = make_mesh(**run.mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, glm.model.param_shardings(config, mesh))
        print(json.dumps(serve(run, placed, config, tokenizer, asks)))


# --- comparing -----------------------------------------------------------------------------------------------------


def differences(
    want: list[list[int]], got: list[list[int]], asks: list[Ask], logits_of: Callable[[list[int]], np.ndarray]
) -> list[dict[str, Any]]:
    """The first place of each answer that differs: which request, where, and how far apart the two logits lie."""
    found = []
    for number, (a, b, ask) in enumerate(zip(want, got, asks, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            if len(a) != len(b):  # the same tokens must end alike
                found.append({"request": number, "place": min(len(a), len(b)), "gap": None})
            continue
        logits = logits_of(ask.prompt + a[:at])
        found.append({"request": number, "place": at, "gap": abs(float(logits[a[at]] - logits[b[at]]))})
    return found


def forward_logits(params: Any, config: Any) -> Callable[[list[int]], np.ndarray]:
    """The logits after a text, by `forward`."""

    def of(tokens: list[int]) -> np.ndarray:
        return np.asarray(glm.forward(params, config, np.asarray([tokens], np.int32)).logits[0, -1], np.float32)

    return of


def near_ties(want: list[list[int]], asks: list[Ask], params: Any, config: Any) -> dict[str, Any]:
    """Over all places of the answers without a grammar: how close the two likeliest tokens come."""
    run = jax.jit(lambda p, t: jax.lax.top_k(glm.forward(p, config, t).logits[0], 2)[0])
    gaps: list[float] = []
    longest = max(len(ask.prompt) + len(answer) for ask, answer in zip(asks, want))
    for ask, answer in zip(asks, want):
        if ask.grammar is None:
            tokens = np.zeros((1, longest), np.int32)
            tokens[0, : len(ask.prompt) + len(answer)] = ask.prompt + answer
            top = np.asarray(run(params, tokens))[len(ask.prompt) - 1 : len(ask.prompt) + len(answer) - 1]
            gaps += (top[:, 0] - top[:, 1]).tolist()
    return {"places": len(gaps), "below_1e-4": sum(gap < NEAR for gap in gaps), "smallest": min(gaps)}


def judged(run: Run, found: dict[str, Any], want: list[list[int]], asks: list[Ask], logits_of: Any) -> dict[str, Any]:
    """A line of the proof."""
    unlike = differences(want, found["answers"], asks, logits_of)
    wrong = [one for one in unlike if one["gap"] is None or not one["gap"] < NEAR]
    names = ("steps", "preempted", "prefix_tokens_found", "drafts_given", "drafts_accepted")
    return {
        "run": run.name, "same": len(asks) - len(unlike), "different_at_a_near_tie": len(unlike) - len(wrong),
        "wrong": len(wrong), "differences": unlike, **{name: found["stats"][name] for name in names},
    }  # fmt: skip


def main() -> int:
    options = tyro.cli(Options)
    config, params, tokenizer = model(options.checkpoint)
    asks = asks_of(options.requests, tokenizer.vocab_size)
    ways = runs(options.seeds, max(len(ask.prompt) + ask.most for ask in asks))
    if options.mesh_run is not None:
        mesh_run(next(run for run in ways if run.name == options.mesh_run), options)
        return 0
    before, lines, want, logits_of = (
        circumstances("jax", "jaxlib", "llguidance"),
        [],
        [],
        forward_logits(params, config),
    )
    for run in ways:
        found = serve_on_mesh(run, options) if run.mesh else serve(run, params, config, tokenizer, asks)
        want = want or found["answers"]
        lines.append(judged(run, found, want, asks, logits_of))
        print(json.dumps(lines[-1]), flush=True)
    wrong = sum(line["wrong"] for line in lines)
    figures = {
        "circumstances": before, "model": str(options.checkpoint or "small, random"), "requests": len(asks),
        "tokens_of_each_run": sum(map(len, want)), "wrong": wrong,
        "different_at_a_near_tie": sum(line["different_at_a_near_tie"] for line in lines),
        "gaps_of_the_two_likeliest": near_ties(want, asks, params, config), "runs": lines,
    }  # fmt: skip
    write_figures(options.json, figures)
    print(json.dumps({name: value for name, value in figures.items() if name != "runs"}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
