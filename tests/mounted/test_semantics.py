"""What POSIX and the design promise of files and directories, on resident and evicted records of a real mount."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.mounted.records import BIG, MIB, Record, Shared, ask, big_bytes, digest, evict, run, tree, until
from tests.mounting import Mounted

pytestmark = pytest.mark.mounted
Act = Callable[[Path], object]


def outcome(act: Act, place: Path) -> object:
    """What an action gives, or the name of its error."""
    try:
        return act(place)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def same(record: Record, act: Act) -> object:
    """Do it in the plain directory and in the record; both must give the same, which is returned."""
    plain, mounted = outcome(act, record.plain), outcome(act, record.path)
    assert mounted == plain
    return mounted


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o666) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def write_at(path: Path, offset: int, data: bytes, flags: int = os.O_WRONLY) -> int:
    with opened(path, flags) as fd:
        return os.pwrite(fd, data, offset)


class TestNames:
    def test_exclusive_create(self, record: Record) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        assert same(record, lambda at: write_at(at / "new", 0, b"first", flags)) == 5
        assert same(record, lambda at: write_at(at / "new", 0, b"second", flags)) == "EEXIST"
        assert same(record, lambda at: write_at(at / "big.bin", 0, b"x", flags)) == "EEXIST"
        assert same(record, lambda at: write_at(at / "link", 0, b"x", flags)) == "EEXIST"
        record.check()

    def test_rename_over(self, record: Record) -> None:
        same(record, lambda at: os.rename(at / "big.bin", at / "log.txt"))
        same(record, lambda at: os.rename(at / "small.txt", at / "private"))
        assert same(record, lambda at: os.rename(at / "sub", at / "log.txt")) == "ENOTDIR"
        assert same(record, lambda at: os.rename(at / "log.txt", at / "sub")) == "EISDIR"
        assert same(record, lambda at: os.rename(at / "sub", at / "sub" / "in")) == "EINVAL"
        assert same(record, lambda at: os.rename(at / "nothing", at / "else")) == "ENOENT"
        same(record, lambda at: (at / "filled").mkdir())
        same(record, lambda at: (at / "filled" / "x").touch())
        assert same(record, lambda at: os.rename(at / "sub", at / "filled")) == "ENOTEMPTY"
        record.check()

    def test_exchange(self, record: Record) -> None:
        """RENAME_EXCHANGE and RENAME_NOREPLACE, through mv where it knows them."""
        same(record, lambda at: os.link(at / "log.txt", at / "third"))
        record.both("mv -n small.txt log.txt; test -e small.txt; head -1 log.txt")
        record.check()

    def test_unlinked_open_file_stays_readable(self, record: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDWR) as fd:
                os.unlink(at / "big.bin")
                status = os.fstat(fd)
                os.pwrite(fd, b"changed", 4 * MIB)
                first = hashlib.sha256(os.pread(fd, BIG, 0)).hexdigest()
                os.ftruncate(fd, 3 * MIB + 5)
                os.fchmod(fd, 0o640)
                after = os.fstat(fd)
                rest = hashlib.sha256(os.pread(fd, BIG, 0)).hexdigest()
                return status.st_size, status.st_nlink, first, after.st_size, stat.S_IMODE(after.st_mode), rest

        same(record, act)
        assert not (record.path / "big.bin").exists()
        record.check()

    def test_a_new_file_under_an_unlinked_name(self, record: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDONLY) as fd:
                os.unlink(at / "big.bin")
                (at / "big.bin").write_bytes(b"another")
                return os.pread(fd, 100, 5 * MIB).hex(), (at / "big.bin").read_bytes(), os.fstat(fd).st_size

        same(record, act)
        record.check()

    def test_rename_of_an_open_file(self, record: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDWR) as fd, opened(at / "log.txt", os.O_RDONLY) as covered:
                before = os.pread(fd, 10, 0)
                os.rename(at / "big.bin", at / "sub" / "moved")
                os.pwrite(fd, b"after the move", 2 * MIB - 3)
                os.rename(at / "sub" / "moved", at / "log.txt")
                os.pwrite(fd, b"after the second", BIG)
                return before, os.pread(fd, 20, 5 * MIB), os.fstat(fd).st_size, len(os.pread(covered, MIB, 0))

        same(record, act)
        record.check()

    def test_hard_links_are_one_file(self, record: Record) -> None:
        def act(at: Path) -> object:
            os.link(at / "big.bin", at / "sub" / "again")
            with opened(at / "sub" / "again", os.O_WRONLY) as fd:
                os.pwrite(fd, b"by the other name", MIB + 5)
            one, other = os.stat(at / "big.bin"), os.stat(at / "sub" / "again")
            assert one.st_ino == other.st_ino
            assert os.stat(at / "chunk.bin").st_ino == os.stat(at / "sub" / "second name.bin").st_ino
            os.unlink(at / "chunk.bin")
            return one.st_nlink, other.st_size, (at / "big.bin").read_bytes()[MIB : MIB + 30]

        same(record, act)
        record.check()
        assert os.stat(record.path / "big.bin").st_ino == os.stat(record.path / "sub" / "again").st_ino

    def test_hard_links_are_one_file_also_when_the_kernel_forgets_between_two_looks(self, record: Record) -> None:
        """tar and rsync look at one name, later at the other, and compare inode numbers."""
        drop = Path("/proc/sys/vm/drop_caches")
        if not os.access(drop, os.W_OK):
            pytest.skip("only root can make the kernel forget")
        numbers = set()
        for name in ("chunk.bin", "sub/second name.bin", "chunk.bin"):
            drop.write_text("2\n")
            numbers.add(os.stat(record.path / name).st_ino)
        assert len(numbers) == 1

    def test_no_link_between_records(self, shared: Shared, record: Record) -> None:
        other = shared.take("resident")
        with pytest.raises(OSError, match="cross-device") as caught:
            os.link(record.path / "big.bin", other.path / "from outside")
        assert caught.value.errno == errno.EXDEV

    def test_symlinks(self, record: Record) -> None:
        def act(at: Path) -> object:
            os.symlink("../nowhere", at / "sub" / "dangling")
            os.symlink("x" * 1000, at / "long")
            os.rename(at / "link", at / "moved link")
            return os.readlink(at / "sub" / "dangling"), os.readlink(at / "long"), os.lstat(at / "long").st_size

        same(record, act)
        assert same(record, lambda at: (at / "sub" / "dangling").read_bytes()) == "ENOENT"
        assert same(record, lambda at: (at / "moved link").read_bytes()) == b"#!/bin/sh\necho ran\n"
        assert same(record, lambda at: write_at(at / "moved link", 0, b"#", os.O_WRONLY | os.O_NOFOLLOW)) == "ELOOP"
        record.check()

    def test_long_and_odd_names(self, record: Record) -> None:
        names = [b"n" * 255, b"\xff\xfe not utf-8", "großes μ".encode(), b"new\nline", b" lead", b"trail "]
        names += [b"a\\b", b"%41"]

        def act(at: Path) -> object:
            for name in names:
                os.mkdir(os.path.join(os.fsencode(at), b"dir " + name[:200]))
                with open(os.path.join(os.fsencode(at), name), "xb") as file:
                    file.write(name * 1000)
            return sorted(set(names) & set(os.listdir(os.fsencode(at))))

        assert same(record, act) == sorted(names)
        assert same(record, lambda at: (at / ("n" * 256)).touch()) == "ENAMETOOLONG"
        record.check()

    def test_directories(self, record: Record) -> None:
        assert same(record, lambda at: (at / "sub").rmdir()) == "ENOTEMPTY"
        assert same(record, lambda at: (at / "sub").mkdir()) == "EEXIST"
        assert same(record, lambda at: (at / "big.bin").rmdir()) == "ENOTDIR"
        assert same(record, lambda at: os.unlink(at / "sub")) in ("EISDIR", "EPERM")
        assert same(record, lambda at: (at / "big.bin" / "x").touch()) == "ENOTDIR"
        same(record, lambda at: (at / "d" / "e" / "f").mkdir(parents=True))
        same(record, lambda at: (at / "d" / "e" / "f").rmdir())
        same(record, lambda at: os.chmod(at / "d", 0o2750))
        same(record, lambda at: (at / "d" / "e" / "f").mkdir())
        record.check()

    def test_fifo_and_mknod(self, record: Record) -> None:
        same(record, lambda at: os.mkfifo(at / "pipe", 0o600))
        assert stat.S_ISFIFO(os.lstat(record.path / "pipe").st_mode)
        same(record, lambda at: os.unlink(at / "pipe"))
        record.check()

    def test_a_removed_working_directory(self, record: Record) -> None:
        run("mkdir gone; cd gone; rmdir ../gone; ! touch x 2> /dev/null", record.path)
        record.same()


class TestAttributes:
    def test_modes(self, record: Record) -> None:
        for mode in (0o400, 0o000, 0o4755, 0o666):
            for place in (record.plain, record.path):
                os.chmod(place / "big.bin", mode)
            assert stat.S_IMODE(os.stat(record.path / "big.bin").st_mode) == mode
        same(record, lambda at: os.chmod(at / "log.txt", 0o444))
        same(record, lambda at: os.chmod(at / "sub", 0o700))

        def umask(at: Path) -> object:
            before = os.umask(0o027)
            try:
                (at / "masked").touch()
                (at / "masked dir").mkdir()
            finally:
                os.umask(before)
            return stat.S_IMODE(os.stat(at / "masked").st_mode), stat.S_IMODE(os.stat(at / "masked dir").st_mode)

        assert same(record, umask) == (0o640, 0o750)
        record.check()

    def test_times_to_the_nanosecond(self, record: Record) -> None:
        times = (1_111_111_111_123_456_789, 1_222_222_222_987_654_321)
        for name in ("big.bin", "sub", "small.txt", "private"):
            os.utime(record.path / name, ns=times)
        os.utime(record.path / "link", ns=times, follow_symlinks=False)
        record.evict()
        for name in ("big.bin", "sub", "small.txt", "private", "link"):
            assert os.lstat(record.path / name).st_mtime_ns == times[1], name
        digest(record.path / "big.bin")
        assert os.stat(record.path / "big.bin").st_mtime_ns == times[1]

    def test_reading_changes_no_times(self, evicted: Record) -> None:
        """Bytes that come back are no change: tar and rsync, editors and make look at these."""
        before = os.stat(evicted.path / "big.bin")
        with opened(evicted.path / "big.bin", os.O_RDONLY) as fd:
            os.pread(fd, 10, 0)
            during = os.fstat(fd)
            while os.read(fd, MIB):
                pass
            until(lambda: evicted.local_bytes("big.bin") == BIG, "all of it is here")
            after = os.fstat(fd)
        for each in (during, after, os.stat(evicted.path / "big.bin")):
            assert (each.st_mtime_ns, each.st_ctime_ns, each.st_ino, each.st_size) == (
                before.st_mtime_ns,
                before.st_ctime_ns,
                before.st_ino,
                before.st_size,
            )

    def test_evicting_and_restoring_change_no_times_and_numbers(self, resident: Record) -> None:
        before = tree(resident.path, times=True)
        numbers = {name: os.lstat(resident.path / name).st_ino for name in ("big.bin", "small.txt", "sub", "link")}
        resident.evict()
        assert tree(resident.path, times=True) == before
        assert {name: os.lstat(resident.path / name).st_ino for name in numbers} == numbers
        assert ask(resident.mounted, "hydrate", uuids=[resident.uuid], restore=True)["exit"] == 0
        assert tree(resident.path, times=True) == before
        assert {name: os.lstat(resident.path / name).st_ino for name in numbers} == numbers
        assert tree(resident.working, times=True) == before

    def test_owner(self, record: Record) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(record.path / "big.bin", 12, 34)
        os.chown(record.path / "link", 56, 78, follow_symlinks=False)
        record.evict()
        assert (os.stat(record.path / "big.bin").st_uid, os.stat(record.path / "big.bin").st_gid) == (12, 34)
        assert (os.lstat(record.path / "link").st_uid, os.lstat(record.path / "link").st_gid) == (56, 78)

    def test_statfs(self, shared: Shared, record: Record) -> None:
        seen, real = os.statvfs(record.path), os.statvfs(shared.place)
        assert (seen.f_frsize, seen.f_blocks, seen.f_namemax) == (real.f_frsize, real.f_blocks, 255)
        assert abs(seen.f_bavail - real.f_bavail) * real.f_frsize < 2**30


class TestWriting:
    @pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 2 * MIB + 1, BIG - 1, BIG, BIG + 1, 9 * MIB + 3])
    def test_truncate(self, shared: Shared, size: int) -> None:
        for state in ("resident", "evicted"):
            record = shared.take(state, lambda at: (at / "big.bin").write_bytes(big_bytes()))
            same(record, lambda at: os.truncate(at / "big.bin", size))
            if state == "evicted":
                assert record.local_bytes("big.bin") <= MIB + max(size - BIG, 0)
            record.check()

    def test_truncate_down_and_up_gives_zeros(self, record: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDWR) as fd:
                os.ftruncate(fd, 2 * MIB + 100)
                os.ftruncate(fd, BIG)
                return hashlib.sha256(os.pread(fd, BIG, 0)).hexdigest()

        same(record, act)
        record.check()

    def test_opening_with_truncation_brings_nothing(self, record: Record) -> None:
        for flags in (os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC | os.O_CREAT):
            for place in (record.plain, record.path):
                write_at(place / "big.bin", 10, b"all that is left", flags)
        assert record.local_bytes("big.bin") == 26
        same(record, lambda at: (at / "private").write_bytes(b"new"))
        record.check()

    def test_append_brings_the_last_chunk_at_most(self, evicted: Record) -> None:
        for place in (evicted.path, evicted.plain):
            with open(place / "big.bin", "ab") as file:
                file.write(b"appended" * 1000)
        assert evicted.local_bytes("big.bin") <= 17 + 8000 + MIB
        evicted.check()

    def test_a_write_brings_its_edges_at_most(self, evicted: Record) -> None:
        for place in (evicted.path, evicted.plain):
            assert write_at(place / "big.bin", MIB + 100, b"w" * (3 * MIB)) == 3 * MIB
        assert evicted.local_bytes("big.bin") <= 4 * MIB
        evicted.check()

    def test_whole_chunks_are_written_without_a_store(self, evicted: Record, shared: Shared) -> None:
        hidden = shared.store.with_name("hidden")
        shared.store.rename(hidden)
        try:
            for place in (evicted.path, evicted.plain):
                assert write_at(place / "big.bin", 2 * MIB, b"w" * (2 * MIB)) == 2 * MIB
        finally:
            hidden.rename(shared.store)
        assert evicted.local_bytes("big.bin") == 2 * MIB
        evicted.check()

    def test_writes_here_and_there(self, record: Record) -> None:
        def act(at: Path) -> object:
            for number in range(40):
                write_at(at / "big.bin", number * 170_003 % BIG, bytes([number]) * (number * 311 + 1))
            with opened(at / "big.bin", os.O_RDWR | os.O_APPEND) as fd:
                os.write(fd, b"end")
                return os.pread(fd, 10, BIG - 5), os.lseek(fd, 0, os.SEEK_END)

        same(record, act)
        record.check()

    def test_a_write_far_beyond_the_end(self, record: Record) -> None:
        same(record, lambda at: write_at(at / "big.bin", 20 * MIB + 3, b"far"))
        same(record, lambda at: write_at(at / "empty", 3 * MIB, b"far"))
        record.check()

    def test_two_handles_see_each_other(self, record: Record) -> None:
        def act(at: Path) -> object:
            with opened(at / "big.bin", os.O_RDONLY) as reader, opened(at / "big.bin", os.O_WRONLY) as writer:
                before = os.pread(reader, 4, 3 * MIB)
                os.pwrite(writer, b"seen", 3 * MIB)
                return before, os.pread(reader, 4, 3 * MIB), os.pread(reader, 4, 3 * MIB - 2)

        same(record, act)
        record.check()

    def test_sync_and_direct_flags(self, record: Record) -> None:
        for flags in (os.O_SYNC, os.O_DSYNC):
            for place in (record.plain, record.path):
                assert write_at(place / "log.txt", 5, b"synced", os.O_WRONLY | flags) == 6

        def act(at: Path) -> None:
            with opened(at / "log.txt", os.O_RDWR) as fd:
                os.write(fd, b"data")
                os.fsync(fd)
                os.fdatasync(fd)
            with opened(at / "sub", os.O_RDONLY | os.O_DIRECTORY) as fd:
                os.fsync(fd)

        same(record, act)
        record.check()

    def test_fallocate(self, record: Record) -> None:
        """Reserving space, as databases and torch do, works or says that it cannot; either way bytes stay right."""
        with opened(record.path / "big.bin", os.O_RDWR) as fd, contextlib.suppress(OSError):
            os.posix_fallocate(fd, 0, BIG)
        record.check()

    def test_locks(self, record: Record) -> None:
        with opened(record.path / "small.txt", os.O_RDWR) as one, opened(record.path / "small.txt", os.O_RDWR) as two:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(BlockingIOError):
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TestListing:
    def test_while_entries_change(self, record: Record) -> None:
        """Entries that stay are listed once each, whatever comes and goes meanwhile."""
        many = record.path / "many"
        many.mkdir()
        for number in range(150):  # more than one answer of the kernel's question holds
            (many / f"stays {number} {'x' * 200}").touch()
            (many / f"goes {number} {'x' * 200}").touch()
        listed: list[str] = []
        with os.scandir(many) as entries:
            for count, entry in enumerate(entries):
                listed.append(entry.name)
                if count == 20:
                    for number in range(150):
                        os.unlink(many / f"goes {number} {'x' * 200}")
                        (many / f"comes {number}").touch()
        stays = [name for name in listed if name.startswith("stays")]
        assert sorted(stays) == sorted(f"stays {number} {'x' * 200}" for number in range(150))
        assert len(listed) == len(set(listed))
        shutil.rmtree(many)
        record.same()

    def test_twenty_thousand_entries(self, shared: Shared) -> None:
        def make(directory: Path) -> None:
            (directory / "many").mkdir()
            for number in range(20_000):
                os.close(os.open(directory / "many" / f"{number}", os.O_CREAT | os.O_WRONLY))

        record = shared.take("resident", make)
        expected = {str(number) for number in range(20_000)}
        began = time.monotonic()
        assert {entry.name for entry in os.scandir(record.path / "many") if entry.stat().st_size == 0} == expected
        assert time.monotonic() - began < 30
        os.rename(record.path / "many" / "19999", record.path / "many" / "new")
        assert set(os.listdir(record.path / "many")) == expected - {"19999"} | {"new"}


class TestRoot:
    def test_what_is_refused(self, shared: Shared, record: Record) -> None:
        root = shared.mounted.path
        assert outcome(lambda at: (at / record.uuid).rmdir(), root) == "EPERM"
        assert outcome(lambda at: (at / record.uuid).rename(at / "other"), root) in ("EPERM", "EXDEV")
        assert outcome(lambda at: (at / "file").touch(), root) == "EPERM"
        assert outcome(lambda at: (at / "x" / "y").touch(), root) == "ENOENT"
        assert outcome(lambda at: (at / record.uuid).mkdir(), root) == "EEXIST"
        assert outcome(lambda at: (at / ".by" / "new").mkdir(), root) == "EPERM"
        assert outcome(lambda at: os.truncate(at / record.uuid, 0), root) == "EISDIR"
        assert record.uuid in os.listdir(root)
        record.same()

    def test_the_header_is_read_only(self, record: Record) -> None:
        header = (record.path / "id.json").read_bytes()
        acts: list[Act] = [
            lambda at: write_at(at / "id.json", 0, b"x"),
            lambda at: os.truncate(at / "id.json", 0),
            lambda at: os.unlink(at / "id.json"),
            lambda at: os.rename(at / "id.json", at / "elsewhere"),
            lambda at: os.rename(at / "small.txt", at / "id.json"),
        ]
        assert [outcome(act, record.path) for act in acts] == ["EPERM"] * len(acts)
        assert (record.path / "id.json").read_bytes() == header
        assert json.loads(header)["uuid"] == record.uuid
        record.same()

    def test_inode_numbers_stay_while_open(self, resident: Record) -> None:
        """A reader that holds a directory and knows a number finds the same file after an eviction."""
        with opened(resident.path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            number = os.stat("big.bin", dir_fd=fd).st_ino
            resident.evict()
            assert os.stat("big.bin", dir_fd=fd).st_ino == number
            with open(os.open("big.bin", os.O_RDONLY, dir_fd=fd), "rb") as file:
                assert file.read() == big_bytes()


class TestIncoming:
    """A record that is copied in at the root becomes one of the index."""

    def test_a_copied_record_is_indexed(self, shared: Shared, record: Record, tmp_path: Path) -> None:
        source = tmp_path / "source"
        shutil.copytree(record.plain, source, symlinks=True)
        uuid = renamed(source, record.uuid, "9")
        root = shared.mounted.path
        name = f"arriving {record.state}"
        run(f"cp -a {source} '{root}/{name}'", tmp_path)
        until(lambda: uuid in shared.project.rows(), "it is in the index")
        until(lambda: uuid in os.listdir(root), "it is listed")
        until(lambda: name not in os.listdir(root), "its first name is gone")
        assert tree(root / uuid) == tree(source)
        working = shared.project.directory(uuid)
        assert tree(working) == tree(source)
        evict(shared.mounted, uuid)
        assert working.is_symlink()
        assert tree(root / uuid) == tree(source)
        assert os.readlink(root / name) == uuid  # who still copies by the first name goes on

    def test_nested_records_come_with_it(self, shared: Shared, resident: Record, tmp_path: Path) -> None:
        source = tmp_path / "source"
        shutil.copytree(resident.plain, source, symlinks=True)
        uuid = renamed(source, resident.uuid, "8")
        run(f"cp -r {source} {shared.mounted.path}/{uuid}", tmp_path)
        until(lambda: len(shared.project.executions(uuid)) == 1, "its execution is in the index")
        execution = shared.project.executions(uuid)[0]
        assert os.readlink(shared.mounted.path / execution).startswith(f"{uuid}/")

    def test_a_known_uuid_is_a_clash_and_stays(self, shared: Shared, resident: Record, tmp_path: Path) -> None:
        root = shared.mounted.path
        before = shared.project.rows()[resident.uuid]
        run(f"cp -r {resident.plain} {root}/twin", tmp_path)
        until(lambda: any("twin" in each for each in warnings(shared.mounted)), "the clash is told")
        assert any(resident.uuid in each for each in warnings(shared.mounted))
        assert shared.project.rows()[resident.uuid] == before
        assert "twin" in os.listdir(root)
        assert (root / "twin" / "small.txt").read_bytes() == (resident.plain / "small.txt").read_bytes()

    def test_one_that_is_being_written_waits(self, shared: Shared, resident: Record, tmp_path: Path) -> None:
        source = tmp_path / "source"
        shutil.copytree(resident.plain, source, symlinks=True)
        uuid = renamed(source, resident.uuid, "7")
        root = shared.mounted.path
        run(f"cp -r {source} {root}/slow", tmp_path)
        with open(root / "slow" / "late", "wb", buffering=0) as file:
            for _ in range(8):
                file.write(b"still writing")
                time.sleep(0.5)
            assert uuid not in shared.project.rows()
        until(lambda: uuid in shared.project.rows(), "it is indexed when it is quiet")
        assert (root / uuid / "late").read_bytes() == b"still writing" * 8

    def test_a_name_that_never_becomes_a_record(self, shared: Shared) -> None:
        root = shared.mounted.path
        (root / "notes").mkdir()
        assert "notes" in os.listdir(root)
        assert outcome(lambda at: (at / "notes").mkdir(), root) == "EEXIST"
        (root / "notes" / "file").write_text("kept")
        assert (root / "notes" / "file").read_text() == "kept"
        assert outcome(lambda at: (at / "notes").rmdir(), root) == "ENOTEMPTY"
        (root / "notes" / "file").unlink()
        (root / "notes").rmdir()
        assert "notes" not in os.listdir(root)


def renamed(source: Path, uuid: str, first: str) -> str:
    """Make a copied record another one, with another execution; its uuid."""
    for path in source.rglob("*.json"):
        header = path.parent / "id.json"
        known = [json.loads(header.read_text())["uuid"]] if path.name == "id.json" else []
        for one in known:
            for each in source.rglob("*.json"):
                each.write_text(each.read_text().replace(one, first + one[1:]))
    return first + uuid[1:]


def warnings(mounted: Mounted) -> list[str]:
    found: list[str] = ask(mounted, "status")["warnings"]
    return found


class TestRemount:
    """These mount for themselves: they need another kind of mount, or a second one."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Shared:
        return Shared(tmp_path, 3)

    def test_read_only(self, own: Shared) -> None:
        with own.mounted:
            record = own.take("evicted")
            second = own.take("resident")
            own.mounted.umount()
        own.mounted.command.append("--read-only")
        with own.mounted:
            for each in (record, second):
                acts: list[Act] = [
                    lambda at: write_at(at / "big.bin", 0, b"x"),
                    lambda at: (at / "new").touch(),
                    lambda at: os.truncate(at / "big.bin", 3),
                    lambda at: os.unlink(at / "big.bin"),
                    lambda at: os.chmod(at / "big.bin", 0o600),
                    lambda at: os.rename(at / "big.bin", at / "x"),
                    lambda at: (at / "dir").mkdir(),
                    lambda at: (at.parent / "arriving").mkdir(),
                ]
                assert [outcome(act, each.path) for act in acts] == ["EROFS"] * len(acts)
                each.same()

    def test_numbers_and_content_after_a_remount(self, own: Shared) -> None:
        with own.mounted:
            records = [own.take("evicted"), own.take("resident")]
            numbers = {path: os.lstat(path).st_ino for record in records for path in sorted(record.path.rglob("*"))}
            (records[0].path / "half").write_bytes(b"kept")
            (records[0].plain / "half").write_bytes(b"kept")
            with opened(records[0].path / "big.bin", os.O_RDONLY) as fd:
                os.pread(fd, 10, 5 * MIB)
            assert own.mounted.umount().returncode == 0
        with own.mounted:
            hard_linked = {path for path in numbers if path.name in ("chunk.bin", "second name.bin")}
            for path, number in numbers.items():
                if path not in hard_linked:
                    assert os.lstat(path).st_ino == number, path
            for record in records:
                record.check()


def test_sync_tools_are_here() -> None:
    """In CI nothing of this may be skipped for want of a program."""
    missing = [name for name in ("rsync", "git", "tar") if shutil.which(name) is None]
    assert not (in_ci() and missing)
