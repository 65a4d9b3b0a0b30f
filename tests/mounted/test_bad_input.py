"""What people get wrong, and what goes wrong on this machine: each has a sentence that names the thing and says what to
do, an exit code, and loses nothing. Stores that go wrong are in test_bad_store.py.
"""

import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.records import Shared, evict, tree, until
from tests.mounted.trouble import fill_up, lines, sentence, small_disk, start_fails
from tests.mounting import Mounted
from tests.mounts import is_fuse_mount
from tests.projects import Project

pytestmark = pytest.mark.mounted
MIB = 1 << 20
Make = Callable[..., Project]
Mount = Callable[..., Mounted]


# --- records that are not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["push", "evict", "hydrate", "pin", "unpin", "safe", "verify", "ls", "push --dry-run", "evict --dry-run"]
)
def test_unknown_uuid(shared: Shared, command: str) -> None:
    name, *flags = command.split()
    said = sentence(shared.mounted.runfs(name, "nosuchrecord", *flags), 1)
    assert said == "the index has no record nosuchrecord; `runfs ls` shows those it has"


def test_unknown_uuid_to_status_and_receipts(shared: Shared) -> None:
    said = "\n".join(lines(shared.mounted.runfs("status", "nosuchrecord"), 1))
    assert said.startswith("nosuchrecord  unknown")
    assert "the index has no record nosuchrecord; `runfs ls` shows those it has" in said
    assert lines(shared.mounted.runfs("receipts", "nosuchrecord"), 0) == ["no receipts"]


@pytest.mark.parametrize("name", ["../etc", "..", "nosuch record", "a/b", "-", "💥"])
def test_names_that_no_record_can_have(shared: Shared, name: str) -> None:
    with pytest.raises(OSError, match=r"."):
        (shared.mounted.path / name.replace("/", "%2F") / "id.json").read_bytes()
    if name != "-":
        said = sentence(shared.mounted.runfs("evict", name), 1)
        assert said.startswith("the index has no record")


def test_one_unknown_among_known_ones_changes_nothing(shared: Shared) -> None:
    record = shared.take("resident")
    sentence(shared.mounted.runfs("evict", record.uuid, "nosuchrecord"), 1)
    sentence(shared.mounted.runfs("pin", record.uuid, "nosuchrecord"), 1)
    status = record.status()
    assert not status["pinned"]
    assert not record.working.is_symlink()


def test_directory_that_is_gone_and_was_never_pushed(make_project: Make, mount: Mount, tmp_path: Path) -> None:
    project = make_project(runs=2, size=1000, report=False)
    gone, there = project.runs
    store = (tmp_path / "store").as_uri()
    mounted = mount(project, stores=[store], options=["-o", "push.auto=false"])
    shutil.rmtree(project.directory(gone))
    assert there in os.listdir(mounted.path)
    assert (mounted.path / there / "metrics.json").read_bytes()
    with pytest.raises(OSError, match=r"No such file|Input/output"):
        os.listdir(mounted.path / gone)
    for command in ("push", "safe", "evict"):
        said = "\n".join(lines(mounted.runfs(command, gone), 1))
        assert gone in said, said
        assert "director" in said, said
    said = "\n".join(lines(mounted.runfs("push"), 1))
    assert gone in said
    assert there not in said
    assert lines(mounted.runfs("safe", there), 0)
    assert any(gone in line and "no store holds it" in line for line in lines(mounted.runfs("doctor"), 1))


