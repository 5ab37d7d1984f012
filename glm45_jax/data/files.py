"""Files by path, directory or glob, local or remote (`gs://` and what else fsspec knows), read by byte ranges."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from glm45_jax.errors import UserError

ABOUT = "dataset.json"  # what `glm45 tokenize` says of the files beside it; no data itself


@dataclasses.dataclass(frozen=True)
class File:
    """A file and its size when it was found."""

    path: str
    size: int
    remote: Any = dataclasses.field(default=None, repr=False)  # its fsspec file system; None for a local file

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix.lower()

    def open(self) -> BinaryIO:
        """From the beginning, for reading in order."""
        return open(self.path, "rb") if self.remote is None else self.remote.open(self.path, "rb")

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, which must lie within the file.

        Raises:
          UserError: the file is gone, cannot be reached or has become shorter; no matter of one record.
        """
        try:
            if self.remote is None:
                with open(self.path, "rb") as f:
                    f.seek(start)
                    raw = f.read(end - start)
            else:
                raw = self.remote.cat_file(self.path, start=start, end=end) if end > start else b""
        except OSError as error:
            raise UserError(f"{self}: cannot be read: {error}") from error
        if len(raw) != end - start:
            raise UserError(f"{self} has become shorter than {self.size} bytes since it was opened")
        return raw

    def beside(self, name: str) -> bytes | None:
        """The content of another file of its folder; None where there is none."""
        path = self.path.rpartition("/")[0] + "/" + name if "/" in self.path else name
        try:
            return Path(path).read_bytes() if self.remote is None else self.remote.cat_file(path)
        except FileNotFoundError:
            return None


def find_files(paths: Sequence[str]) -> list[File]:
    """The files that `paths` (files, directories, globs) stand for, sorted within each, none twice.

    Raises:
      UserError: one of them stands for none, or cannot be looked for.
    """
    found: dict[str, File] = {}
    for path in paths:
        matches, is_folder = _remote(path) if "://" in path else _local(os.path.expanduser(path))
        if not matches:
            kind = "directory has no files" if is_folder else "no such file, directory or match of a glob"
            where = "" if "://" in path else f" (looked from {os.getcwd()})"
            raise UserError(f"data source {path}: {kind}{where}")
        found |= {file.path: file for file in matches if file.path not in found}
    return list(found.values())


def some(files: Sequence[File]) -> str:
    return f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _local(path: str) -> tuple[list[File], bool]:
    if os.path.isdir(path):
        names = sorted(str(file) for file in _walk(Path(path)) if file.is_file())
    elif os.path.isfile(path):
        names = [path]
    else:
        names = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    return [File(name, os.path.getsize(name)) for name in names], os.path.isdir(path)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and name != ABOUT)


def _remote(path: str) -> tuple[list[File], bool]:
    try:
        import fsspec

        system, inside = fsspec.core.url_to_fs(path)
        is_folder = system.isdir(inside)
        if is_folder:
            found = {name: info for name, info in system.find(inside, detail=True).items() if _plain(name, inside)}
        elif system.isfile(inside):
            found = {inside: system.info(inside)}
        else:
            found = {name: info for name, info in system.glob(inside, detail=True).items() if info["type"] == "file"}
            if "/." not in inside:  # as local globs do
                found = {name: info for name, info in found.items() if "/." not in name}
    except ImportError as error:
        raise UserError(
            f"data source {path}: reading it needs the data extra: pip install 'glm45-jax[data]' ({error})"
        ) from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise UserError(f"data source {path}: {error}") from error
    except OSError as error:
        raise UserError(f"data source {path}: cannot be reached: {error}. Are its credentials set up?") from error
    files = [File(system.unstrip_protocol(name), info["size"], system) for name, info in sorted(found.items())]
    return files, is_folder


def _plain(name: str, folder: str) -> bool:
    parts = PurePosixPath(name).relative_to(folder).parts
    return parts[-1] != ABOUT and not any(part.startswith(".") for part in parts)
