"""`vfs` as a library: stores, and what is made of them, with no mount, where FUSE, trio and the command line's
packages are not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyfuse3", "trio", "typer", "rich", "daemon", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""

USE = """
from pathlib import Path
from vfs.events import Events
from vfs.stores import brokers, open_store, validate, volume
from vfs.stores.batch import read_files, upload_files
from vfs.stores.checking import try_store
from vfs.stores.first import FirstStore
from vfs.stores.mounted import MountedStore
from vfs.stores.observed import ObservedStore

place = Path(sys.argv[1])
events, heard = Events(), []
events.subscribe(heard.append)
disk = open_store(f"file://{place}/disk")
store = ObservedStore(MountedStore(open_store("memory://front"), "u/", disk, name="lab"), events)
(place / "file").write_bytes(b"content")
uploaded = list(upload_files(store, [(place / "file", "u/file")]))
assert [outcome.error for outcome in uploaded] == [None], uploaded
store.store.push("u/file")
read = list(read_files(FirstStore([open_store("memory://empty"), disk]), ["u/file"], place / "target"))
assert read[0].error is None and (place / "target/u/file").read_bytes() == b"content", read
assert validate("memory://x") and volume("memory://x") is None and "s3" not in brokers()
assert try_store("disk", f"file://{place}/disk", {})["ok"]
assert [event.key for event in heard] == ["u/file"], heard
"""

LOADED = "\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"


def run(code: str, *arguments: str) -> set[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_everything_works_without_a_mount_or_what_it_needs(tmp_path: Path) -> None:
    loaded = run(ABSENT + USE + LOADED, str(tmp_path))
    assert not loaded & {"pyfuse3", "trio", "typer", "daemon"}


def test_what_would_need_them_fails_there() -> None:
    """The test above proves something."""
    with pytest.raises(AssertionError, match="ModuleNotFoundError: pyfuse3"):
        run(ABSENT + "import pyfuse3")


def test_a_store_loads_only_its_own_engine(tmp_path: Path) -> None:
    code = "import sys\nfrom vfs.stores import open_store\nopen_store(sys.argv[1]).write('u/a', b'x')" + LOADED
    engines = {"opendal", "asyncssh", "fsspec", "globus_sdk", "machinable", "apsw", "pydantic", "asyncio"}
    for url in ("memory://x", f"file://{tmp_path}/disk"):
        assert not run(code, url) & engines
