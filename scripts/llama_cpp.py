"""llama.cpp's server beside ours: a checkpoint written as GGUF in float32, the server started, requests sent to it.

Its sources come with llama-cpp-python (`pip download --no-deps --no-binary :all: llama-cpp-python`), in
vendor/llama.cpp:

    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build build --target llama-server

Needs the package `gguf`. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# Behind "model.layers.N." in the one, and "blk.N." in the other.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "post_attention_norm.weight",
    **{f"self_attn.{c}_proj.{kind}": f"attn_{c}.{kind}" for c in "qkv" for kind in ("weight", "bias")},
    **{f"self_attn.{c}_norm.weight": f"attn_{c}_norm.weight" for c in "qk"},
    "self_attn.o_proj.weight": "attn_output.weight", "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{c}_proj.weight": f"ffn_{c}.weight" for c in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{c}_proj.weight": f"ffn_{c}_shexp.weight" for c in ("gate", "up", "down")},
}  # fmt: skip
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip


def write_gguf(checkpoint: Path, target: Path, end: int) -> None:
    """A checkpoint in Hugging Face's format without its MTP layer.

    Its tokens are their numbers' names. `end`: of the token that ends an answer, which there has to be; give one that
    no answer has.
    """
    import gguf
    from safetensors import safe_open

    from glm45_jax.config import ModelConfig

    config = ModelConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    writer = gguf.GGUFWriter(str(target), "glm4moe")
    _write_config(writer, config)
    writer.add_eos_token_id(end)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            _write_tensors(writer, tensors, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: Any, config: Any) -> None:
    import gguf

    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(int(config.head_dim * config.partial_rotary_factor))
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list([f"{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["0 0"])


def _write_tensors(writer: Any, tensors: Any, config: Any) -> None:
    """Those of one file, which has all experts of a layer."""
    names = set(tensors.keys())
    for name in sorted(names):
        if name in _OUTSIDE:
            writer.add_tensor(_OUTSIDE[name], tensors.get_tensor(name).astype(np.float32))
            continue
        number, inside = name.removeprefix("model.layers.").split(".", 1)
        if inside in _LAYER and int(number) < config.num_hidden_layers:
            writer.add_tensor(f"blk.{number}.{_LAYER[inside]}", tensors.get_tensor(name).astype(np.float32))
    for number in range(config.first_k_dense_replace, config.num_hidden_layers):
        for part in ("gate", "up", "down"):
            each = [f"model.layers.{number}.mlp.experts.{e}.{part}_proj.weight" for e in range(config.n_routed_experts)]
            if names.issuperset(each):
                stack = np.stack([tensors.get_tensor(name).astype(np.float32) for name in each])
                writer.add_tensor(f"blk.{number}.ffn_{part}_exps.weight", stack)


@contextlib.contextmanager
def serving(server: Path, model: Path, requests: int, tokens: int, threads: int) -> Iterator[str]:
    """The address of a server that takes so many requests at once, of so many tokens each; keys and values in
    float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        server, "-m", model, "--host", "127.0.0.1", "--port", port, "-np", requests, "-c", requests * tokens,
        "-t", threads, "-tb", threads, "-ctk", "f32", "-ctv", "f32", "--no-webui", "-lv", 0,
        "-b", 4096, "-ub", 2048,
    ]  # fmt: skip
    process = subprocess.Popen([str(x) for x in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            if process.poll() is not None:
                raise SystemExit(f"{server} ended with {process.returncode}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def completing(address: str, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    """Sends all prompts at once and returns what was chosen greedily after each."""

    def ask(prompt: list[int]) -> list[int]:
        body = {
            "prompt": prompt, "n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True, "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    pool = ThreadPoolExecutor(len(prompts))
    return lambda: list(pool.map(ask, prompts))
