"""Nothing in a record is run, imported or unpickled, whatever it is called and whatever is done with the record.

Each hostile file would make a file called `ran` if it were. The first test shows that they would.
"""

import ast
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import NESTED, UUID, Place, unit_of, write_record
from vfs import wire
from vfs.manifest import parse
from vfs.records.retrieve import retrieve
from vfs.stores import open_store

ROOT = Path(__file__).parents[2]
PLAIN = (  # imported by Python itself or by tools when they are near
    "__init__.py", "__main__.py", "sitecustomize.py", "usercustomize.py", "conftest.py", "setup.py", "json.py",
    "vfs.py",
    "daemon.py", "evil.py", "mymodel.py", "machinable.py", "notes/__init__.py", "numpy/__init__.py", "runfs_storage.py",
)  # fmt: skip
PICKLED = (
    "config.pkl",
    "data.p",
    "model.pickle",
    "host.pkl",
    "related/uses.pkl",
    "weights.pt",
    "default.p",
    "executions.p",
)


class Progress:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


class _Runs:
    """What is unpickled into a call."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self._ran)!r}, 'a').close()",)


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "something of the record was run"


def files(ran: Path) -> dict[bytes, bytes]:
    code = f"open({str(ran)!r}, 'a').close()\n".encode()
    found = {name.encode(): code for name in PLAIN}
    found |= {name.encode(): pickle.dumps(_Runs(ran)) for name in PICKLED}
    found[b"evil.pth"] = b"import os; " + code
    found[b".envrc"] = found[b"run.sh"] = f"touch {ran}\n".encode()
    found[b".git/config"] = f"[core]\n\tfsmonitor = touch {ran}\n".encode()
    return found


def test_the_bait_works(tmp_path: Path) -> None:
    made = files(tmp_path / "x")
    pickle.loads(made[b"config.pkl"])
    assert (tmp_path / "x").exists()
    (tmp_path / "x").unlink()
    (tmp_path / "evil.py").write_bytes(made[b"evil.py"])
    subprocess.run([sys.executable, "-c", "import evil"], cwd=tmp_path, check=True)
    assert (tmp_path / "x").exists()


@pytest.fixture
def place(tmp_path: Path, ran: Path) -> Place:
    made = Place(tmp_path / "host")
    made.record(files=files(ran))
    write_record(made.directory() / "run" / "1", NESTED, files(ran), parent=UUID)
    made.ingest(made.directory() / "run" / "1")
    return made


def test_a_record_that_goes_and_comes_back(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other", place.stores)
    with place.session() as session:
        for command in ("push", "verify", "evict", "status", "ls", "doctor", "versions", "hydrate"):
            session.run(command, {"uuids": [UUID], "uuid": UUID, "deep": True}, Progress())
        session.evictor.restore(unit_of(session))
        session.run("reindex", {}, Progress())
    place.project.rename(tmp_path / "gone")
    with other.session() as session:
        assert session.run("reindex", {"stores": True}, Progress())["exit"] == 0
        session.evictor.restore(unit_of(session))
    kept = wire.Plain(open_store(place.stores["lab"], "lab", {}))
    manifest = parse((place.store / ".runfs" / UUID / "manifest.json").read_bytes())
    retrieve(kept, manifest, tmp_path / "pulled")
    kept.opened.disconnect()


def test_a_record_that_is_imported(place: Place, tmp_path: Path) -> None:
    archive = tmp_path / "record.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(place.directory(), "record")
    for number, source in enumerate([str(place.directory()), f"file+{archive}"]):
        with Place(tmp_path / f"new{number}").session() as session:
            done = session.run("import", {"source": source}, Progress())
            assert done["imported"] == [UUID] or UUID in done["imported"]


@pytest.mark.parametrize("command", [["status"], ["ls"], ["doctor"], ["--help"]])
def test_commands_in_a_records_directory(place: Place, command: list[str]) -> None:
    """The program, and the daemon that it starts, look for no module in the current directory."""
    environment = {**os.environ, "RUNFS_STATE_DIR": str(place.root / "state"), "PYTHONPATH": ""}
    program = Path(sys.executable).parent / "runfs"
    done = subprocess.run(
        [program, *command],
        cwd=place.directory(),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr


def test_machinables_own_process(place: Place, tmp_path: Path, ran: Path) -> None:
    """The helper runs the code of the user's project, which he named. What machinable does with a record there is look
    for it and copy it: it unpickles nothing either."""
    (place.project / "mymodel.py").write_text("from machinable import Interface\nclass M(Interface):\n    pass\n")
    url = f"machinable://{place.project}?module=machinable.storage"
    store = open_store(url, "own", {"directory": str(place.project / "storage"), "place": str(tmp_path / "place")})
    try:
        listed = [stat.key for stat in store.list()]
        found = [key for key in listed if key.endswith("config.pkl")]
        for key in found:
            assert store.read(key) == files(ran)[b"config.pkl"]
    finally:
        store.disconnect()


def test_the_helper_looks_for_modules_where_the_user_would(tmp_path: Path) -> None:
    """Its own directory holds modules called `base` and `keys`: a project's were shadowed by them."""
    code = (ROOT / "vfs" / "stores" / "machinable_helper.py").read_text()
    assert "sys.path" in code
    (tmp_path / "machinable.py").write_text(
        "import sys, json\nprint(json.dumps(sys.path), file=sys.stderr)\nraise ImportError\n"
    )
    helper = ROOT / "vfs" / "stores" / "machinable_helper.py"
    done = subprocess.run(
        [sys.executable, str(helper)],
        input=b'{"project": "/", "module": "m", "config": {}}\n',
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert str(helper.parent).encode() not in done.stderr.replace(str(helper).encode(), b"")


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "torch", "numpy"}


@pytest.mark.parametrize("package", ["vfs", "daemon"])
def test_no_code_of_ours_could(package: str) -> None:
    """Imports by a name are of stores' modules (entry points that are installed) and never of what a record says."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] not in FORBIDDEN_MODULES, f"{path}: imports {name}"
