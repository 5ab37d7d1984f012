"""Several processes that train or serve together: how they meet, what they agree on, and how all end when one fails.

On TPU and GPU hosts each process drives its own devices; on CPU (gloo) several on one machine do for tests. A process
that fails says so to the others through jax's coordination service, and all leave at once: a collective that waits for
a dead process would hang, and so would the barrier at the end. One that vanishes without a word is missed after
`heartbeat_timeout_seconds`, or as soon as a collective breaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from glm45_jax.errors import UserError
from glm45_jax.parallel.processes import client

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_FAILURE = "glm45_jax/failure"  # key in the coordination service
_LOOK_EVERY = 1.0  # seconds
_OF_OTHERS = ("Gloo", "gloo", "NCCL", "peer", "heartbeat", "Barrier", "barrier")  # in errors of a broken collective
_LINGER = 3.0  # seconds
_THEN = "the same command, given to every process, goes on from the newest checkpoint"
_NOT_ALL = (
    "Is every process started, each with its own process_id, and the address of process 0 free there and reachable "
    "from here?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process finds the others. All None: by itself, unless the environment names others.

    The environment: GLM45_COORDINATOR_ADDRESS, GLM45_NUM_PROCESSES and GLM45_PROCESS_ID; a Slurm step of several tasks;
    a TPU VM that is one of several.
    """

    coordinator_address: str | None = None  # host:port of process 0, free there, reachable from all
    num_processes: int | None = None
    process_id: int | None = None
    auto: bool | None = None  # True: jax finds out (Slurm, Open MPI, TPU VMs, Kubernetes); False: single process
    cpu_devices: int | None = None  # devices that a process makes of its CPU; None: one, or what XLA_FLAGS say
    heartbeat_timeout_seconds: int = 20  # a process not heard of for so long is dead, and the run ends
    initialization_timeout_seconds: int = 300  # the processes must have found each other

    def __post_init__(self) -> None:
        for name in ("cpu_devices", "heartbeat_timeout_seconds", "initialization_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"distributed.{name} is {value}, it must be at least 1")


def initialize(config: DistributedConfig) -> None:
    """Joins the run's other processes, where there are any; must come before jax touches a device.

    Raises:
      UserError: settings are missing or wrong, jax is in use already, or the processes did not find each other.
    """
    if config.cpu_devices is not None:
        _update("jax_num_cpu_devices", config.cpu_devices)
    if jax.distributed.is_initialized():
        return
    address = _address(config, os.environ)
    if address is None and not _others_in(config, os.environ):
        return
    _update("jax_cpu_collectives_implementation", "gloo")
    # Its notice of SIGTERM would take the place of ours, which any process's Ctrl-C shares.
    jax.config.update("jax_enable_preemption_service", False)
    where = (
        f"{address['process_id']} of {address['num_processes']}, {address['coordinator_address']}" if address else ""
    )
    whose = f"the run's processes cannot join (this one: {where or 'as jax finds it'})"
    if address is not None and address["process_id"]:
        _wait_for_coordinator(address["coordinator_address"], config.initialization_timeout_seconds, whose)
    # When the time is up jax ends the process itself, with a trace of its own calls.
    hint = threading.Timer(max(config.initialization_timeout_seconds - 1, 1), _say, (f"{whose}: {_NOT_ALL}",))
    hint.daemon = True
    hint.start()
    try:
        jax.distributed.initialize(
            **(address or {}),
            initialization_timeout=config.initialization_timeout_seconds,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"distributed: {whose}: {str(error)[:400]}. {_NOT_ALL}") from error
    finally:
        hint.cancel()


def _wait_for_coordinator(address: str, timeout: float, whose: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except ValueError:
            raise UserError(f"distributed.coordinator_address is {address!r}, expected HOST:PORT") from None
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(f"distributed: {whose}: no answer within {timeout:g} s ({error}). {_NOT_ALL}") from None
        time.sleep(0.2)


def _say(text: str) -> None:
    print(f"glm45: {text}", file=sys.stderr, flush=True)


def _update(option: str, value: Any) -> None:
    if getattr(jax.config, option) == value:
        return
    try:
        jax.config.update(option, value)
    except RuntimeError as error:
        raise UserError(
            f"distributed: {option}={value} must be set before jax is used in this process: {error}"
        ) from None


def _address(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Coordinator, number and id where any is given, by the configuration before the environment."""
    names = ("coordinator_address", "num_processes", "process_id")
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    for name in names:
        text = environment.get(f"GLM45_{name.upper()}")
        if values[name] is None and text and config.auto is None:
            values[name] = text if name == "coordinator_address" else _number(f"GLM45_{name.upper()}", text)
    missing = [name for name in names if values[name] is None]
    if len(missing) == len(names) or (values["num_processes"] == 1 and values["coordinator_address"] is None):
        return None
    if missing:
        raise UserError(f"distributed: {', '.join(missing)} missing; all of {', '.join(names)} are needed, or none")
    if ":" not in values["coordinator_address"]:
        raise UserError(f"distributed.coordinator_address is {values['coordinator_address']!r}, expected HOST:PORT")
    if not 0 <= values["process_id"] < values["num_processes"]:
        raise UserError(
            f"distributed.process_id is {values['process_id']}, it must lie in 0..{values['num_processes'] - 1}"
        )
    return values


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, expected a whole number") from None


def _others_in(config: DistributedConfig, environment: Mapping[str, str]) -> bool:
    """Whether the environment shows a run of several processes that jax can find."""
    if config.auto is not None:
        return config.auto
    # Inside a step of Slurm alone: a job's own shell, where nothing was started by srun, is a single process.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    if environment.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu"):
        return False
    several = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
    return several or "MEGASCALE_COORDINATOR_ADDRESS" in environment or "," in _workers_of_tpu_vm()


def _workers_of_tpu_vm() -> str:
    """The slice's hosts, joined by commas, as Google Cloud tells them to its TPU VMs; nothing on another machine."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or importlib.util.find_spec("libtpu") is None:
        return ""
    request = urllib.request.Request(_METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such name, no such attribute, no answer
        return ""


# --- what all agree on ---------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes what one writes for all."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, by their number. All must call it; none returns before all have."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, few programs
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes)]


def lost_another(error: BaseException) -> bool:
    """Whether it tells of another process that is gone, by way of an operation that needed it."""
    return jax.process_count() > 1 and any(word in str(error) for word in _OF_OTHERS)


# --- one fails, all end --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_together(config: DistributedConfig, then: str = _THEN) -> Iterator[None]:
    """Joins the other processes; inside, the failure of one ends all of them at once, each with a message.

    For a program's outermost level: with several processes an exception that leaves the body does not come out, the
    process exits (2 after a `UserError`, 130 after Ctrl-C, else 1).

    Args:
      then: what the message of the one that failed ends with.
    """
    initialize(config)
    if not jax.distributed.is_initialized():
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        over.set()
        _leave(error, then)
    over.set()
    watch.join()


def _watch(over: threading.Event) -> None:
    while not over.wait(_LOOK_EVERY):
        reason = _read_failure()
        if reason is not None and not over.is_set():
            _exit(1, f"{_who()} ends, because {reason}")


def _leave(error: BaseException, then: str) -> NoReturn:
    """Tells the others why and ends, past the barrier that waits for all."""
    earlier = _read_failure()
    if earlier is not None:
        _exit(1, f"{_who()} ends, because {earlier}")
    code, reason = 1, f"failed: {type(error).__name__}: {str(error)[:500]}"
    if isinstance(error, KeyboardInterrupt):
        code, reason = 130, "was interrupted"
    elif isinstance(error, UserError):
        code, reason = 2, f"failed: {error}"
    elif lost_another(error):
        reason = f"lost its connection to another process, which must have ended; see what that one said last. {reason}"
    else:
        traceback.print_exception(error)
    _write_failure(f"{_who()} {reason}")
    _say(f"{_who()} {reason}")
    _exit(code, then)


def _exit(code: int, text: str) -> NoReturn:
    _say(text)
    sys.stdout.flush()
    if is_first():
        time.sleep(_LINGER)  # without the coordinator's process jax aborts the others before they have read why
    os._exit(code)  # past jax's shutdown, which waits for processes that are gone


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _read_failure() -> str | None:
    try:
        return client().key_value_try_get(_FAILURE)
    except Exception:  # no such key, or the coordinator is gone, which jax itself notices
        return None


def _write_failure(reason: str) -> None:
    with contextlib.suppress(Exception):  # another was first, or the coordinator is gone
        client().key_value_set(_FAILURE, reason)
