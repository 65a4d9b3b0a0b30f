"""Imports point one way: `daemon` -> `vfs`, and `vfs` knows nothing of FUSE, trio or the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = frozenset({"daemon", "tests", "trio", "pyfuse3", "typer", "rich"})
MODULES = sorted((ROOT / "vfs").rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    """Top-level names of every absolute import, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\nfrom . import g\n"
    assert imported_packages(source) == {"a", "c"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_does_not_import_the_shell(module: Path) -> None:
    wrong = imported_packages(module.read_text()) & FORBIDDEN
    assert not wrong, f"{module.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_loading_the_core_loads_no_shell() -> None:
    """Also through what others import: the core works where FUSE and trio are not installed."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & (FORBIDDEN - {"rich", "typer"})  # pydantic may load rich for its own messages
