"""Any machinable Storage as a source of records: the real machinable, in a process of its own."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import Place
from tests.projects import Project
from vfs.errors import ConfigError, Denied, NotFound, RunfsError, StoreError, StoreTimeout, Unreachable, UsageError
from vfs.stores import Store, keys, nature, open_store, validate

BUCKET = '''
"""A Storage that keeps records in another directory, by uuid, and counts what it is asked."""

import json, os, shutil, time
from machinable import Storage
from pydantic import BaseModel

print("what a module prints is no answer")


class Bucket(Storage):
    class Config(BaseModel):
        directory: str = "./storage"
        bucket: str = ""
        sleep_s: float = 0.0
        api_key: str = ""

    def _path(self, uuid):
        return os.path.join(self.config.bucket, uuid)

    def contains(self, uuid):
        return os.path.isdir(self._path(uuid))

    def retrieve(self, uuid, local_directory):
        with open(os.path.join(self.config.bucket, "asked"), "a") as asked:
            asked.write(uuid + "\\n")
        time.sleep(self.config.sleep_s)
        if uuid == "raises":
            raise PermissionError("the bucket is closed today")
        if uuid == "ends":
            os._exit(3)
        shutil.copytree(self._path(uuid), local_directory, symlinks=True)
        return True

    def walk(self):
        for name in sorted(os.listdir(self.config.bucket)):
            if os.path.isdir(self._path(name)):
                yield "s3://somewhere/" + name
'''

Make = Callable[..., Store]


@pytest.fixture
def bucket(tmp_path: Path, project: Project) -> Path:
    """The project's first run, alone in a directory by its uuid."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    shutil.copytree(project.directory(project.runs[0]), bucket / project.runs[0], symlinks=True)
    (bucket / project.runs[0] / "caf\xe9 # \\.dat").write_bytes(b"odd")
    os.symlink("/etc/passwd", bucket / project.runs[0] / "passwd")
    return bucket


@pytest.fixture
def make(tmp_path: Path, bucket: Path) -> Iterator[Make]:
    """Makes stores on the class above, which lives in a project of its own."""
    home = tmp_path / "library"
    home.mkdir()
    (home / "my_storage.py").write_text(BUCKET)
    made: list[Store] = []

    def make(**options: Any) -> Store:
        given = {"module": "my_storage", "bucket": str(bucket), "place": str(tmp_path / "place"), **options}
        made.append(open_store(f"machinable://{home}", "theirs", given))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()


@pytest.fixture
def store(make: Make) -> Store:
    return make()


def asked(bucket: Path) -> list[str]:
    return (bucket / "asked").read_text().split() if (bucket / "asked").exists() else []


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_records_are_imported_from_it(make: Make, bucket: Path, project: Project, tmp_path: Path) -> None:
    make()  # makes the project with the class
    place = Place(tmp_path / "host")
    url = f"machinable://{tmp_path}/library?module=my_storage&bucket={bucket}"
    with place.session() as session:
        done = session.run("import", {"source": url}, Quiet())
        assert done["failed"] == []
        assert done["imported"][0] == project.runs[0]
        unit = session.core.units.get(project.runs[0])
        found = files(Path(os.fsdecode(unit.directory)))
    expected = files(bucket / project.runs[0])
    assert {name: found[name] for name in expected if name != ".machinable"} == {
        name: data for name, data in expected.items() if name != ".machinable"
    }
    assert asked(bucket) == [project.runs[0]]


class Quiet:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


def test_the_disk_storage_of_a_project(project: Project, tmp_path: Path) -> None:
    store = open_store(f"machinable://{project.path}", options={"place": str(tmp_path / "place")})
    try:
        uuid = project.runs[0]
        expected = files(project.directory(uuid))
        assert "weights.npy" in expected
        found = {stat.key: stat.size for stat in store.list(f"{uuid}/")}
        assert found == {f"{uuid}/{keys.encode(os.fsencode(name))}": len(data) for name, data in expected.items()}
        for name, data in expected.items():
            assert store.read(f"{uuid}/{keys.encode(os.fsencode(name))}") == data
        listed = {stat.key.partition("/")[0] for stat in store.list()}
        assert listed == {each for each, row in project.rows().items() if not row["parent_id"]}
        assert store.check().problems == []
    finally:
        store.disconnect()


