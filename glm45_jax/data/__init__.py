"""Data: text, JSONL and ArrayRecord files to packed batches, by a deterministic pipeline that can stop and go on."""

from glm45_jax.data.config import DataConfig, SourceConfig
from glm45_jax.data.encode import encode_record
from glm45_jax.data.pipeline import BatchIterator, build_data
from glm45_jax.data.sources import open_source

__all__ = ["BatchIterator", "DataConfig", "SourceConfig", "build_data", "encode_record", "open_source"]
