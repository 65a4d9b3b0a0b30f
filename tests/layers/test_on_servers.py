"""Stores made of stores, and batches, on a real S3 server and a directory."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import Seaweed, seaweedfs
from vfs.errors import Conflict, Denied, NotFound, Unreachable
from vfs.stores import Store, open_store
from vfs.stores.batch import delete_files, list_files, move_files, read_files, upload_files
from vfs.stores.first import FirstStore
from vfs.stores.mounted import MountedStore

MIB = 1024 * 1024


@pytest.fixture
def s3(seaweed: Seaweed) -> Store:
    url = f"s3://{seaweed.bucket}/t-{os.urandom(6).hex()}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    return open_store(url, "lab", seaweed.options())


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/disk", "disk")


def test_a_directory_mounted_on_a_bucket(s3: Store, disk: Store) -> None:
    data = random.Random(3).randbytes(20 * MIB)
    s3.write("other/a", b"not ours")
    s3.write("study/old", b"in the bucket")
    store = MountedStore(disk, "study/", s3)
    store.upload("study/new", lambda offset, length: data[offset : offset + length], len(data))
    assert {stat.key for stat in store.list()} == {"other/a", "study/old", "study/new"}
    assert store.local_path("study/new") is not None
    pushed = store.push("study/new")
    assert (pushed.size, s3.read("study/new", MIB, 5)) == (len(data), data[MIB : MIB + 5])
    assert list(disk.list()) == []
    assert store.local_path("study/new") is None
    version = store.stat("study/old").version
    store.write("study/old", b"changed here", if_version=version)
    with pytest.raises(Conflict):
        store.write("study/old", b"again", if_version=version)
    assert s3.read("study/old") == b"in the bucket"
    store.push("study/old")
    assert s3.read("study/old") == b"changed here"
    store.copy_up("study/new")
    assert disk.read("new") == data
    with pytest.raises(Denied):
        store.delete("study/old")
    assert store.check().problems == []


def test_a_server_that_stops_is_passed_over(tmp_path: Path, disk: Store) -> None:
    with seaweedfs(tmp_path / "weed") as server:
        url = f"s3://{server.bucket}/x?endpoint={server.endpoint}&region={server.region}"
        lab = open_store(url, "lab", {**server.options(), "deadline_s": 5})
        for store, key in ((lab, "u/lab"), (disk, "u/disk"), (lab, "u/both"), (disk, "u/both")):
            store.write(key, key.encode())
        store = FirstStore([lab, disk], read_only=True)
        assert {key: store.read(key) for key in ("u/lab", "u/disk", "u/both")} == {
            key: key.encode() for key in ("u/lab", "u/disk", "u/both")
        }
        with pytest.raises(NotFound):
            store.read("u/none")
    assert store.read("u/both") == b"u/both"
    with pytest.raises(Unreachable, match="lab"):
        store.read("u/lab")
    began = time.monotonic()
    assert store.read("u/disk") == b"u/disk"  # the one that failed is not waited for again
    assert time.monotonic() - began < 1
    assert {stat.key for stat in store.list("u/")} == {"u/disk", "u/both"}
    assert store.problems[0].startswith("lab was passed over: ")


def test_a_batch_of_many_files(s3: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for number in range(300):
        (source / str(number)).write_bytes(b"%d" % number)
    (source / "large").write_bytes(random.Random(4).randbytes(17 * MIB))
    paths = [*source.iterdir(), source / "none"]
    uploaded = list(upload_files(s3, ((path, f"u/{path.name}") for path in paths)))
    assert [outcome.key for outcome in uploaded if outcome.error is not None] == ["u/none"]
    assert all(outcome.verified for outcome in uploaded if outcome.error is None)
    listed = dict(list_files(s3, "u/"))
    read = {outcome.key: outcome for outcome in read_files(s3, [*listed, "u/gone"], target)}
    assert isinstance(read.pop("u/gone").error, NotFound)
    assert all(outcome.error is None and outcome.verified for outcome in read.values())
    assert {path.name: path.read_bytes() for path in (target / "u").iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    moved = list(move_files(s3, ((key, key.replace("u/", "v/")) for key in list(listed)[:50])))
    assert {outcome.error for outcome in moved} == {None}
    assert len(dict(list_files(s3, "v/"))) == 50
    assert {outcome.error for outcome in delete_files(s3, dict(list_files(s3)))} == {None}
    assert dict(list_files(s3)) == {}


KILLED = """
import sys
from vfs.stores import open_store
from vfs.stores.mounted import MountedStore
front, backing = (open_store(f"file://{sys.argv[1]}/{name}") for name in ("front", "backing"))
store = MountedStore(front, "m/", backing)
print("ready", flush=True)
sys.stdin.readline()
store.push("m/big")
"""


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_push_that_is_killed_loses_nothing(tmp_path: Path, after_s: float) -> None:
    data = random.Random(5).randbytes(40 * MIB)
    front, backing = (open_store(f"file://{tmp_path}/{name}") for name in ("front", "backing"))
    front.write("big", data)
    backing.write("m/big", b"old")
    code = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as pusher:
        assert pusher.stdin is not None
        assert pusher.stdout is not None
        pusher.stdout.readline()
        pusher.stdin.write(b"\n")
        pusher.stdin.flush()
        time.sleep(after_s)
        pusher.kill()
    store = MountedStore(front, "m/", backing)
    assert store.read("m/big") == data
    store.push("m/big")
    assert backing.read("m/big") == data
    assert list(front.list()) == []