def test_reads(store: Store, bucket: Path, project: Project) -> None:
    uuid = project.runs[0]
    data = (bucket / uuid / "weights.npy").read_bytes()
    key = f"{uuid}/weights.npy"
    assert store.stat(key).size == len(data)
    assert store.read(key) == data
    assert store.read(key, 100, 50) == data[100:150]
    assert store.read(key, len(data) - 3, 100) == data[-3:]
    assert store.read(key, len(data) + 10, 5) == b""
    assert store.read(key, 3, 0) == b""
    assert store.read(f"{uuid}/{keys.encode('café # '.encode() + bytes([92]) + b'.dat')}") == b"odd"
    assert asked(bucket) == [uuid]  # once, however many questions
    local = store.local_path(key)
    assert local is not None
    assert local.read_bytes() == data
    with pytest.raises(UsageError):
        store.read(key, -1)


def test_what_is_not_there(store: Store, bucket: Path, project: Project) -> None:
    uuid = project.runs[0]
    for key in ("nobody/x", "nobody", f".runfs/{uuid}/manifest.json", f"{uuid}/nothing", f"{uuid}/notes", uuid):
        with pytest.raises(NotFound):
            store.stat(key)
        with pytest.raises(NotFound):
            store.read(key)
    assert list(store.list("nobody/")) == []
    assert list(store.list(".runfs/")) == []
    assert asked(bucket) == [uuid]


def test_nothing_leads_out_of_a_record(store: Store, bucket: Path, project: Project, tmp_path: Path) -> None:
    uuid = project.runs[0]
    assert not any("passwd" in stat.key for stat in store.list(f"{uuid}/"))
    for key in (f"{uuid}/passwd", f"{uuid}/%2E%2E/{uuid}.lock", f"{uuid}/%2E%2E/{uuid}/id.json"):
        with pytest.raises(NotFound):
            store.read(key)


def test_listings(store: Store, bucket: Path, project: Project) -> None:
    uuid = project.runs[0]
    every = {stat.key for stat in store.list()}
    assert every == {stat.key for stat in store.list(f"{uuid}/")} == {stat.key for stat in store.list(uuid[:5])}
    top = {stat.key for stat in store.list(f"{uuid}/", recursive=False)}
    assert top == {key for key in every if key.count("/") == 1}
    assert f"{uuid}/weights.npy" in top
    assert list(store.list(recursive=False)) == []
    listed = next(iter(store.list(f"{uuid}/weights")))
    assert listed == store.stat(f"{uuid}/weights.npy")


def test_it_is_read_only(store: Store, project: Project) -> None:
    uuid = project.runs[0]
    assert store.info().read_only
    assert nature({"url": store.url}).read_only
    for change in (
        lambda: store.write(f"{uuid}/new", b"x"),
        lambda: store.upload(f"{uuid}/new", lambda offset, length: b"x", 1),
        lambda: store.delete(f"{uuid}/id.json"),
        lambda: store.copy(f"{uuid}/id.json", f"{uuid}/new"),
        lambda: store.move(f"{uuid}/id.json", f"{uuid}/new"),
    ):
        with pytest.raises(Denied, match="read-only"):
            change()
    check = store.check()
    assert (check.reachable, check.readable, check.writable, check.problems) == (True, True, False, [])


def test_many_readers_bring_a_record_once(make: Make, bucket: Path, project: Project) -> None:
    stores = [make(sleep_s=0.3) for _ in range(2)]  # as two processes: they share only the directory
    uuid = project.runs[0]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: stores[number % 2].read(f"{uuid}/id.json"), range(8)))
    assert len(set(read)) == 1
    assert asked(bucket) == [uuid]


def test_a_copy_is_kept_and_brought_again_when_it_is_old(make: Make, bucket: Path, project: Project) -> None:
    uuid = project.runs[0]
    make().read(f"{uuid}/id.json")
    make().read(f"{uuid}/id.json")
    assert asked(bucket) == [uuid]
    (bucket / uuid / "weights.npy").write_bytes(b"new")
    old = make(keep_s=0)
    assert old.read(f"{uuid}/weights.npy") == b"new"
    assert old.sweep(3600) == 0
    assert old.sweep(0) == 1
    assert old.local_path(f"{uuid}/weights.npy") is None


def test_what_a_crash_left_is_removed(store: Store, tmp_path: Path, project: Project) -> None:
    left = tmp_path / "place" / f"{project.runs[0]}.making-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    assert store.read(f"{project.runs[0]}/id.json")
    assert not left.exists()
    left.mkdir()
    assert store.sweep() == 1
    assert not left.exists()


