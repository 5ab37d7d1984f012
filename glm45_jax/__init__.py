"""GLM-4.5 in JAX: one pure-functional model for training, fine-tuning, decoding and serving."""

__version__ = "0.1.0"
