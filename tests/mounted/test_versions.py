"""Versions and transactions on a real mount: /.versions, the command line, and what a kill of the daemon leaves."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted.records import Record, Shared, ask, big_bytes, differences, python, tree, until
from tests.mounting import Mounted
from tests.mounts import fuse_missing
from tests.projects import Project

pytestmark = pytest.mark.mounted
LATER = b"later" * 100_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    if fuse_missing() is not None:
        pytest.skip("nothing can be mounted here")
    made = Shared(tmp_path_factory.mktemp("versions"), 20)
    with made.mounted:
        yield made
    log = made.mounted.log()
    assert "please report this" not in log, log
    assert "Traceback" not in log, log


def push(record: Record) -> None:
    until(lambda: ask(record.mounted, "push", uuids=[record.uuid])["exit"] == 0, f"{record.uuid} pushed")


def pushed(record: Record) -> Path:
    """Push it; where its present version will be among the earlier ones."""
    push(record)
    return past(record, max(int(name) for name in os.listdir(past(record))))


def past(record: Record, number: int | str = "") -> Path:
    return record.mounted.path / ".versions" / record.uuid / str(number)


@pytest.fixture
def earlier(record: Record) -> Path:
    """A version that is what `plain` holds; the present one has another big.bin, a new file, and lacks a directory."""
    for place in (record.path, record.plain):
        (place / "unique").write_bytes(hashlib.shake_256(record.uuid.encode()).digest(200_000))
    first = pushed(record)
    (record.path / "big.bin").write_bytes(LATER)
    (record.path / "added").write_bytes(b"a")
    shutil.rmtree(record.path / "sub")
    push(record)
    return first


def test_an_earlier_version_is_there_to_be_read(earlier: Path, record: Record) -> None:
    here, plain = tree(earlier, times=True), tree(record.plain, times=True)
    assert here.pop(b"unique")[4] == plain.pop(b"unique")[4]
    for found in (here, plain):  # hard links are counted one by one there
        for path, seen in found.items():
            if len(seen) == 6:
                found[path] = (*seen[:2], 1, *seen[3:])
    assert not (different := differences(here, plain)), different
    assert (earlier / "big.bin").read_bytes() == big_bytes()
    present = past(record, max(int(name) for name in os.listdir(past(record))))
    assert (present / "big.bin").read_bytes() == LATER
    assert not (present / "sub").exists()
    with (earlier / "big.bin").open("rb") as file:
        file.seek(3_000_000)
        assert file.read(1000) == big_bytes()[3_000_000:3_001_000]


def test_tools_see_it(earlier: Path, record: Record) -> None:
    out = python("import sys, mmap; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
                 "print(len(m), m[5])", earlier, "big.bin")  # fmt: skip
    assert out.split() == [str(len(big_bytes())), str(big_bytes()[5])]
    copied = record.mounted.bounded(["cp", "-a", str(earlier / "sub"), str(record.plain.parent / f"{record.uuid}-sub")])
    assert copied.returncode == 0, copied.stderr
    assert (record.plain.parent / f"{record.uuid}-sub" / "tool.sh").stat().st_mode & 0o777 == 0o755
    assert os.readlink(earlier / "link") == "sub/tool.sh"


def test_nothing_there_can_be_changed(earlier: Path, record: Record) -> None:
    top, first = past(record), earlier
    attempts: list[Callable[[], object]] = [
        lambda: (first / "big.bin").open("ab"),
        lambda: os.truncate(first / "big.bin", 0),
        lambda: (first / "new").touch(),
        lambda: (first / "new").mkdir(),
        lambda: (first / "big.bin").unlink(),
        lambda: (first / "id.json").open("r+b"),
        lambda: (first / ".machinable").open("ab"),
        lambda: os.chmod(first / "big.bin", 0o600),
        lambda: os.utime(first / "big.bin"),
        lambda: os.rename(first / "big.bin", first / "other"),
        lambda: os.rename(first / "big.bin", record.path / "other"),
        lambda: os.link(record.path / "added", first / "other"),
        lambda: os.symlink("x", first / "other"),
        lambda: os.mkfifo(first / "fifo"),
        lambda: (first / "sub" / "tool.sh").unlink(),
        lambda: (first / "sub" / "deeper dir").rmdir(),
        lambda: (top / "99").mkdir(),
        lambda: (top.parent / "something").mkdir(),
        lambda: (top.parent).rmdir(),
        lambda: first.rmdir(),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is looked at below
            attempt()
        said.append(refused.value.errno)
    assert set(said) <= {errno.EROFS, errno.EXDEV}, said
    assert said.count(errno.EXDEV) <= 1
    assert (first / "big.bin").read_bytes() == big_bytes()


def test_it_is_hidden_and_a_walk_does_not_meet_it(shared: Shared) -> None:
    names = os.listdir(shared.mounted.path)
    assert ".versions" not in names
    assert (shared.mounted.path / ".versions").is_dir()
    assert set(os.listdir(shared.mounted.path / ".versions")) <= set(names)
    for name in ("nobody", "..", "x/1"):
        if name != "..":
            assert not (shared.mounted.path / ".versions" / name).exists()


def test_names_that_are_no_version(earlier: Path) -> None:
    for name in ("0", "01", "x", "999", "-1", "1.json"):
        assert not earlier.with_name(name).exists()


def test_no_store_is_asked_before_somebody_reads(earlier: Path, shared: Shared) -> None:
    hidden = shared.store.with_name("away")
    shared.store.rename(hidden)
    try:
        assert len(tree_names(earlier)) > 5
        assert (earlier / "big.bin").stat().st_size == len(big_bytes())
        with (earlier / "unique").open("rb") as file, pytest.raises(OSError):  # noqa: PT011 - any errno will do
            file.read()
    finally:
        hidden.rename(shared.store)
    until(lambda: readable(earlier / "unique"), "the store is there again")


def tree_names(directory: Path) -> list[str]:
    return [name for _top, names, files in os.walk(directory) for name in [*names, *files]]


def readable(path: Path) -> bool:
    try:
        return len(path.read_bytes()) > 0
    except OSError:
        return False


def test_restore_and_prune_on_the_command_line(resident: Record, shared: Shared) -> None:
    record, mounted = resident, shared.mounted
    first = pushed(record).name
    (record.path / "small.txt").write_text("later\n")
    push(record)
    listed = mounted.runfs("versions", record.uuid)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.startswith("version ")
    done = mounted.runfs("versions", "restore", str(record.path), first, "small.txt")
    assert (done.returncode, "1 path changed" in done.stdout) == (0, True), done.stdout + done.stderr
    assert (record.path / "small.txt").read_text() == "one\ntwo\nthree\n"
    record.same()
    rows = mounted.json("versions", record.uuid)["records"][0]["versions"]
    assert rows[0]["notes"] == f"version {first} again"
    pruned = mounted.json("versions", "prune", record.uuid, "--keep", "0")
    assert pruned["versions"] == len(rows) - 1
    assert os.listdir(past(record)) == [str(rows[0]["number"])]
    record.check()


def test_a_transaction_on_the_command_line(record: Record, shared: Shared) -> None:
    mounted = shared.mounted
    push(record)
    before = len(mounted.json("versions", record.uuid)["records"][0]["versions"])
    begun = mounted.runfs("transaction", "begin", record.uuid, "--notes", "try it")
    assert begun.returncode == 0, begun.stderr
    assert "open      transaction of " + record.uuid in mounted.runfs("status").stdout
    (record.path / "big.bin").write_bytes(LATER)
    with (record.path / "log.txt").open("ab") as file:
        file.write(b"more\n")
    os.rename(record.path / "sub", record.path / "moved")
    refused = mounted.runfs("push", record.uuid)
    assert refused.returncode == 1
    assert "a transaction is open" in refused.stdout + refused.stderr
    assert mounted.runfs("evict", record.uuid).returncode == 1
    rolled = mounted.runfs("transaction", "rollback", record.uuid)
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    record.same()
    mounted.runfs("transaction", "begin", record.uuid)
    (record.path / "added").write_bytes(b"a")
    (record.plain / "added").write_bytes(b"a")
    (record.path / "small.txt").write_text("committed\n")
    (record.plain / "small.txt").write_text("committed\n")
    committed = mounted.json("transaction", "commit", record.uuid, "--notes", "done")
    rows = mounted.json("versions", record.uuid)["records"][0]["versions"]
    assert (len(rows), rows[0]["notes"], rows[0]["number"]) == (before + 1, "done", committed["version"])
    record.check()


def test_the_daemon_is_killed_in_a_transaction(project: Project, mount: Callable[..., Mounted], tmp_path: Path) -> None:
    mounted = mount(project, stores=[(tmp_path / "store").as_uri()])
    uuid = project.runs[0]
    record = mounted.path / uuid
    mounted.json("push")
    before = tree(record, times=True)
    mounted.json("transaction", "begin", uuid)
    (record / "weights.npy").write_bytes(b"gone")
    (record / "added").write_bytes(b"a")
    mounted.kill()
    (project.directory(uuid) / "past the mount").write_bytes(b"p")
    again = mount(project, "mnt", stores=[(tmp_path / "store").as_uri()])
    assert again.json("status")["transactions"][0]["uuid"] == uuid
    assert again.json("push", exit_code=1)["failed"][0]["uuid"] == uuid
    again.json("transaction", "rollback", uuid)
    assert not (different := differences(tree(record, times=True), before)), different
    again.json("push")
    assert again.json("safe")["safe"]
    assert again.umount().returncode == 0
