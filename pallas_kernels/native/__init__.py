"""C++ for the CPU, compiled on the machine it runs on: where XLA copies or repacks weights, these read them in place.

The sources beside this file are compiled at first use, in a quarter of a minute, with the machine's C++ compiler,
against XLA's FFI headers, which jaxlib brings, and kept in the user's cache. Without a compiler everything runs as
before, by the loops in XLA that each op's `cpu.py` has, and more slowly. GLM45_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_NAMES = ("glm45_fused_moe", "glm45_grouped", "glm45_paged_attention")

log = logging.getLogger(__name__)


def call(name: str, results: Any, *args: jax.Array, aliases: dict[int, int] | None = None, **attributes: Any) -> Any:
    """One of the functions, on arrays, of which all must vary over the same mesh axes; the results do too.

    Args:
      results: shapes and dtypes.
      aliases: arguments whose memory a result takes over.

    Raises:
      NotImplementedError: there is no compiler, or it is turned off.
    """
    if not available():
        raise NotImplementedError("no native code on this machine")
    out = jax.ffi.ffi_call(name, results, input_output_aliases=aliases)(*args, **attributes)
    axes = tuple(jax.typeof(args[0]).manual_axis_type.varying)
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), out) if axes else out


@functools.cache
def available() -> bool:
    """Whether native code runs here; compiles it where that has not been done."""
    if os.environ.get("GLM45_NATIVE", "1") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError, NotImplementedError) as error:
        log.info("no native code for the CPU, XLA's loops take its place: %s", error)
        return False
    for name in _NAMES:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def cache_folder() -> Path:
    """Where what is compiled is kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "glm45_jax"


def _built() -> Path:
    """The compiled library, from the cache or made now: whole or not at all."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotImplementedError("no C++ compiler was found")
    sources = sorted(_FOLDER.glob("*.cc"))
    cache = cache_folder()
    library = cache / f"native-{_fingerprint(compiler)}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "native.so"
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *map(str, sources), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            os.replace(made, library)
    return library


def _fingerprint(compiler: str) -> str:
    """Of all that decides what is compiled, the processor too: homes are shared between machines."""
    parts = [compiler, *_FLAGS, jax.lib.__version__, platform.machine(), processor()]
    parts += [file.read_text() for file in sorted([*_FOLDER.glob("*.cc"), *_FOLDER.glob("*.h")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor() -> str:
    """What tells this machine's kind of processor from others that share its home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
