"""Kernel passthrough: what the kernel reads and writes past the daemon is noted, durable, pushed and never mixed up;
where there is none, the same mount works plainly.

A file is open passed through when a map of it shows at once what is written into the file behind it (`passes`).
"""

import ctypes
import mmap
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import in_ci
from tests.mounted import test_semantics as semantics
from tests.mounted.records import BIG, MIB, Record, Shared, ask, big_bytes, until
from tests.mounted.test_semantics import opened, same
from tests.mounts import unmount_under

pytestmark = pytest.mark.mounted
_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(3 * [ctypes.c_int]), ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def state(place: Shared) -> str:
    """What a mount says of its passthrough."""
    return str(ask(place.mounted, "status")["passthrough"])


@pytest.fixture(autouse=True)
def _possible(request: pytest.FixtureRequest) -> None:
    if os.geteuid() != 0 or request.getfixturevalue("possible") is False:
        if in_ci():
            pytest.fail("passthrough needs root and Linux 6.9 or later", pytrace=False)
        pytest.skip("passthrough needs root and Linux 6.9 or later")


@pytest.fixture(scope="module")
def possible() -> bool:
    return os.geteuid() == 0 and tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)


def passes(fd: int, behind: Path) -> bool:
    """Whether an open file is passed through to the file behind it."""
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as seen, opened(behind, os.O_RDWR) as other:
        before = seen[0]
        os.pwrite(other, bytes([before ^ 1]), 0)
        try:
            return seen[0] != before
        finally:
            os.pwrite(other, bytes([before]), 0)


def shadow(place: Shared, record: Record) -> Path:
    """Where the files of an evicted record are."""
    return next((place.place / "c").rglob(record.uuid))


def come_back(place: Shared, record: Record, name: str = "big.bin") -> Path:
    """Have all of an evicted record in the cache; the file behind one of its names."""
    assert ask(place.mounted, "hydrate", uuids=[record.uuid])["exit"] == 0
    behind = shadow(place, record) / name
    until(lambda: "user.runfs.content" not in os.listxattr(behind), f"{name} is whole")
    return behind


