"""What holds of the repository as a whole: imports point one way, the core is enough, the README's example runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

# package -> what it may import of ours, besides itself
ALLOWED = {
    "glm45_jax.errors": set(),
    "glm45_jax.config": {"glm45_jax.errors"},
    "glm45_jax.text": {"glm45_jax.errors", "glm45_jax.config"},
    "glm45_jax.data": {"glm45_jax.errors", "glm45_jax.config", "glm45_jax.text"},
    "glm45_jax.parallel": {"glm45_jax.errors", "glm45_jax.config", "pallas_kernels"},
    "glm45_jax.model": {"glm45_jax.errors", "glm45_jax.config", "glm45_jax.parallel", "pallas_kernels"},
    "pallas_kernels": set(),
}
MIDDLE = {"glm45_jax.convert", "glm45_jax.train", "glm45_jax.infer"}
ALLOWED["glm45_jax.serve"] = {f"glm45_jax.{name}" for name in "errors config text model convert infer".split()}
ABOVE = {"glm45_jax.cli", "glm45_jax.serve"}  # nothing below imports these


def sources() -> list[Path]:
    return sorted([*ROOT.glob("glm45_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


def package(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[:2])


def imports(file: Path) -> set[str]:
    """Our own packages that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = inside if node.module == "glm45_jax" else [node.module]
        found |= {package(name) for name in names if name.split(".")[0] in ("glm45_jax", "pallas_kernels")}
    return found


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    own = package(".".join(file.relative_to(ROOT).with_suffix("").parts))
    others = imports(file) - {own, "glm45_jax.__version__"}
    if own in ALLOWED:
        assert others <= ALLOWED[own], f"{own} must not import {others - ALLOWED[own]}"
    elif own in MIDDLE:
        assert not others & ABOVE


def test_no_file_grows_past_reading() -> None:
    assert {file.name: n for file in sources() if (n := len(file.read_text().splitlines())) > 500} == {}


CORE_ONLY = """
import importlib.abc, sys
refused = "torch transformers matplotlib tensorboardX huggingface_hub starlette uvicorn pyarrow".split()
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in refused:
            raise ImportError(f"{name} is no part of the core")
sys.meta_path.insert(0, Refuse())
import glm45_jax
for name in glm45_jax.__all__:
    getattr(glm45_jax, name)
"""


def test_the_core_is_enough() -> None:
    """Every public name can be had with the core dependencies alone."""
    done = subprocess.run([sys.executable, "-c", CORE_ONLY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_readmes_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert scope["out"].logits.shape == (2, 16, scope["config"].vocab_size)
    assert [len(row) for row in scope["sequences"]] == [11, 10]


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_readme_lists_every_command() -> None:
    from glm45_jax.cli import COMMANDS

    readme = (ROOT / "README.md").read_text()
    assert all(f"glm45 {name}" in readme for name in COMMANDS)


def test_torch_has_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraint = (ROOT / "scripts" / "constraints.txt").read_text().split()
    assert constraint == ["torch==2.13.0"]
    assert "torch==2.13.0" in project["optional-dependencies"]["parity"]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed here")
    done = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
