"""Extended attributes, on a mount with `--xattr` and on one without."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.records import Record, Shared, ask
from tests.mounted.test_semantics import opened, outcome
from tests.mounts import unmount_under
from tests.posix.places import DATA, Place, data_bytes, fill

pytestmark = pytest.mark.mounted
OURS = ["user.runfs.pinned", "user.runfs.state"]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("xattr"), 24, ("--xattr", "-o", "push.auto=false"))
    shared.mounted.start()
    try:
        yield shared
    finally:
        shared.mounted.kill()
        unmount_under(shared.place)
    assert "Traceback" not in shared.mounted.log()


@pytest.fixture(params=["native", "resident", "evicted"])
def at(mounted: Shared, request: pytest.FixtureRequest) -> Path:
    record = mounted.take(request.param if request.param != "native" else "resident", _one)
    return (record.plain if request.param == "native" else record.path) / "one"


@pytest.fixture
def evicted(mounted: Shared) -> Record:
    return mounted.take("evicted", _one)


def _one(directory: Path) -> None:
    fill(directory / "one")
    os.setxattr(directory / "one" / "data", "user.before", b"set before the eviction")


def mine(path: Path) -> list[str]:
    return sorted(name for name in os.listxattr(path) if name not in OURS and name.startswith("user."))


def test_set_get_list_remove(at: Path) -> None:
    for name in ("data", "small", "sub", "twin a"):
        path, before = at / name, mine(at / name)
        for value in (b"text", b"\0\xff" * 50, b""):
            os.setxattr(path, "user.note", value)
            assert os.getxattr(path, "user.note") == value
        os.setxattr(path, "user.μ 2", b"second")
        assert mine(path) == sorted([*before, "user.note", "user.μ 2"])
        os.removexattr(path, "user.note")
        assert outcome(lambda _at, p=path: os.getxattr(p, "user.note"), at) == "ENODATA"
        assert outcome(lambda _at, p=path: os.removexattr(p, "user.note"), at) == "ENODATA"
    assert os.getxattr(at / "twin b", "user.μ 2") == b"second"
    assert os.getxattr(at / "data", "user.before") == b"set before the eviction"
    assert (at / "data").read_bytes() == data_bytes()


def test_by_descriptor_and_flags(at: Path) -> None:
    with opened(at / "data", os.O_RDWR) as fd:
        os.setxattr(fd, "user.note", b"1", os.XATTR_CREATE)
        assert outcome(lambda _at: os.setxattr(fd, "user.note", b"2", os.XATTR_CREATE), at) == "EEXIST"
        os.setxattr(fd, "user.note", b"3", os.XATTR_REPLACE)
        assert outcome(lambda _at: os.setxattr(fd, "user.none", b"4", os.XATTR_REPLACE), at) == "ENODATA"
        os.rename(at / "data", at / "moved")
        assert os.getxattr(fd, "user.note") == os.getxattr(at / "moved", "user.note") == b"3"
        os.unlink(at / "moved")
        os.setxattr(fd, "user.note", b"without a name")
        assert os.getxattr(fd, "user.note") == b"without a name"


def test_what_has_none(at: Path) -> None:
    assert os.listxattr(at / "link", follow_symlinks=False) == []
    refused = outcome(lambda _at: os.setxattr(at / "link", "user.x", b"", follow_symlinks=False), at)
    assert refused == "EPERM"
    assert outcome(lambda _at: os.getxattr(at / "link", "user.x", follow_symlinks=False), at) == "ENODATA"
    os.mkfifo(at / "pipe")
    assert outcome(lambda _at: os.setxattr(at / "pipe", "user.x", b""), at) == "EPERM"
    assert outcome(lambda _at: os.getxattr(at / "nothing", "user.x"), at) == "ENOENT"


def test_they_change_the_ctime_alone(at: Path) -> None:
    with opened(at / "data", os.O_RDONLY):
        before = (at / "data").stat()
        os.setxattr(at / "data", "user.x", b"1")
        after = (at / "data").stat()
        assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
        assert after.st_ctime_ns > before.st_ctime_ns


def test_they_are_bounded(evicted: Record) -> None:
    """So that what a placeholder says of itself has room beside them."""
    path = evicted.path / "one" / "data"
    os.setxattr(path, "user.much", b"x" * 1900)
    assert outcome(lambda _at: os.setxattr(path, "user.more", b"x" * 200), path) == "ENOSPC"
    os.setxattr(path, "user.much", b"x" * 1800)
    os.setxattr(path, "user.more", b"x" * 150)
    assert path.read_bytes() == data_bytes()


def test_other_namespaces(mounted: Shared, evicted: Record) -> None:
    path = evicted.path / "one" / "data"
    names = ("security.note", "system.posix_acl_access", *(("trusted.note",) if os.geteuid() == 0 else ()))
    for name in names:
        assert outcome(lambda _at, n=name: os.getxattr(path, n), path) == "ENOTSUP", name
        assert outcome(lambda _at, n=name: os.setxattr(path, n, b""), path) == "ENOTSUP", name
    assert all(name.startswith("user.") for name in os.listxattr(path))


def test_ours(mounted: Shared, evicted: Record) -> None:
    data = evicted.path / "one" / "data"
    small = evicted.path / "one" / "small"
    assert os.listxattr(data) == ["user.runfs.state", "user.runfs.pinned", "user.before"]
    assert (os.getxattr(data, "user.runfs.state"), os.getxattr(small, "user.runfs.state")) == (b"evicted", b"resident")
    assert os.getxattr(data, "user.runfs.pinned") == b"0"
    ask(mounted.mounted, "pin", uuids=[evicted.uuid])
    assert os.getxattr(data, "user.runfs.pinned") == b"1"
    for name in (*OURS, "user.runfs.content", "user.runfs.more"):
        assert outcome(lambda _at, n=name: os.setxattr(data, n, b"x"), data) == "EPERM", name
        assert outcome(lambda _at, n=name: os.removexattr(data, n), data) == "EPERM", name
    assert outcome(lambda _at: os.getxattr(data, "user.runfs.content"), data) == "ENODATA"
    os.setxattr(data, "user.mine", b"")
    assert os.getxattr(data, "user.runfs.state") == b"dirty"


def test_they_survive(mounted: Shared, evicted: Record) -> None:
    """Set on an evicted file, which brings nothing back; pushed, evicted, and back in the record's directory."""
    one = evicted.path / "one"
    for name in ("data", "small", "sub"):
        os.setxattr(one / name, "user.set", name.encode())
    os.removexattr(one / "data", "user.before")
    assert evicted.local_bytes("one/data") == 0
    evicted.evict()
    assert [mine(one / name) for name in ("data", "small", "sub")] == [["user.set"]] * 3
    assert (one / "data").read_bytes() == data_bytes()
    os.setxattr(one / "data", "user.set", b"again")
    done = ask(mounted.mounted, "hydrate", uuids=[evicted.uuid], restore=True)
    assert done["exit"] == 0, done
    assert not evicted.working.is_symlink()
    assert (
        os.getxattr(evicted.working / "one" / "data", "user.set") == os.getxattr(one / "data", "user.set") == b"again"
    )
    assert os.getxattr(evicted.working / "one" / "sub", "user.set") == b"sub"
    evicted.evict()
    assert os.getxattr(one / "data", "user.set") == b"again"
    assert (one / "data").stat().st_size == DATA


def test_what_is_set_behind_the_mount_and_is_too_large_for_a_placeholder(mounted: Shared) -> None:
    def make(directory: Path) -> None:
        _one(directory)
        os.setxattr(directory / "one" / "data", "user.large", b"x" * 3000)

    record = mounted.take("evicted", make)
    data = record.path / "one" / "data"
    assert os.getxattr(data, "user.large") == b"x" * 3000
    assert record.local_bytes("one/data") == DATA  # kept, as a small file is
    assert record.local_bytes("one/twin a") == 0


def test_the_root(mounted: Shared) -> None:
    root = mounted.mounted.path
    for path in (root, root / ".by", root / ".by" / "kind"):
        assert os.listxattr(path) == []
        assert outcome(lambda _at, p=path: os.getxattr(p, "user.x"), root) == "ENODATA"
    done = subprocess.run(["ls", "-la", root], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_without_the_option(place: Place) -> None:
    path = place.path / "data"
    expected = "ENODATA" if place.native else "ENOTSUP"
    assert outcome(lambda _at: os.getxattr(path, "user.x"), path) == expected
    assert outcome(lambda _at: os.setxattr(path, "user.x", b""), path) == (None if place.native else "ENOTSUP")
