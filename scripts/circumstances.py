"""What stands beside measured figures, so that they can be told apart later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def circumstances(*packages: str) -> dict[str, Any]:
    """The commit, the versions of Python and of `packages`, the cores and how busy they are."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
    }


def write_figures(file: Path | None, figures: Any, indent: int = 2) -> None:
    """As JSON, whole or not at all; nowhere without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(file.name + ".partial")
        new.write_text(json.dumps(figures, indent=indent) + "\n")
        os.replace(new, file)
