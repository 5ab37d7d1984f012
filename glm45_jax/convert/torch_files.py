"""PyTorch's own checkpoint files, where torch is installed: tensors alone, never anything that would run code."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.convert import dtypes
from glm45_jax.convert.pieces import Index
from glm45_jax.errors import UserError

SUFFIXES = (".bin", ".pt", ".pth")
# what trainers leave beside the weights
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


@dataclasses.dataclass(frozen=True, slots=True)
class TorchPiece:
    """A torch tensor, or a contiguous part of one, read as a numpy array."""

    tensor: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    skip: int = 0

    def read(self, index: Index, out: np.ndarray) -> None:
        import torch

        flat = self.tensor.contiguous().view(torch.uint8).reshape(-1).numpy().view(self.dtype)
        out[...] = flat[self.skip : self.skip + math.prod(self.shape)].reshape(self.shape)[index]

    def view(self, shape: tuple[int, ...], skip: int = 0) -> TorchPiece:
        return dataclasses.replace(self, shape=shape, skip=self.skip + skip)


def read(file: Path) -> tuple[dict[str, TorchPiece], list[str]]:
    """The tensors of one file, mapped rather than loaded where its format allows, and what is wrong with it."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading PyTorch files needs torch: pip install torch") from None
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises its own mix of errors for corrupt files and for refused pickles
        reason = str(e).strip().splitlines()
        return {}, [f"not a file of tensors that torch loads with weights_only=True ({reason[0] if reason else e!r})"]
    if not isinstance(state, dict):
        return {}, [f"holds a {type(state).__name__}, a dict of tensors is expected"]
    known = {
        torch.float32: dtypes.F32,
        torch.bfloat16: dtypes.BF16,
        torch.float16: dtypes.F16,
        torch.float8_e4m3fn: dtypes.F8,
    }
    pieces, problems = {}, []
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            problems.append(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        elif tensor.dtype not in known:
            problems.append(f"{name}: dtype {tensor.dtype} is none of a checkpoint's")
        else:
            pieces[str(name)] = TorchPiece(tensor, tuple(tensor.shape), known[tensor.dtype])
    return pieces, problems