class TestModes:
    def test_it_is_on_and_said(self, shared: Shared) -> None:
        assert state(shared) == "on"
        found = [each for each in ask(shared.mounted, "doctor")["checks"] if each["name"] == "passthrough"]
        assert [(each["ok"], each["message"]) for each in found] == [(True, "on")]

    def test_the_daemon_is_not_asked(self, shared: Shared, resident: Record) -> None:
        """Reads and writes of an open file go on while the daemon stands still."""
        code = "import os, sys; fd = int(sys.argv[1]); os.pwrite(fd, b'written', 5000); print(os.pread(fd, 9, 4999))"
        expected = big_bytes()[4999:5000] + b"written" + big_bytes()[5007:5008]
        with opened(resident.path / "big.bin", os.O_RDWR) as fd:
            os.pwrite(fd, b"w", 5000)  # with the first write of a mount the kernel learns that there is no getxattr
            shared.mounted.pause()
            try:
                timer = threading.Timer(10, shared.mounted.resume)
                timer.start()
                began = time.monotonic()
                with subprocess.Popen(
                    [sys.executable, "-uc", code, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE, text=True
                ) as asks:
                    assert asks.stdout is not None
                    assert asks.stdout.readline().strip() == repr(expected)
                    took = time.monotonic() - began
                    timer.cancel()
                    shared.mounted.resume()  # its end is a close, which is told
            finally:
                shared.mounted.resume()
            assert took < 9
        with opened(resident.plain / "big.bin", os.O_WRONLY) as fd:
            os.pwrite(fd, b"written", 5000)
        resident.check()

    def test_every_open_of_a_file_is_of_one_kind(self, resident: Record) -> None:
        path, behind = resident.path / "big.bin", resident.working / "big.bin"
        for _round in range(2):  # the second time with another backing id
            with opened(path, os.O_RDONLY) as one:
                with opened(path, os.O_RDWR) as two, opened(path, os.O_RDONLY) as three:
                    assert passes(one, behind)
                    assert passes(two, behind)
                    assert passes(three, behind)
                with opened(path, os.O_RDWR | os.O_APPEND) as four:
                    assert passes(four, behind)

    def test_by_its_other_name_too(self, resident: Record) -> None:
        behind = resident.working / "chunk.bin"
        other = resident.path / "sub" / "second name.bin"
        with opened(resident.path / "chunk.bin", os.O_RDONLY) as one, opened(other, os.O_RDWR) as two:
            assert passes(one, behind)
            assert passes(two, behind)

    def test_open_while_it_comes_stays_plain_until_the_last_release(self, shared: Shared, evicted: Record) -> None:
        path, behind = evicted.path / "big.bin", shadow(shared, evicted) / "big.bin"
        with opened(path, os.O_RDONLY) as one:
            os.pread(one, 10, 0)
            while os.read(one, MIB):
                pass
            come_back(shared, evicted)
            with opened(path, os.O_RDONLY) as two:
                assert not passes(two, behind)
                assert not passes(one, behind)
        until(lambda: _passes(path, behind), "passed through at the next open")
        evicted.same()

    def test_evicted_and_whole(self, shared: Shared, evicted: Record) -> None:
        behind = come_back(shared, evicted)
        assert _passes(evicted.path / "big.bin", behind)
        small = shadow(shared, evicted) / "small.txt"  # never left
        assert _passes(evicted.path / "small.txt", small)
        evicted.check()

    def test_restored_while_open(self, shared: Shared, evicted: Record) -> None:
        """The file behind a name may be another one now: what opens it beside the old one reads it right."""
        behind = come_back(shared, evicted)
        path = evicted.path / "big.bin"
        with opened(path, os.O_RDONLY) as old:
            assert passes(old, behind)
            assert ask(shared.mounted, "hydrate", uuids=[evicted.uuid], restore=True)["exit"] == 0
            with opened(path, os.O_RDWR) as new:
                os.pwrite(new, b"changed", 2 * MIB)
                assert os.pread(new, 7, 2 * MIB) == b"changed"
                assert os.pread(old, 2 * MIB, 0) == big_bytes()[: 2 * MIB]
        assert _passes(path, evicted.working / "big.bin")
        with opened(evicted.plain / "big.bin", os.O_WRONLY) as fd:
            os.pwrite(fd, b"changed", 2 * MIB)
        evicted.check()

    def test_one_that_must_not_pass_beside_those_that_do(self, resident: Record) -> None:
        """A writer of a set-uid file: its writes come to the daemon, and all see what the others write."""
        path, behind = resident.path / "big.bin", resident.working / "big.bin"
        for place in (resident.path, resident.plain):
            os.chmod(place / "big.bin", 0o4755)
        with opened(path, os.O_RDONLY) as reader, opened(path, os.O_RDWR) as writer:
            assert passes(reader, behind)
            assert passes(writer, behind)
            os.pwrite(writer, b"seen", 3 * MIB)
            with mmap.mmap(writer, 0) as pages:
                pages[4 * MIB : 4 * MIB + 4] = b"also"
            for fd in (reader, writer):
                assert (os.pread(fd, 4, 3 * MIB), os.pread(fd, 4, 4 * MIB)) == (b"seen", b"also")
        with opened(resident.plain / "big.bin", os.O_RDWR) as fd:
            os.pwrite(fd, b"seen", 3 * MIB)
            os.pwrite(fd, b"also", 4 * MIB)
        resident.check()

    def test_headers_are_never(self, resident: Record) -> None:
        assert not _passes(resident.path / "id.json", resident.working / "id.json", os.O_RDONLY)

    def test_a_new_file_from_its_creation(self, resident: Record) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with opened(resident.path / "new", flags) as fd:
            os.write(fd, b"new" * 1000)
            assert passes(fd, resident.working / "new")
        (resident.plain / "new").write_bytes(b"new" * 1000)
        resident.check()


def _passes(path: Path, behind: Path, flags: int = os.O_RDWR) -> bool:
    with opened(path, flags) as fd:
        return passes(fd, behind)


class TestChanges:
    """What is written past the daemon is dirty, durable and pushed."""

    def clean(self, record: Record) -> None:
        time.sleep(0.3)  # what filled the record is noticed by then
        until(lambda: self.push(record)["exit"] == 0 and not record.status()["dirty"], "it is pushed")

    def test_dirty_before_the_open_is_answered(self, resident: Record) -> None:
        self.clean(resident)
        with opened(resident.path / "big.bin", os.O_RDONLY):
            assert not resident.status()["dirty"]
        with opened(resident.path / "big.bin", os.O_RDWR) as fd:
            assert resident.status()["dirty"]
            self.push(resident)
            assert resident.status()["dirty"], "clean with a writer: what it writes next would be lost"
            os.pwrite(fd, b"after the push", 3 * MIB)
        with opened(resident.plain / "big.bin", os.O_RDWR) as fd:
            os.pwrite(fd, b"after the push", 3 * MIB)
        resident.check()

    @staticmethod
    def push(record: Record) -> dict[str, Any]:
        return ask(record.mounted, "push", uuids=[record.uuid])

    def test_through_a_map_after_close(self, shared: Shared, record: Record) -> None:
        if record.state == "evicted":
            come_back(shared, record)
        path = record.path / "big.bin"
        before = os.stat(path)
        for place in (record.path, record.plain):
            fd = os.open(place / "big.bin", os.O_RDWR)
            pages = _libc.mmap(None, BIG, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
            os.close(fd)  # Python's own map would keep a descriptor
            os.stat(place / "big.bin")  # what is kept of it from here on is to be forgotten
            time.sleep(0.05)
            if place == record.path:
                self.push(record)
                assert record.status()["dirty"], "clean with a map: what is written through it next would be lost"
                assert ask(shared.mounted, "evict", uuids=[record.uuid])["exit"] != 0
            ctypes.memmove(pages + 4 * MIB, b"mapped", 6)
            assert _libc.munmap(ctypes.c_void_p(pages), BIG) == 0
        until(lambda: os.stat(path).st_mtime_ns != before.st_mtime_ns, "its time is told")
        record.check()

    def test_attributes_after_a_map(self, shared: Shared, evicted: Record) -> None:
        """They are kept for minutes for an evicted record; a close makes them right."""
        behind = come_back(shared, evicted)
        with opened(evicted.path / "big.bin", os.O_RDWR) as fd, mmap.mmap(fd, 0) as pages:
            before = os.fstat(fd).st_mtime_ns
            pages[:3] = b"abc"
            assert os.stat(behind).st_mtime_ns != before
            os.close(os.dup(fd))
            assert os.fstat(fd).st_mtime_ns == os.stat(behind).st_mtime_ns

    def test_size_and_place_of_appends(self, record: Record) -> None:
        def act(at: Path) -> object:
            flags = os.O_WRONLY | os.O_APPEND
            with opened(at / "log.txt", flags) as one, opened(at / "log.txt", flags) as two:
                for number in range(20):
                    os.write(one, b"one %d\n" % number)
                    os.write(two, b"two %d\n" % number)
                return os.fstat(one).st_size, os.lseek(two, 0, os.SEEK_END), (at / "log.txt").read_bytes()[-30:]

        same(record, act)
        record.check()

    def test_truncated_while_open(self, resident: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDWR) as fd:
                os.ftruncate(fd, 3 * MIB + 1)
                cut = os.fstat(fd).st_size, len(os.pread(fd, BIG, 0))
                os.truncate(at / "big.bin", 100)
                again = os.fstat(fd).st_size, len(os.pread(fd, BIG, 0))
                os.close(os.open(at / "big.bin", os.O_WRONLY | os.O_TRUNC))
                nothing = os.pread(fd, 10, 0)
                os.pwrite(fd, b"beyond", 5 * MIB)
                return cut, again, nothing, os.fstat(fd).st_size, os.pread(fd, 4, 5 * MIB - 2)

        same(resident, act)
        resident.check()

    def test_renamed_into_another_record_while_written(self, shared: Shared, resident: Record) -> None:
        """The record it is in now stays dirty for its sake, and the other does not."""
        other = shared.take("resident")
        fd = os.open(resident.path / "big.bin", os.O_RDWR)
        os.rename(resident.path / "big.bin", other.path / "moved")
        self.clean(resident)
        self.push(other)
        assert other.status()["dirty"]
        os.pwrite(fd, b"after the move", MIB)
        os.close(fd)
        os.rename(resident.plain / "big.bin", other.plain / "moved")
        with opened(other.plain / "moved", os.O_WRONLY) as plain:
            os.pwrite(plain, b"after the move", MIB)
        other.check()
        resident.check()

    def test_no_eviction_while_open(self, shared: Shared, resident: Record) -> None:
        for flags, why in ((os.O_RDONLY, "open through the mount"), (os.O_RDWR, "open for writing")):
            with opened(resident.path / "big.bin", flags):
                answer = ask(shared.mounted, "evict", uuids=[resident.uuid])
                assert answer["exit"] != 0
                assert why in str(answer)
                assert not resident.working.is_symlink()
        resident.check()

    def test_set_uid_goes_with_a_write_of_another_user(self) -> None:
        """The kernel leaves that to us: with passthrough and without. Root keeps the bits, as on any file system."""
        with _for_everybody() as place:
            record = place.take("resident")
            path, behind = record.path / "big.bin", record.working / "big.bin"
            for act in ("printf x | dd of={} conv=notrunc", "truncate -s 500 {}", ": > {}"):
                for user, left in ((0, 0o6777), (65534, 0o777)):
                    path.write_bytes(b"some bytes")
                    os.chmod(path, 0o6777)
                    with opened(path, os.O_RDONLY):  # passed through, so that the writer is beside it
                        command = ["sh", "-c", act.format(path)]
                        subprocess.run(command, user=user, check=True, timeout=30, stderr=subprocess.DEVNULL)
                    assert stat.S_IMODE(os.stat(behind).st_mode) == left, (act, user)


@contextmanager
def _for_everybody() -> Iterator[Shared]:
    """A mount that another user may use, in a place he can reach."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        place = Shared(Path(name), 1, ("--allow-other",))
        try:
            with place.mounted:
                for directory in (place.project.path, *place.project.path.rglob("*")):
                    if directory.is_dir() and not directory.is_symlink():
                        os.chmod(directory, 0o755)
                yield place
        finally:
            unmount_under(Path(name))


class TestDurability:
    def test_close_and_fsync_reach_the_disk(self, tmp_path: Path) -> None:
        """Nobody tells of the writes, so each close of a writer syncs."""
        place = Shared(tmp_path, 1)
        trace = tmp_path / "trace"
        place.mounted.environment["RUNFS_FAULT"] = f"file.synced=trace:{trace}"

        def syncs() -> int:
            return trace.read_text().count("file.synced") if trace.exists() else 0

        with place.mounted:
            record = place.take("resident")
            before = syncs()
            with opened(record.path / "big.bin", os.O_RDWR) as fd:
                os.pwrite(fd, b"one", 0)
                os.fsync(fd)
                assert syncs() == before + 1
                os.pwrite(fd, b"two", 0)
                with opened(record.path / "big.bin", os.O_RDONLY) as other:
                    os.fsync(other)  # of any descriptor: of the file
                    assert syncs() == before + 2
            assert syncs() >= before + 4
            after = syncs()
            (record.path / "big.bin").read_bytes()
            assert syncs() == after

    def test_killed_with_a_passed_through_writer(self, tmp_path: Path) -> None:
        """What fsync and msync acknowledged survives kill -9 and is pushed by the next mount; so is what was written
        after that, as the unit was noted before the open was answered."""
        place = Shared(tmp_path, 2)
        with place.mounted:
            assert state(place) == "on"
            records = [place.take("resident"), place.take("evicted")]
            come_back(place, records[1])
            for each in records:
                TestChanges().clean(each)
            files = [(os.open(each.path / "big.bin", os.O_RDWR), each) for each in records]
            for fd, each in files:
                pages = mmap.mmap(fd, 0)
                os.pwrite(fd, b"acknowledged", 100)
                os.fsync(fd)
                pages[2 * MIB : 2 * MIB + 6] = b"mapped"
                pages.flush()
                os.pwrite(fd, b"not closed", 4 * MIB)
                for place_, data in ((100, b"acknowledged"), (2 * MIB, b"mapped"), (4 * MIB, b"not closed")):
                    with opened(each.plain / "big.bin", os.O_WRONLY) as plain:
                        os.pwrite(plain, data, place_)
                pages.close()
            place.mounted.kill()
            for fd, _each in files:
                with suppress(OSError):  # nobody is there to close it
                    os.close(fd)
            place.mounted.command += ["-o", "push.auto=false"]
            place.mounted.start()
            queued = {row["uuid"] for row in ask(place.mounted, "status")["queue"]}
            assert queued >= {each.uuid for each in records}
            for each in records:
                each.check()

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """The writer is told, by the kernel itself; what was there before stays, and there is room again later."""
        with _disk(tmp_path, 160) as disk:
            place = Shared(disk, 1)
            with place.mounted:
                record = place.take("resident")
                with opened(record.path / "big.bin", os.O_RDWR) as fd:
                    assert passes(fd, record.working / "big.bin")
                    with pytest.raises(OSError, match="No space left"):
                        _fill(fd)
                    assert os.pread(fd, BIG, 0) == big_bytes()
                    os.ftruncate(fd, BIG)
                record.same()


def _fill(fd: int) -> None:
    for number in range(400):
        os.pwrite(fd, bytes(MIB), BIG + number * MIB)


@contextmanager
def _disk(tmp_path: Path, size: int, kind: str = "ext4") -> Iterator[Path]:
    """A file system of so many MiB in a file."""
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    image.touch()
    os.truncate(image, size * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    try:
        yield path
    finally:
        unmount_under(path)
        subprocess.run(["umount", "-l", str(path)], check=True)


class TestTold:
    """An answer on its way is not mixed up with what the daemon tells the kernel at the same moment."""

    def test_just_before_an_answer(self, tmp_path: Path) -> None:
        place = Shared(tmp_path, 1)
        place.mounted.program = [sys.executable, "-c", TELLING]
        with place.mounted:
            record = place.take("resident")
            for _round in range(3):
                assert _passes(record.path / "big.bin", record.working / "big.bin")
            assert state(place) == "on"
            record.check()

    def test_while_other_threads_tell_the_kernel(self, shared: Shared, resident: Record) -> None:
        over = time.monotonic() + 3
        failed: list[BaseException] = []

        def touch() -> None:
            while time.monotonic() < over:
                for name in ("small.txt", "log.txt", "private", "chunk.bin"):
                    os.utime(resident.working / name)
                time.sleep(0.001)

        def read(name: str) -> None:
            expected = (resident.plain / name).read_bytes()
            try:
                while time.monotonic() < over:
                    assert (resident.path / name).read_bytes() == expected
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=touch)]
        threads += [threading.Thread(target=read, args=(name,)) for name in ("small.txt", "log.txt", "private")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert state(shared) == "on"
        resident.check()


# --- where there is none ----------------------------------------------------------------------------------------------

WITHOUT_PRIVILEGE = """
import ctypes, runpy, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, data) == 0
fields = list(struct.unpack("6I", data))
fields[0] &= ~(1 << 21)
fields[1] &= ~(1 << 21)
assert libc.capset(header, struct.pack("6I", *fields)) == 0
sys.argv = ["runfs", *sys.argv[1:]]
runpy.run_module("daemon.cli", run_name="__main__", alter_sys=True)
"""
# A pyfuse3 that holds on to what the handler returned: then its answer cannot be caught.
ANOTHER_PYFUSE3 = """
import runpy, sys
from daemon.operations import Operations
asked, kept = Operations.open, []
async def open(self, *args):
    kept.append(await asked(self, *args))
    return kept[-1]
Operations.open = open
sys.argv = ["runfs", *sys.argv[1:]]
runpy.run_module("daemon.cli", run_name="__main__", alter_sys=True)
"""
# One in which another thread tells the kernel something just before an open is answered.
TELLING = """
import runpy, sys
import pyfuse3
from daemon.passthrough import Passthrough
answer = Passthrough.answer
def telling(self, handle, fh, **others):
    info = answer(self, handle, fh, **others)
    pyfuse3.invalidate_inode(handle.node.ino, attr_only=True)
    pyfuse3.invalidate_inode(1)
    return info
Passthrough.answer = telling
sys.argv = ["runfs", *sys.argv[1:]]
runpy.run_module("daemon.cli", run_name="__main__", alter_sys=True)
"""
PLAIN: dict[str, tuple[str, str]] = {
    "switched off": ("", "off: switched off"),
    "no privilege": (WITHOUT_PRIVILEGE, "off: it needs CAP_SYS_ADMIN"),
    "another pyfuse3": (ANOTHER_PYFUSE3, "off: this pyfuse3 answers"),
}


@pytest.mark.parametrize("why", PLAIN)
def test_without(tmp_path: Path, why: str) -> None:
    """The mount works plainly and says why."""
    program, said = PLAIN[why]
    place = Shared(tmp_path, 2, ("-o", "passthrough=off") if not program else ())
    if program:
        place.mounted.program = [sys.executable, "-c", program]
    with place.mounted:
        assert state(place).startswith(said)
        for kind in ("resident", "evicted"):
            record = place.take(kind)
            if kind == "resident":
                assert not _passes(record.path / "big.bin", record.working / "big.bin")
            same(record, _write_and_map)
            record.check()
    assert "please report" not in place.mounted.log()


def _write_and_map(at: Path) -> object:
    with opened(at / "big.bin", os.O_RDWR) as fd, mmap.mmap(fd, 0) as pages:
        os.pwrite(fd, b"written", 10)
        pages[3 * MIB : 3 * MIB + 6] = b"mapped"
        pages.flush()
        return os.pread(fd, 20, 0), pages[5:30], os.pread(fd, 10, 3 * MIB)


def test_memory_is_never_passed_through(tmp_path: Path) -> None:
    """A map of a file in tmpfs leaves no trace in its times, so what it writes could not be found."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256M", "tmpfs", str(disk)], check=True)
    try:
        place = Shared(disk, 1)
        with place.mounted:
            record = place.take("resident")
            assert not _passes(record.path / "big.bin", record.working / "big.bin")
            same(record, _write_and_map)
            record.same()
    finally:
        unmount_under(disk)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_restored_to_another_disk_while_open(tmp_path: Path) -> None:
    """Behind the name is another file now: a new open gets it, as another inode, and the old one keeps its own."""
    with _disk(tmp_path, 160) as disk:
        place = Shared(disk, 1)
        place.mounted.environment["RUNFS_CACHE_DIR"] = str(tmp_path / "cache")
        with place.mounted:
            record = place.take("evicted")
            path = record.path / "big.bin"
            assert ask(place.mounted, "hydrate", uuids=[record.uuid])["exit"] == 0
            behind = next((tmp_path / "cache").rglob(record.uuid)) / "big.bin"
            until(lambda: _passes(path, behind), "it is whole")
            with opened(path, os.O_RDONLY) as old:
                assert ask(place.mounted, "hydrate", uuids=[record.uuid], restore=True)["exit"] == 0
                for at in (record.path, record.plain):
                    with opened(at / "big.bin", os.O_RDWR) as new, mmap.mmap(new, 0) as pages:
                        os.pwrite(new, b"changed", 2 * MIB)
                        pages[3 * MIB : 3 * MIB + 6] = b"mapped"
                assert os.pread(old, BIG, 0) == big_bytes()
            record.check()


