"""What runfs is built from: exactly what is locked, and nothing that is not. A part of `make check`, without a network.

Whether a version has a known weakness only an advisory service can say: `make audit` asks one, where it can be reached.
"""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.test_packaging import LOCK, PROJECT, ROOT, canonical, sections

OWN = {"vfs", "daemon"}
# Imported where they are installed only: by extras, and in a process of its own (the helper).
EXTRAS = {
    canonical(re.split(r"[<>=!~ ;\[]", each)[0])
    for extra in ("fsspec", "globus", "machinable")
    for each in PROJECT["optional-dependencies"][extra]
}
# Licences under which each may be used beside an MIT program: dynamic linking and separate files are all that is done.
FREE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python-2|Python Software|MPL|Mozilla|LGPL|Lesser|Zlib|any-osi|Unlicense|public domain|EPL",
    re.IGNORECASE,
)


def imported() -> dict[str, str]:
    """Top-level packages that our code imports, each with a file that does."""
    found: dict[str, str] = {}
    for package in OWN:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.append(node.module or "")
                for name in names:
                    found.setdefault(name.partition(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | OWN}


def test_everything_imported_is_locked_for_the_runtime_or_an_extra() -> None:
    runtime = {canonical(name) for name in sections()["runtime"]}
    known = metadata.packages_distributions()
    for name, path in sorted(imported().items()):
        names = {canonical(each) for each in known.get(name, [name])}
        assert names & (runtime | EXTRAS), f"{path} imports {name}, which no requirement of the runtime gives"


def test_every_direct_requirement_is_imported() -> None:
    """What nobody uses would only be one more to trust."""
    known = metadata.packages_distributions()
    used = {canonical(each) for name in imported() for each in known.get(name, [name])}
    asked = {canonical(re.split(r"[<>=!~ ;\[]", each)[0]) for each in PROJECT["dependencies"]}
    assert asked <= used


def test_what_is_installed_is_what_is_locked() -> None:
    locked = {canonical(name): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", LOCK, re.M)}
    for name in sections()["runtime"]:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of another version of Python
        assert installed == locked[canonical(name)], (
            f"{name}: {installed} is installed, {locked[canonical(name)]} locked"
        )


def test_every_archive_has_a_strong_hash() -> None:
    hashes = re.findall(r"--hash=(\w+):([0-9a-f]+)", LOCK)
    assert len(hashes) > 200
    assert {kind for kind, _value in hashes} == {"sha256"}
    assert all(len(value) == 64 for _kind, value in hashes)


@pytest.mark.parametrize("name", sorted(set(sections()["runtime"])))
def test_licence(name: str) -> None:
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip("not for this Python")
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:200]]
    said += [each for each in about.get_all("Classifier") or [] if each.startswith("License")]
    assert FREE.search(" ".join(said)), said


def test_the_rules_against_dangerous_calls_bite(tmp_path: Path) -> None:
    """They are rules of ruff (flake8-bandit's): an exception that is too wide would be seen here."""
    wrong = {
        "S301": "import pickle\npickle.loads(b'')\n",
        "S307": "eval('1')\n",
        "S102": "exec('1')\n",
        "S602": "import subprocess\nsubprocess.run('ls $x', shell=True)\n",
        "S605": "import os\nos.system(x)\n",
        "S306": "import tempfile\ntempfile.mktemp()\n",
        "S506": "import yaml\nyaml.load(x)\n",
        "S501": "import requests\nrequests.get('https://x', verify=False)\n",
    }
    for package in OWN:
        for rule, code in wrong.items():
            done = subprocess.run(
                [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--config", "pyproject.toml",
                 "--stdin-filename", f"{package}/dangerous.py", "-"],
                cwd=ROOT, input=code, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert rule in done.stdout, f"{rule} is not found in {package}: {done.stdout}{done.stderr}"
