"""Decoding: sampling, batches of prompts to answers, text streamed as it comes, many requests at once."""

from glm45_jax.infer.engine import Engine
from glm45_jax.infer.evaluate import Comparison, Perplexity, compare, perplexity
from glm45_jax.infer.following import follow
from glm45_jax.infer.generate import Generation, TextStream, generate, generate_detailed, stream
from glm45_jax.infer.options import EngineOptions
from glm45_jax.infer.request import Delta, EngineClosed, Request
from glm45_jax.infer.sampling import SamplingOptions, SamplingParams, TokenCounts, sample, sampling_params

__all__ = [
    "Comparison",
    "Delta",
    "Engine",
    "EngineClosed",
    "EngineOptions",
    "Generation",
    "Perplexity",
    "Request",
    "SamplingOptions",
    "SamplingParams",
    "TextStream",
    "TokenCounts",
    "compare",
    "follow",
    "generate",
    "generate_detailed",
    "perplexity",
    "sample",
    "sampling_params",
    "stream",
]
