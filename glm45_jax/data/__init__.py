"""Data: text, JSONL, Parquet and ArrayRecord files to packed batches, by a deterministic pipeline that can stop, and go
on with another number of processes."""

from glm45_jax.data.config import DataConfig, SourceConfig
from glm45_jax.data.encode import encode_record
from glm45_jax.data.pipeline import BatchIterator, build_data, count_shards, merge_states, owned_shards
from glm45_jax.data.sources import open_source

__all__ = [
    "BatchIterator",
    "DataConfig",
    "SourceConfig",
    "build_data",
    "count_shards",
    "encode_record",
    "merge_states",
    "open_source",
    "owned_shards",
]
