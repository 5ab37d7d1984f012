"""The engine on the device at hand, with random weights of a preset's widths: tokens per second, and what it costs.

    python scripts/bench_engine.py --preset glm-4.5-air --layers 8 --slots 128 --prompt 1024 --new 256
    python scripts/bench_engine.py --preset glm-4.5-air --layers 8 --slots 1 8 32 --drafts 1 --json engine.json
    python scripts/bench_engine.py --preset tiny --slots 4 --prompt 32 --new 16

All requests come at once. Beside the engine stand its own compiled steps, called one after another with nothing around
them; the rest is what the engine's planning costs.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures


@dataclasses.dataclass(frozen=True)
class Options:
    """One run; each number of slots is a row."""

    preset: str = "tiny"
    layers: int | None = None
    """Instead of the preset's, so that it fits one device."""
    slots: tuple[int, ...] = (8,)
    """Requests at a time."""
    prompt: int = 64
    new: int = 64
    drafts: int = 0
    quantize: str | None = None
    """Of the weights, such as int8 or fp8."""
    cache_dtype: str | None = None
    step_tokens: int = 2048
    dtype: str | None = None
    warm_up: bool = True
    """Compile all sizes at the start; without, those that the run needs, in a first run that does not count."""
    json: Path | None = None
    """Write the figures here."""


def make(options: Options) -> tuple[Any, Any]:
    """Config and random weights, made on the device and quantised there."""
    import jax

    from glm45_jax.config import get_preset
    from glm45_jax.model import init_params

    changes: dict[str, Any] = {"num_hidden_layers": options.layers} if options.layers else {}
    changes |= {"dtype": options.dtype} if options.dtype else {}
    config = get_preset(options.preset, **changes)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    if options.quantize:
        from glm45_jax.model.quantize import quantize_params

        params = quantize_params(params, config, options.quantize)
    return config, params


def bench(options: Options, config: Any, params: Any, slots: int) -> dict[str, Any]:
    import numpy as np

    from glm45_jax.infer import Engine, EngineOptions

    room = slots * (options.prompt + options.new + 32)
    step = max(options.step_tokens, slots * (1 + options.drafts))
    sizes = EngineOptions(
        slots=slots, cache_tokens=room, step_tokens=step, drafts=options.drafts, cache_dtype=options.cache_dtype,
        warm_up=options.warm_up,
    )  # fmt: skip
    rng, began = np.random.default_rng(0), time.monotonic()
    with Engine(params, config, options=sizes) as engine:
        row: dict[str, Any] = {"slots": slots, "seconds_to_start": time.monotonic() - began}
        prompts = rng.integers(0, config.vocab_size, (slots, options.prompt)).tolist()
        engine.generate_batch(prompts, 2 if options.warm_up else options.new, stop_ids=[])
        engine.update_params(params)  # nothing is found in the cache
        before, began = engine.stats(), time.monotonic()
        requests = [engine.submit(prompt, options.new, stop_ids=[]) for prompt in prompts]
        first = [next(iter(request)) and time.monotonic() - began for request in requests]
        for request in requests:
            request.result()
        seconds, after = time.monotonic() - began, engine.stats()
        row["bare_step_seconds"] = bare_step(engine, slots, options.prompt + options.new // 2)
    decoding = seconds - max(first)
    tokens = slots * (options.new - 1)
    return row | {
        "seconds": seconds, "tokens_per_second": slots * options.new / seconds, "last_first_token_seconds": max(first),
        "decode_tokens_per_second": tokens / decoding, "seconds_per_token": decoding / (options.new - 1),
        "share_of_bare_steps": row["bare_step_seconds"] * (options.new - 1) / decoding if not options.drafts else None,
        "steps": after["steps"] - before["steps"], "compiled_in_service": after["compiled_in_service"],
        "drafts_given": after["drafts_given"], "drafts_accepted": after["drafts_accepted"],
    }  # fmt: skip


def bare_step(engine: Any, slots: int, length: int, repeats: int = 20) -> float:
    """Seconds of a decoding step of all slots over sequences of `length` tokens, nothing around it.

    Tokens are drawn: equal ones would go to the same few experts, and the weights of the others would not be read.
    """
    import jax
    import numpy as np

    from glm45_jax.parallel import device_in_force

    rows, tokens = engine.options.size(slots, slots, 0)
    reading = engine._reading([], rows, tokens)
    pages = np.arange(reading.page_table.size, dtype=np.int32).reshape(reading.page_table.shape) % engine._pool.count
    live = np.arange(rows + 1, dtype=np.int32)
    drawn = np.random.default_rng(1).integers(0, engine.config.vocab_size, tokens, np.int32)
    reading = reading._replace(
        tokens=drawn, starts=live, lengths=np.full(rows, length, np.int32), page_table=pages, num_rows=np.int32(rows)
    )
    outcome, times = None, []
    for _ in range(3):
        began = time.monotonic()
        with device_in_force(engine._programs.params):  # as in the engine's thread
            for _ in range(repeats):
                outcome = engine._step(reading, [], [], 0, "plain", top=False)
        jax.block_until_ready(outcome)
        times.append((time.monotonic() - began) / repeats)
    return statistics.median(times)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    import jax

    about = circumstances("jax") | {"device": str(jax.devices()[0].device_kind)}
    config, params = make(options)
    rows = []
    for slots in options.slots:
        rows.append(bench(options, config, params, slots))
        print(json.dumps(rows[-1]), flush=True)
    given = dataclasses.asdict(options) | {"json": None}
    write_figures(options.json, about | {"options": given, "rows": rows})


if __name__ == "__main__":
    main()