def test_errors_of_the_storage_are_told(store: Store, bucket: Path, project: Project) -> None:
    (bucket / "raises").mkdir()
    (bucket / "ends").mkdir()
    (bucket / "empty").mkdir()
    shutil.copytree(bucket / project.runs[0], bucket / "other", symlinks=True)
    with pytest.raises(StoreError, match=r"my_storage in .*: PermissionError: the bucket is closed today"):
        store.read("raises/id.json")
    with pytest.raises(Unreachable, match="the process with the storage ended"):
        store.read("ends/id.json")
    with pytest.raises(StoreError, match="is no record"):
        store.read("empty/id.json")
    with pytest.raises(StoreError, match=f"gave the record {project.runs[0]}"):
        store.read("other/id.json")
    assert store.read(f"{project.runs[0]}/id.json")  # it goes on
    assert not list((bucket.parent / "place").glob("*.making-*"))


def test_a_storage_that_hangs(make: Make, bucket: Path, project: Project) -> None:
    store = make(sleep_s=60, deadline_s=0.5)
    began = time.monotonic()
    with pytest.raises(StoreTimeout, match="still being brought"):
        store.read(f"{project.runs[0]}/id.json", deadline=0.1)
    with pytest.raises(StoreTimeout, match=r"did not answer within 0\.5 s"):
        store.read(f"{project.runs[0]}/id.json")
    assert time.monotonic() - began < 10


def test_disconnect_ends_a_call(make: Make, project: Project) -> None:
    store = make(sleep_s=60)
    seen: list[RunfsError] = []

    def read() -> None:
        try:
            store.read(f"{project.runs[0]}/id.json")
        except RunfsError as error:
            seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(1.5)
    store.disconnect()
    reader.join(10)
    assert not reader.is_alive()
    assert isinstance(seen[0], Unreachable)
    with pytest.raises(Unreachable, match="disconnected"):
        store.read(f"{project.runs[0]}/id.json")
    store.connect()
    assert store.connected


def test_a_storage_pulled_in_through_a_projects_remotes(tmp_path: Path, bucket: Path, project: Project) -> None:
    home = tmp_path / "remote"
    (home / "interface").mkdir(parents=True)
    (tmp_path / "elsewhere.py").write_text(BUCKET)
    (home / "interface" / "project.py").write_text(
        "from machinable import Project\n\n\nclass Mine(Project):\n    def on_resolve_remotes(self):\n"
        f"        return {{'theirs': 'file+{tmp_path}/elsewhere.py'}}\n"
    )
    options = {"module": "theirs", "bucket": str(bucket), "place": str(tmp_path / "place")}
    store = open_store(f"machinable://{home}", options=options)
    try:
        header = json.loads(store.read(f"{project.runs[0]}/id.json"))
        assert header["uuid"] == project.runs[0]
    finally:
        store.disconnect()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("machinable://host/x", {}, "three slashes"),
        ("machinable:///does/not/exist", {}, "no directory /does/not/exist"),
        ("machinable:///tmp", {"module": "os; rm"}, "module = 'os; rm'"),
        ("machinable:///tmp", {"keep_s": "soon"}, "keep_s"),
        ("machinable:///tmp?password=x", {}, "no password in a URL"),
    ],
)
def test_bad_configurations(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(url, options=options)


def test_configurations_only_machinable_can_judge(make: Make, project: Project, tmp_path: Path) -> None:
    for options, message in (
        ({"module": "not_there"}, "not_there"),
        ({"module": "machinable.project"}, "Storage base class"),
        ({"sleep_s": "long"}, "sleep_s"),
        ({"python": "/no/such/python"}, "name one that runs"),
    ):
        with pytest.raises(RunfsError, match=message):
            make(**options).read(f"{project.runs[0]}/id.json")


def test_a_python_without_machinable_says_what_to_install(make: Make, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=f"{bare} has no machinable: {bare} -m pip install 'machinable"):
        make(python=str(bare)).read("someone/id.json")


def test_secrets_go_to_the_storage_and_nowhere_else(make: Make, project: Project) -> None:
    store = make(api_key="hush", sleep_s=0.5)
    reader = threading.Thread(target=lambda: store.read(f"{project.runs[0]}/id.json"))
    reader.start()
    time.sleep(0.3)
    shown = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in os.listdir("/proc") if pid == str(helper_of(store))]
    reader.join()
    assert len(shown) == 1
    assert b"machinable_helper" in shown[0]
    assert b"hush" not in shown[0]
    assert "hush" not in store.url


def helper_of(store: Any) -> int:
    return int(store._helper._process.pid)
