"""A Hugging Face checkpoint directory, opened and checked but not loaded: its config, and every array as a `Leaf`.

Every tensor's name, shape and dtype is compared with what the config asks for before a byte of weights is read, and all
that is wrong is told in one error.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.config import EXTRA_KEY, ModelConfig
from glm45_jax.convert import dtypes, files, names, torch_files
from glm45_jax.convert.pieces import AnyLeaf, Constant, Dequantised, FilePiece, Leaf, Piece
from glm45_jax.convert.safetensors_io import read_header
from glm45_jax.errors import UserError

_MOST_LISTED = 200  # of one kind of problem


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    piece: Piece
    file: str


@dataclasses.dataclass(frozen=True)
class Quantised:
    """How the FP8 matrices of a checkpoint are scaled."""

    form: str  # "channel" or "block", the keys of names.SCALE_SUFFIXES
    block: tuple[int, int]  # as config.json has it; a channel is a block of one row

    def of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale in a matrix of shape [..., rows, columns]."""
        return (1, shape[-1]) if self.form == "channel" else self.block


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked checkpoint. `leaves` holds FP8 matrices as codes and, under `PATH_scale`, their scales."""

    path: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    leaves: dict[str, Leaf]
    exact_dtypes: dict[str, str]  # tensors whose dtype is not that of the array they go to
    quantised: Quantised | None
    fingerprint: str
    tensor_count: int

    def dequantised(self) -> dict[str, AnyLeaf]:
        return dequantised(self.leaves, self.quantised)


def dequantised(leaves: dict[str, Leaf], quantised: Quantised | None) -> dict[str, AnyLeaf]:
    """The arrays of the model: FP8 codes and their scales joined into the bfloat16 values that they stand for."""
    out: dict[str, AnyLeaf] = {}
    for path, leaf in leaves.items():
        scales = leaves.get(path + names.SCALE)
        if quantised and scales:
            out[path] = Dequantised(leaf, scales, quantised.of(leaf.shape))
        elif not (quantised and path.endswith(names.SCALE)):
            out[path] = leaf
    return out


def source_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint directory, corrected for the MTP parts that its weights have, and with the number of
    real token ids where a tokenizer.json tells it.

    Reads names of tensors at most: with an index the weights need not be there, and without any the config is taken at
    its word, as is that of our own directory.
    """
    directory, only = _locate(Path(path))
    problems: list[str] = []
    config = _config(directory, files.read_json(directory / "config.json"))
    if (directory / files.MANIFEST).exists():
        return config
    index = next((f for f in (files.HF_INDEX, files.TORCH_INDEX) if (directory / f).exists()), None)
    if index and only is None:
        found = _weight_map(directory / index, problems)
    else:
        found, lost = _tensors(directory, only, problems)
        if lost.everything and not found:
            return config
    if problems:
        raise _error(Path(path), problems)
    return names.with_mtp_of(config, found)


def open_source(path: str | Path) -> Source:
    """Opens and checks a checkpoint: a directory, or one weights file with its config.json beside it.

    Raises:
      UserError: lists everything that is wrong with it.
    """
    directory, only = _locate(Path(path))
    if (directory / files.MANIFEST).exists():
        raise UserError(f"{path}: a checkpoint of our own already; `glm45 convert to-hf` goes the other way")
    hf_config = files.read_json(directory / "config.json")
    problems: list[str] = []
    config = None
    try:
        config = _config(directory, hf_config)
    except UserError as e:
        problems.append(str(e))
    tensors, lost = _tensors(directory, only, problems)
    if config is None:
        raise _error(Path(path), problems)
    tensors = _split_fused(tensors, config, problems)
    config = names.with_mtp_of(config, [*tensors, *lost])
    slots = names.hf_slots(config)
    quantised = _quantised(tensors, hf_config, problems)
    _check(tensors, slots, quantised, lost, problems)
    if problems:
        raise _error(Path(path), problems)
    leaves, exact = _leaves(tensors, slots, config, quantised)
    used = {directory / tensor.file for tensor in tensors.values()}
    mark = files.fingerprint([*used, *files.companions(directory)], hf_config)
    return Source(directory, config, hf_config, leaves, exact, quantised, mark, len(tensors))