# --- the index ----------------------------------------------------------------------------------------------------

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN EXCLUSIVE")
connection.execute("PRAGMA user_version = 11")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(index: Path) -> Iterator[None]:
    """Another process keeps the index to itself."""
    command = [sys.executable, "-c", HOLD, str(index)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()


def version(number: int) -> Callable[[Path], None]:
    def change(index: Path) -> None:
        connection = sqlite3.connect(index)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.close()

    return change


def corrupt(index: Path) -> None:
    for log in (index.with_name(index.name + "-wal"), index.with_name(index.name + "-shm")):
        log.unlink(missing_ok=True)
    with index.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(8000))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, ["there is no index", "--project or --index", "runfs reindex"]),
        (version(99), ["schema version 99", "upgrade runfs"]),
        (version(7), ["old schema version 7", "once with machinable"]),
        (corrupt, ["SQLite says", "move it away", "runfs reindex"]),
        (lambda index: index.write_bytes(b"no database" * 1000), ["SQLite says", "runfs reindex"]),
        (lambda index: os.truncate(index, 0), ["is empty", "runfs reindex"]),
    ],
    ids=["missing", "newer", "older", "corrupt", "other", "empty"],
)
def test_index_that_cannot_be_used(
    make_project: Make, tmp_path: Path, harm: Callable[[Path], object], says: list[str]
) -> None:
    project = make_project(runs=1, size=1000, report=False)
    harm(project.index)
    before = project.index.read_bytes() if project.index.exists() else None
    said = start_fails(Mounted(project, tmp_path / "mnt"))
    assert said.startswith(f"{project.index}: ")
    for words in says:
        assert words in said
    assert not is_fuse_mount(tmp_path / "mnt")
    assert (project.index.read_bytes() if project.index.exists() else None) == before


def test_locked_index(make_project: Make, tmp_path: Path) -> None:
    project = make_project(runs=1, size=1000, report=False)
    with locked(project.index):
        said = start_fails(Mounted(project, tmp_path / "mnt"))
    assert said.startswith(f"{project.index}: another program has kept it locked")
    assert "then try again" in said


def test_index_that_goes_wrong_under_a_mount(make_project: Make, mount: Mount) -> None:
    """The mount says so, serves what is open, and goes on when the index is back."""
    project = make_project(runs=1, size=1000, report=False)
    (uuid,) = project.runs
    mounted = mount(project)
    away = project.index.with_name("away")
    with (mounted.path / uuid / "weights.npy").open("rb") as held:
        for name in (".machinable.sqlite", ".machinable.sqlite-wal", ".machinable.sqlite-shm"):
            if (project.path / name).exists():
                (project.path / name).rename(away.with_name(f"away{name}"))
        until(lambda: "the index cannot be read just now" in mounted.log(), "a warning in the log")
        assert held.read()
        away.with_name("away.machinable.sqlite").rename(project.index)
    until(lambda: uuid in os.listdir(mounted.path), "the record is listed again")
    assert mounted.process is not None
    assert mounted.process.poll() is None


# --- the mountpoint -----------------------------------------------------------------------------------------------


