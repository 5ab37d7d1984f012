"""Training checkpoints: the whole state and the place in the data, written by Orbax while training goes on.

A checkpoint is whole or absent: Orbax writes it under a temporary name and renames it. All that a run needs to go on
bit for bit is there: parameters (the routers' selection bias among them), optimizer, step, random key, data position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from orbax.checkpoint.checkpoint_managers import LatestN

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model import Params
from glm45_jax.train.step import TrainState

# Compute fields may change when a run goes on; these decide what the parameters are.
_COMPUTE_FIELDS = {"dtype", "remat", "implementation", "parallel"}

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, by step; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any] | None, model: ModelConfig) -> None:
        """Starts saving; returns when the state may be changed again."""
        about = {"data": data, "model": dataclasses.asdict(model)}
        saving = ocp.args.Composite(state=ocp.args.StandardSave(_to_saved(state)), about=ocp.args.JsonSave(about))
        with self._explained():  # also of the save before, which ran beside the steps
            self._manager.save(int(state.step), args=saving)

    def restore(
        self, like: TrainState, model: ModelConfig, may_differ: Collection[str] = ()
    ) -> tuple[TrainState, dict[str, Any] | None] | None:
        """State and data position of the newest checkpoint that can be read; None where there is none.

        One that cannot be read (a damaged disk, a copy cut short) is put aside as `STEP.damaged`, and said.

        Args:
          like: the state's shapes, dtypes and shardings.
          may_differ: fields of the model that may be others than the checkpoint's.

        Raises:
          UserError: the checkpoint is of another model, or none of several can be read.
        """
        failures: dict[Path, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            try:
                about = self._read(step, about=ocp.args.JsonRestore())
                _check_model(about["model"], model, folder, may_differ)
                state = self._read(step, state=ocp.args.StandardRestore(_to_saved(like)))
            except UserError:
                raise
            except Exception as error:  # whatever tensorstore and Orbax make of a broken file
                failures[folder] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            self._put_aside(failures)
            return _from_saved(state), about["data"]
        if failures:
            raise UserError(
                "no checkpoint of this run can be read; mend them, or move the folder away to start anew:\n  "
                + "\n  ".join(f"{folder}: {why}" for folder, why in failures.items())
            )
        return None

    def wait(self) -> None:
        """Until what is being saved is whole on disk."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder gone, or what Orbax makes of them
            raise UserError(
                f"saving a checkpoint in {self._folder} failed: {type(error).__name__}: {str(error)[:300]}. "
                "Is the disk full? The same command goes on from the newest whole checkpoint"
            ) from error

    def _read(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def _put_aside(self, failures: dict[Path, str]) -> None:
        for folder, why in failures.items():
            logger.warning("%s cannot be read (%s): the checkpoint before it is used", folder, why)
            folder.rename(folder.with_name(folder.name + ".damaged"))
        if failures:
            self._manager.reload()


def params_digest(params: Params) -> str:
    """One number for all parameters, by xxh3: equal for equal bytes under equal names."""
    digest = xxhash.xxh3_64()
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_flatten_with_path(params)[0]):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return f"xxh3:{digest.hexdigest()}"


def _to_saved(state: TrainState) -> dict[str, Any]:
    """The state as a tree of plain arrays, or of their shapes."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        return {**fields, "rng": _on_device(jax.eval_shape(jax.random.key_data, state.rng))}
    return {**fields, "rng": jax.random.key_data(state.rng)}


def _from_saved(saved: dict[str, Any]) -> TrainState:
    return TrainState(**{**saved, "rng": jax.random.wrap_key_data(saved["rng"])})


def abstract_state(init: Any) -> TrainState:
    """Shapes, dtypes and (single) device of the state that `init()` makes, nothing computed."""
    return jax.tree.map(_on_device, jax.eval_shape(init))


def _on_device(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _check_model(saved: dict[str, Any], model: ModelConfig, where: Path, may_differ: Collection[str]) -> None:
    different = [
        f"{name} was {saved.get(name)!r}, is {value!r}"
        for name, value in dataclasses.asdict(model).items()
        if name not in _COMPUTE_FIELDS
        and name not in may_differ
        and saved.get(name) != (list(value) if isinstance(value, tuple) else value)
    ]
    if different:
        raise UserError(
            f"{where} is a checkpoint of another model: {'; '.join(different)}. Take another output_dir, or the "
            "settings of the model as they were; to start a new run from these weights set init_from"
        )