def test_on_an_overlay(tmp_path: Path) -> None:
    """A container's own file system is stacked already; one more is allowed."""
    below, above, work, disk = (tmp_path / name for name in ("below", "above", "work", "disk"))
    for each in (below, above, work, disk):
        each.mkdir()
    layers = f"lowerdir={below},upperdir={above},workdir={work}"
    if subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(disk)], check=False).returncode:
        pytest.skip("no overlay can be mounted here")
    try:
        place = Shared(disk, 1)
        with place.mounted:
            assert state(place) == "on"
            record = place.take("resident")
            assert _passes(record.path / "big.bin", record.working / "big.bin")
            same(record, _write_and_map)
            record.same()
    finally:
        unmount_under(disk)
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    place = Shared(tmp_path_factory.mktemp("plain"), 20, ("-o", "passthrough=off"))
    with place.mounted:
        yield place


@pytest.mark.parametrize("kind", ["resident", "evicted"])
@pytest.mark.parametrize(
    "test",
    [
        semantics.TestNames.test_unlinked_open_file_stays_readable,
        semantics.TestNames.test_rename_of_an_open_file,
        semantics.TestNames.test_hard_links_are_one_file,
        semantics.TestWriting.test_truncate_down_and_up_gives_zeros,
        semantics.TestWriting.test_opening_with_truncation_brings_nothing,
        semantics.TestWriting.test_writes_here_and_there,
        semantics.TestWriting.test_two_handles_see_each_other,
        semantics.TestWriting.test_sync_and_direct_flags,
    ],
)
def test_plainly(plainly: Shared, test: Callable[[Any, Record], None], kind: str) -> None:
    """The promises that depend on who reads and writes, once more without passthrough. (All of them:
    `RUNFS_PASSTHROUGH=off pytest tests/mounted`.)"""
    test(None, plainly.take(kind))