class TestMountpoint:
    def test_it_is_not_an_empty_directory(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").touch()
        cases = {
            tmp_path / "none" / "here": ["there is no such directory", f"mkdir -p {tmp_path}/none/here"],
            tmp_path / "full": ["is not empty (thesis.tex)", "choose an empty directory"],
            tmp_path / "full" / "thesis.tex": ["is not a directory"],
            Path("/proc"): ["proc is mounted there", "choose another"],
        }
        for place, says in cases.items():
            mounted = Mounted(project, place)
            said = sentence(mounted.runfs(*mounted.command), 2)
            assert str(place) in said
            assert all(words in said for words in says), said
        assert (tmp_path / "full" / "thesis.tex").exists()

    def test_it_is_busy(self, make_project: Make, mount: Mount, tmp_path: Path) -> None:
        one, other = (make_project(name, runs=1, size=1000, report=False) for name in ("one", "other"))
        mounted = mount(one)
        said = start_fails(Mounted(other, mounted.path))
        assert said.startswith(f"{mounted.path} is mounted already")
        assert f"runfs umount {mounted.path}" in said
        said = start_fails(Mounted(one, tmp_path / "second"))
        assert f"process {mounted.pid}" in said
        assert str(mounted.path) in said
        assert set(one.runs) <= set(os.listdir(mounted.path))

    def test_it_would_hide_the_records(self, project: Project) -> None:
        hidden = Mounted(project, project.path)
        said = sentence(hidden.runfs(*hidden.command), 2)
        assert "is not empty" in said or "holds the index" in said

    def test_it_is_stale_after_a_kill(self, make_project: Make, tmp_path: Path) -> None:
        """What was acknowledged is there again, what was evicted is still evicted, and the dead mount no obstacle."""
        project = make_project(runs=2, size=300_000, report=False)
        away, written = project.runs
        mounted = Mounted(
            project, tmp_path / "mnt", stores=[(tmp_path / "store").as_uri()], options=["-o", "push.auto=false"]
        )
        with mounted:
            content = (mounted.path / away / "weights.npy").read_bytes()
            evict(mounted, away)
            with (mounted.path / written / "new.txt").open("w") as file:
                file.write("acknowledged")
            mounted.kill(unmount_stale=False)
            with pytest.raises(OSError, match="not connected"):
                os.listdir(mounted.path)
            said = sentence(mounted.runfs("status"), 2)
            assert f"{mounted.path}: its daemon is gone" in said
            assert f"runfs umount {mounted.path}" in said
            with pytest.raises(OSError, match="not connected"):  # loudly, not an empty run
                (project.directory(away) / "weights.npy").read_bytes()
            mounted.start()
            until(lambda: "cleaned up, nothing is lost" in mounted.log(), "the dead mount was cleaned up")
            assert (mounted.path / away / "weights.npy").read_bytes() == content
            assert (mounted.path / written / "new.txt").read_text() == "acknowledged"
            (line, *_more) = lines(mounted.runfs("safe", written), 1)
            assert line.startswith("not yet: ")


# --- a project that moved -----------------------------------------------------------------------------------------


def test_project_that_moved_while_evicted(make_project: Make, tmp_path: Path) -> None:
    """Its rows name the old place, so `runfs reindex` is needed as for machinable alone; then all is as before."""
    project = make_project("before", runs=2, size=300_000, report=False)
    away, here = project.runs
    store = (tmp_path / "store").as_uri()
    before = {uuid: tree(project.directory(uuid)) for uuid in project.runs}
    with Mounted(project, tmp_path / "mnt", stores=[store]) as mounted:
        evict(mounted, away)
        mounted.json("push")
    moved = Project(tmp_path / "elsewhere" / "after", project.runs)
    moved.path.parent.mkdir()
    project.path.rename(moved.path)
    with Mounted(moved, tmp_path / "mnt", stores=[store]) as mounted:
        done = mounted.json("reindex", exit_code=None)
        assert not [each for each in done["damaged"] if here in each["path"]], done
        assert {away, here} <= set(os.listdir(mounted.path))
        assert tree(mounted.path / here) == before[here]
        assert tree(mounted.path / away) == before[away]
        assert moved.directory(here).is_relative_to(moved.path)
        assert moved.directory(away).is_relative_to(moved.path)
        assert tree(moved.directory(away) / ".") == before[away]
    assert not project.path.exists()


# --- modes --------------------------------------------------------------------------------------------------------


def test_what_runfs_makes_for_itself_keeps_to_the_umask(make_project: Make, mount: Mount, tmp_path: Path) -> None:
    """Nobody else may write into the store or an imported record; what a process makes in the mount has its modes."""
    project = make_project(runs=1, size=300_000, report=False)
    (one,) = project.runs
    before = os.umask(0o022)
    try:
        mounted = mount(project, stores=[(tmp_path / "store").as_uri()])
        os.umask(0)
        (mounted.path / one / "ours").mkdir()
        (mounted.path / one / "ours" / "file").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((mounted.path / one / "ours").stat().st_mode) == 0o777
    assert stat.S_IMODE((mounted.path / one / "ours" / "file").stat().st_mode) == 0o666
    evict(mounted, one)
    open_to_all = [path for path in (tmp_path / "store").rglob("*") if path.stat().st_mode & 0o022]
    assert list((tmp_path / "store").rglob("*"))
    assert open_to_all == []


# --- disks that are full ------------------------------------------------------------------------------------------


class TestFullDisk:
    """The records' disk, with the cache and the state on it."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        with small_disk(tmp_path / "disk", "64m") as path:
            yield path

    @pytest.fixture
    def project(self, disk: Path, make_project: Make) -> Project:
        return make_project("disk/project", runs=3, size=2_000_000, report=False)

    @pytest.fixture
    def mounted(self, disk: Path, project: Project, mount: Mount, tmp_path: Path) -> Mounted:
        places = {f"RUNFS_{name}_DIR": str(disk / name.lower()) for name in ("STATE", "CACHE")}
        return mount(project, stores=[(tmp_path / "store").as_uri()], environment=places)

    def test_writers_are_told_and_nothing_acknowledged_is_lost(
        self, disk: Path, project: Project, mounted: Mounted
    ) -> None:
        one, *_others = project.runs
        mounted.json("push")
        fill_up(disk)
        with pytest.raises(OSError, match="No space left"), (mounted.path / one / "more.bin").open("wb") as file:
            file.write(bytes(8 * MIB))
        assert (mounted.path / one / "metrics.json").read_bytes()
        assert set(project.runs) <= set(os.listdir(mounted.path))
        said = lines(mounted.runfs("status"), 0)
        assert said
        (disk / "filler").unlink()
        with (mounted.path / one / "more.bin").open("wb") as file:
            file.write(b"now it fits")
        mounted.json("push")
        assert mounted.json("safe")["safe"]
        assert (mounted.path / one / "more.bin").read_bytes() == b"now it fits"

    def test_an_eviction_makes_room_on_a_full_disk(self, disk: Path, project: Project, mounted: Mounted) -> None:
        """The names of an evicted record take some room; without it nothing is dropped, and it says so."""
        one, two, _three = project.runs
        before = {uuid: tree(project.directory(uuid)) for uuid in project.runs}
        mounted.json("push")
        fill_up(disk)
        done = mounted.runfs("evict", one)
        said = done.stdout + done.stderr
        if done.returncode == 0:
            assert project.directory(one).is_symlink()
        else:
            assert "space" in said or "disk is full" in said, said
            assert not project.directory(one).is_symlink()
            assert tree(project.directory(one)) == before[one]
        assert tree(mounted.path / two) == before[two]
        (disk / "filler").unlink()
        evict(mounted, one, two)
        assert tree(mounted.path / one) == before[one]
        assert not list(project.path.rglob(".runfs-*"))

    def test_a_reader_of_evicted_bytes_is_told(self, disk: Path, project: Project, mounted: Mounted) -> None:
        one, *_others = project.runs
        content = (mounted.path / one / "weights.npy").read_bytes()
        evict(mounted, one)
        fill_up(disk)
        with (mounted.path / one / "weights.npy").open("rb") as file:  # the kernel may still have what was read before
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match=r".") as caught:
            (mounted.path / one / "weights.npy").read_bytes()
        assert caught.value.errno in (errno.ENOSPC, errno.EIO)
        assert (mounted.path / one / "metrics.json").read_bytes()  # it was kept
        done = lines(mounted.runfs("hydrate", one), 1)
        assert any(f"{one}: not hydrated" in line and "no space" in line and "--until-free" in line for line in done)
        (disk / "filler").unlink()
        assert (mounted.path / one / "weights.npy").read_bytes() == content


# --- the configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[cache]\nhihg = '80%'", ["'cache.hihg'", "did you mean 'cache.high'?"]),
        ("min_copies = 'two'", ["min_copies", "'two'"]),
        ("[cache]\nkeep_small = '64 quarks'", ["cache.keep_small", "'64 quarks'"]),
        ("[stores.lab]\nurl = '/data'", ["stores.lab.url", "s3://bucket/prefix or file:///dir"]),
        ("[stores.lab]\nurl = 's4://bucket'", ["s4", "s3"]),
        ("[stores.lab]\nurl = 's3://bucket'\n[stores.lab.options]\nregoin = 'x'", ["regoin", "region"]),
    ],
)
def test_configuration_that_is_wrong(project: Project, tmp_path: Path, toml: str, says: list[str]) -> None:
    file = tmp_path / "runfs.toml"
    file.write_text(toml)
    said = start_fails(Mounted(project, tmp_path / "mnt", options=["--config", str(file)]))
    for words in says:
        assert words in said
    assert not is_fuse_mount(tmp_path / "mnt")


def test_close_waits_for_the_homes_where_that_is_asked_for(make_project: Make, tmp_path: Path) -> None:
    """`on_close = "push"`: when close has returned, the store holds the bytes, though nothing is pushed by itself."""
    project, store = make_project(runs=1, report=False), tmp_path / "store"
    options = ["-o", "push.auto=false,on_close=push"]
    with Mounted(project, tmp_path / "mnt", stores=[store.as_uri()], options=options) as mounted:
        (mounted.path / project.runs[0] / "new.txt").write_bytes(b"acknowledged by the store")
        held = [path.read_bytes() for path in store.rglob("*") if path.is_file()]
        assert b"acknowledged by the store" in held
