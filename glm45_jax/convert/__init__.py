"""Checkpoints in and out: Hugging Face's format and our own directory, streamed both ways."""

from glm45_jax.convert.hf_format import export_hf, to_hf
from glm45_jax.convert.hf_source import source_config
from glm45_jax.convert.load import load_checkpoint
from glm45_jax.convert.own_format import Summary, from_hf, save_checkpoint
from glm45_jax.convert.verify import verify

__all__ = ["Summary", "export_hf", "from_hf", "load_checkpoint", "save_checkpoint", "source_config", "to_hf", "verify"]