def _error(path: Path, problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(f"{path}: {problems[0]}")
    return UserError(f"{path}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))


def _locate(path: Path) -> tuple[Path, str | None]:
    """The checkpoint's directory, and the one weights file that was asked for, if it was."""
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path.name
    raise UserError(
        f"{path}: no such directory. A checkpoint of the hub is fetched first, as with "
        f"`hf download {path if len(path.parts) == 2 else 'zai-org/GLM-4.5-Air'} --local-dir DIR`"
    )


def _config(directory: Path, hf_config: dict[str, Any]) -> ModelConfig:
    config = ModelConfig.from_hf(hf_config)
    if config.real_vocab_size is None:
        config = config.replace(real_vocab_size=_real_vocab_size(directory / "tokenizer.json", config.vocab_size))
    return config


def _real_vocab_size(file: Path, padded: int) -> int | None:
    """One more than the tokenizer's highest id, where that leaves rows of the embedding without a token."""
    if not file.exists():
        return None
    tokenizer = files.read_json(file)
    vocab = (tokenizer.get("model") or {}).get("vocab")
    ids = [i for i in vocab.values() if isinstance(i, int)] if isinstance(vocab, dict) else []
    ids += [token["id"] for token in tokenizer.get("added_tokens") or [] if isinstance(token.get("id"), int)]
    real = max(ids, default=padded - 1) + 1
    return real if real < padded else None


# --- which tensors are there ---------------------------------------------------------------------------------------


def _weight_map(index: Path, problems: list[str]) -> dict[str, str]:
    """{tensor: file} of an index, plain file names only."""
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        problems.append(f"{index.name}: no weight_map")
        return {}
    good = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and file == Path(file).name and file not in ("", ".", ".."):
            good[name] = file
        else:
            problems.append(f"{index.name}: {name} lies in {file!r}, a file of the same directory is expected")
    return good


class Lost(set[str]):
    """Tensors whose absence is explained by a file that is absent or broken: they are not told again one by one."""

    def __init__(self, known: Iterable[str] = (), *, everything: bool = False):
        super().__init__(known)
        self.everything = everything  # a broken file without an index: no telling what it held

    def __contains__(self, name: object) -> bool:
        return name is not None and (self.everything or super().__contains__(name))


def _tensors(directory: Path, only: str | None, problems: list[str]) -> tuple[dict[str, Tensor], Lost]:
    """Every tensor of the checkpoint: safetensors if there are any, else PyTorch files."""
    for index_name, suffixes, read in (
        (files.HF_INDEX, (".safetensors",), _read_safetensors),
        (files.TORCH_INDEX, torch_files.SUFFIXES, _read_torch),
    ):
        index = directory / index_name
        if only is None and index.exists():
            return _indexed(directory, index, read, problems)
        there = [only] if only else sorted(f.name for f in directory.iterdir() if f.is_file())
        weights = [f for f in there if Path(f).suffix in suffixes and f not in torch_files.NOT_WEIGHTS]
        if weights:
            by_file = {file: read(directory / file, problems) for file in weights}
            return _merge(by_file, problems), Lost(everything=not all(by_file.values()))
    problems.append("no weights: neither safetensors nor PyTorch files are there")
    return {}, Lost(everything=True)


def _indexed(directory: Path, index: Path, read: Any, problems: list[str]) -> tuple[dict[str, Tensor], Lost]:
    weight_map = _weight_map(index, problems)
    by_file: dict[str, dict[str, Tensor]] = {}
    for file in sorted(set(weight_map.values())):
        if (directory / file).is_file():
            by_file[file] = read(directory / file, problems)
        else:
            problems.append(f"{index.name} names {file}, which is not there")
    tensors = _merge(by_file, problems)
    lost = Lost(name for name, file in weight_map.items() if not by_file.get(file))
    for name, file in weight_map.items():
        if name in lost:
            continue
        if name not in tensors:
            problems.append(f"{index.name} says that {name} lies in {file}, it does not")
            lost.add(name)
        elif tensors[name].file != file:
            problems.append(f"{index.name} says that {name} lies in {file}, it lies in {tensors[name].file}")
    return tensors, lost


def _merge(by_file: dict[str, dict[str, Tensor]], problems: list[str]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file, tensors in by_file.items():
        for name, tensor in tensors.items():
            if name in merged:
                problems.append(f"duplicate tensor {name}: in {merged[name].file} and in {file}")
            merged[name] = tensor
    return merged


def _read_safetensors(file: Path, problems: list[str]) -> dict[str, Tensor]:
    infos, wrong = read_header(file)
    problems += [f"{file.name}: {what}" for what in wrong]
    path, uint8 = str(file), np.dtype(np.uint8)
    return {
        name: Tensor(
            t.dtype, t.shape, FilePiece(path, t.offset, t.shape, dtypes.BY_NAME.get(t.dtype, uint8)), file.name
        )
        for name, t in infos.items()
    }


def _read_torch(file: Path, problems: list[str]) -> dict[str, Tensor]:
    pieces, wrong = torch_files.read(file)
    problems += [f"{file.name}: {what}" for what in wrong]
    return {name: Tensor(dtypes.NAMES.get(p.dtype, str(p.dtype)), p.shape, p, file.name) for name, p in pieces.items()}


def _split_fused(tensors: dict[str, Tensor], config: ModelConfig, problems: list[str]) -> dict[str, Tensor]:
    """The fused experts of transformers v5 as the per-expert tensors that they are made of, scales too."""
    config = names.with_mtp_of(config, tensors)
    for base, experts in names.fused_parts(config):
        for suffix in ("", *names.SCALE_SUFFIXES.values()):
            fused = tensors.pop(base + suffix, None)
            if fused is None:
                continue
            parts = len(experts[0])
            if len(fused.shape) != 3 or fused.shape[0] != len(experts) or fused.shape[1] % parts:
                rows = "any" if parts == 1 else "an even number"
                expected = f"[{len(experts)} experts, {rows} of rows, columns]"
                problems.append(f"{base + suffix}: shape {list(fused.shape)}, expected {expected}")
                continue
            shape = (fused.shape[1] // parts, fused.shape[2])
            for place, name in enumerate(itertools.chain(*experts)):
                piece = fused.piece.view(shape, place * shape[0] * shape[1])  # pyright: ignore
                if name + suffix in tensors:
                    problems.append(f"duplicate tensor {name + suffix}: in {base + suffix} and by itself")
                tensors[name + suffix] = Tensor(fused.dtype, shape, piece, fused.file)
    return tensors


# --- are they the right ones ---------------------------------------------------------------------------------------


def _quantised(tensors: dict[str, Tensor], hf_config: dict[str, Any], problems: list[str]) -> Quantised | None:
    if not any(tensor.dtype == "F8_E4M3" for tensor in tensors.values()):
        return None
    forms = [
        form
        for form, suffix in names.SCALE_SUFFIXES.items()
        if any(t.dtype == "F8_E4M3" and name + suffix in tensors for name, t in tensors.items())
    ]
    if len(forms) > 1:
        problems.append("FP8 matrices with weight_scale and others with weight_scale_inv: one form is expected")
    block = (hf_config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        problems.append(f"config.json: quantization_config.weight_block_size is {block!r}, two sizes are expected")
        block = [128, 128]
    return Quantised(forms[0] if forms else "channel", (block[0], block[1]))


def _check(
    tensors: dict[str, Tensor],
    slots: dict[str, names.Slot],
    quantised: Quantised | None,
    lost: Lost,
    problems: list[str],
) -> None:
    """Missing, unexpected and wrongly shaped tensors, each kind in the order of its names."""
    missing, wrong = [], []
    expected = {name: slot.shape for name, slot in slots.items()}
    scales = set()
    for name, shape in list(expected.items()):
        tensor = tensors.get(name)
        if quantised and tensor and tensor.dtype == "F8_E4M3" and len(shape) == 2:
            scale = name + names.SCALE_SUFFIXES[quantised.form]
            expected[scale] = dtypes.scale_shape(shape, quantised.of(shape))
            scales.add(scale)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            missing += [] if name in lost else [f"missing tensor {name}, {list(shape)}"]
            continue
        if tensor.shape != shape:
            wrong.append(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        codes = quantised is not None and len(shape) == 2 and name not in scales
        allowed = ("F32", "BF16", "F16") + (("F8_E4M3",) if codes else ())
        if tensor.dtype not in allowed:
            wrong.append(f"{name}: dtype {tensor.dtype}, expected one of {', '.join(allowed)}")
    unexpected = [
        f"unexpected tensor {name} in {tensor.file}"
        for name, tensor in tensors.items()
        if name not in expected and not any(_stem(name, suffix) in lost for suffix in names.SCALE_SUFFIXES.values())
    ]
    for kind in (missing, sorted(unexpected), wrong):
        problems += kind[:_MOST_LISTED]
        if len(kind) > _MOST_LISTED:
            problems.append(f"… and {len(kind) - _MOST_LISTED:,} more such")


def _stem(name: str, suffix: str) -> str | None:
    """The matrix that `name` would be the scale of."""
    return name.removesuffix(suffix) if name.endswith(suffix) else None


# --- the arrays they make ------------------------------------------------------------------------------------------


def _leaves(
    tensors: dict[str, Tensor], slots: dict[str, names.Slot], config: ModelConfig, quantised: Quantised | None
) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The stacked arrays, and the tensors whose dtype is not that of their array."""
    groups: dict[str, dict[tuple[int, ...], tuple[str, Tensor | None]]] = {}
    suffix = names.SCALE_SUFFIXES[quantised.form] if quantised else ""
    scaled = {slots[n].path for n in slots if quantised and tensors[n].dtype == "F8_E4M3"}
    for name, slot in slots.items():
        groups.setdefault(slot.path, {})[slot.index] = (name, tensors[name])
        if slot.path in scaled:
            group = groups.setdefault(slot.path + names.SCALE, {})
            group[slot.index] = (name + suffix, tensors.get(name + suffix))
    leaves, exact = {}, {}
    shapes = names.flat_shapes(config)
    for path, group in groups.items():
        if path in shapes:
            shape = shapes[path].shape
        else:
            assert quantised
            matrices = shapes[path.removesuffix(names.SCALE)].shape
            shape = dtypes.scale_shape(matrices, quantised.of(matrices))
        found = [dtypes.BY_NAME[t.dtype] for _, t in group.values() if t]
        dtype = dtypes.F32 if path.endswith("router.bias") else dtypes.common(found)
        leaves[path] = _stack(shape, dtype, {index: t.piece if t else None for index, (_, t) in group.items()})
        exact |= {name: t.dtype for name, t in group.values() if t and dtypes.BY_NAME[t.dtype] != dtype}
    return leaves, exact


def _stack(shape: tuple[int, ...], dtype: np.dtype, pieces: dict[tuple[int, ...], Piece | None]) -> Leaf:
    lead = len(next(iter(pieces)))
    block = (1,) * lead + shape[lead:]
    laid = {}
    for index, piece in pieces.items():
        grid = index + (0,) * (len(shape) - lead)
        laid[grid] = piece.view(block) if piece else Constant(1.0, dtype)  # pyright: ignore
    return Leaf(shape, dtype, block, laid.__getitem__)


def config_to_keep(source: Source, keep_fp8: bool) -> dict[str, Any]:
    """The source's config.json with all its fields, told what the weights said: MTP parts, padding rows, no FP8."""
    kept = dict(source.hf_config)
    if source.quantised and not keep_fp8:
        kept.pop("quantization_config", None)
        kept.pop("compression_config", None)
    kept["num_nextn_predict_layers"] = source.config.num_nextn_predict_layers
    kept[EXTRA_KEY] = source.config.to_hf()[EXTRA_KEY]
    return kept