class TestKept:
    """Small files of evicted records, whose content the kernel gets with the first open."""

    def test_nothing_is_asked_after_the_open(self, shared: Shared, evicted: Record) -> None:
        """It is read, looked at and closed while the daemon stands still."""
        expected = (evicted.plain / "small.txt").read_bytes()
        code = (
            "import os, sys; fd = int(sys.argv[1]); print(os.pread(fd, 99999, 0), os.fstat(fd).st_size); os.close(fd)"
        )
        os.stat(evicted.path / "small.txt")
        fd = os.open(evicted.path / "small.txt", os.O_RDONLY)
        shared.mounted.pause()
        try:
            timer = threading.Timer(10, shared.mounted.resume)
            timer.start()
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-uc", code, str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True
            )
            os.close(fd)
            took = time.monotonic() - began
            timer.cancel()
        finally:
            shared.mounted.resume()
        assert done.stdout.strip() == f"{expected!r} {len(expected)}"
        assert took < 9

    @pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 64 << 10, (64 << 10) + 1])
    def test_what_is_written_is_read(self, evicted: Record, size: int) -> None:
        """Before, beside and after open readers, by every way of writing."""
        path = evicted.path / f"kept-{size}"
        path.write_bytes(b"a" * size)
        assert path.read_bytes() == b"a" * size
        with opened(path, os.O_RDONLY) as reader:
            assert os.pread(reader, size + 1, 0) == b"a" * size
            with opened(path, os.O_RDWR) as writer:
                os.pwrite(writer, b"b", size - 1)
                assert os.pread(reader, size + 1, 0) == b"a" * (size - 1) + b"b"
                with mmap.mmap(writer, 0) as mapped:
                    mapped[0:1] = b"c"
                    assert os.pread(reader, 1, 0) == b"c"
            assert os.pread(reader, 1, 0) == b"c"
        assert path.read_bytes()[:1] == b"c"
        with opened(path, os.O_RDWR) as writer, mmap.mmap(writer, 0) as mapped:  # nobody reads beside it
            mapped[0:1] = b"d"
        assert path.read_bytes()[:1] == b"d"
        os.truncate(path, size // 2)
        with path.open("ab") as file:
            file.write(b"end")
        assert path.read_bytes()[size // 2 :] == b"end"
        path.unlink()

    def test_a_reader_that_truncates_is_heard(self, evicted: Record) -> None:
        os.close(os.open(evicted.path / "small.txt", os.O_RDONLY | os.O_TRUNC))
        assert (evicted.path / "small.txt").read_bytes() == b""
        os.truncate(evicted.plain / "small.txt", 0)
