"""Training checkpoints: the whole state and the place in the data, written by Orbax while training goes on.

A checkpoint is whole or absent: Orbax writes it under a temporary name and renames it. All that a run needs to go on
bit for bit is there: parameters (the routers' selection bias among them), optimizer, step, random key, data position.
Every process writes what its devices hold, and reads what they need, whatever mesh it was written from. Beside the
arrays stand their digests, computed before they were written: what comes back is what was there, or is refused.

    checkpoints/STEP/state   the arrays (OCDBT)
    checkpoints/STEP/about   JSON: the model, the arrays' shapes and digests, the place in the data, and its own digest
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.train.digest import array_digests
from glm45_jax.train.distributed import gather, is_first, lost_another
from glm45_jax.train.step import TrainState

# Compute fields may change when a run goes on; these decide what the parameters are.
_COMPUTE_FIELDS = {"dtype", "remat", "implementation", "parallel"}
_LONGEST_SAVE = 3600  # seconds in which all processes have to be done; that one is gone is noticed otherwise

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, by step; the newest `keep` are kept, and those of multiples of `keep_every`.

    With several processes all of them call every method, at the same step.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None):
        self._folder = folder
        policies = [LatestN(keep), *([] if keep_every is None else [EveryNSteps(keep_every)])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=_LONGEST_SAVE),
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any] | None, model: ModelConfig) -> None:
        """Starts saving; returns when the state may be changed again."""
        saved = _to_saved(state)
        about = {"data": data, "model": dataclasses.asdict(model), "arrays": _described(saved)}
        for path, digest in array_digests(saved).items():
            about["arrays"][path]["digest"] = digest
        about = {**about, "digest": _digest_of(about)}
        saving = ocp.args.Composite(state=ocp.args.StandardSave(saved), about=ocp.args.JsonSave(about))
        with self._explained():  # also of the save before, which ran beside the steps
            self._manager.save(int(state.step), args=saving)

    def restore(
        self, like: TrainState, model: ModelConfig, may_differ: Collection[str] = ()
    ) -> tuple[TrainState, dict[str, Any] | None] | None:
        """State and data position of the newest checkpoint that is whole; None where there is none.

        One that cannot be read, or whose values are not those that were saved (a damaged disk, a copy cut short), is
        put aside as `STEP.damaged`, and said.

        Args:
          like: the state's shapes, dtypes and shardings.
          may_differ: fields of the model that may be others than the checkpoint's.

        Raises:
          UserError: the checkpoint is of another model, or none of several is whole.
        """
        failures: dict[Path, str] = {}
        steps = gather(sorted(self._manager.all_steps(), reverse=True))[0]  # as the first process sees the folder
        for step in steps:
            folder = self._folder / str(step)
            about, why = _for_all(lambda folder=folder: _read_about(folder))
            if about is not None:
                _check_model(about["model"], model, folder, may_differ)
                _check_arrays(about["arrays"], _described(_to_saved(like)), folder)
                saved, why = _for_all(lambda folder=folder: _read_state(folder, _to_saved(like)))
                why = why or _difference(about["arrays"], saved)
                if why is None:
                    self._put_aside(failures)
                    return _from_saved(saved), about["data"]
            failures[folder] = str(why)
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

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Closing waits for what is being saved, and so, after a failure, for processes that may be gone.
        if error is None or jax.process_count() == 1:
            self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder gone, or what Orbax makes of them
            if lost_another(error):
                raise
            raise UserError(
                f"saving a checkpoint in {self._folder} failed: {type(error).__name__}: {str(error)[:300]}. "
                "Is the disk full? The same command goes on from the newest whole checkpoint"
            ) from error

    def _put_aside(self, failures: dict[Path, str]) -> None:
        if is_first():
            for folder, why in failures.items():
                logger.warning("%s is damaged (%s): the checkpoint before it is used", folder, why)
                names = (f"{folder.name}.damaged{n or ''}" for n in itertools.count())
                folder.rename(next(new for name in names if not (new := folder.with_name(name)).exists()))
        gather(None)  # none looks before all are moved
        if failures:
            self._manager.reload()


def _for_all(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `read` gives, or why some process could not: then none has it."""
    value, why = None, None
    try:
        value = read()
    except Exception as error:  # whatever tensorstore, Orbax and json make of a broken file
        why = f"{type(error).__name__}: {str(error)[:300]}"
    whys = [f"process {i}: {w}" if i else w for i, w in enumerate(gather(why)) if w is not None]
    return (None, whys[0]) if whys else (value, None)


def _read_about(folder: Path) -> dict[str, Any]:
    about = dict(ocp.JsonCheckpointHandler().restore(epath.Path(folder.absolute() / "about")))
    digest = about.pop("digest", None)
    if digest != _digest_of(about):
        raise ValueError("about/metadata is not what was written")
    return about


def _read_state(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    # By the handler itself: the manager's restore has barriers, at which one that fails leaves the others waiting.
    return ocp.StandardCheckpointHandler().restore(
        epath.Path(folder.absolute() / "state"), args=ocp.args.StandardRestore(like)
    )


def _digest_of(about: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def _described(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(saved)[0]
    return {jax.tree_util.keystr(path): {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for path, x in leaves}


def _difference(arrays: dict[str, Any], saved: dict[str, Any] | None) -> str | None:
    digests = array_digests(saved)
    different = [path for path, digest in digests.items() if arrays[path]["digest"] != digest]
    return f"the values of {', '.join(different[:5])} are not those that were saved" if different else None


def _to_saved(state: TrainState) -> dict[str, Any]:
    """The state as a tree of plain arrays, or of their shapes."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if not isinstance(state.rng, jax.ShapeDtypeStruct):
        return {**fields, "rng": jax.random.key_data(state.rng)}
    data = jax.eval_shape(jax.random.key_data, state.rng)
    return {**fields, "rng": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.rng.sharding)}


def _from_saved(saved: Any) -> TrainState:
    return TrainState(**{**saved, "rng": jax.random.wrap_key_data(saved["rng"])})


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


def _check_arrays(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    there = {path: {"shape": x["shape"], "dtype": x["dtype"]} for path, x in saved.items()}
    different = sorted(path for path in there.keys() | now.keys() if there.get(path) != now.get(path))
    if different:
        path = different[0]
        raise UserError(
            f"{where} is a checkpoint of another optimizer: {len(different)} arrays differ, {path} was "
            f"{there.get(path)}, is {now.get(path)}. Bring the optimizer's settings back as they were, or take another "
            "output_dir; to start a new run from these weights set init_from"
        )
