"""Opening, writing, truncating, mapping and removing files is as on the native file system."""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened, outcome, write_at
from tests.posix.places import DATA, Place, data_bytes

pytestmark = pytest.mark.mounted
_libc = ctypes.CDLL(None, use_errno=True)
APPEND = """
import os, sys
fd = os.open("data", os.O_WRONLY | os.O_APPEND)
for number in range(200):
    os.write(fd, f"{sys.argv[1]} {number:04}\\n".encode())
"""
GETFLAGS = 0x80086601  # FS_IOC_GETFLAGS


class TestOpen:
    def test_create(self, place: Place) -> None:
        with opened(place.path / "new", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o644  # the umask of who asks
            assert os.write(fd, b"x") == 1
        os.umask(0o077)
        os.close(os.open(place.path / "private", os.O_CREAT | os.O_WRONLY, 0o777))
        assert stat.S_IMODE((place.path / "private").stat().st_mode) == 0o700
        with opened(place.path / "unreadable", os.O_CREAT | os.O_RDWR, 0o000) as fd:
            assert os.pwrite(fd, b"written all the same", 0) == 20

    def test_exclusive(self, place: Place) -> None:
        exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        assert outcome(lambda at: write_at(at / "new", 0, b"first", exclusive), place.path) == 5
        (place.path / "dangling").symlink_to("nowhere")
        for name in ("new", "data", "link", "dangling", "sub"):
            assert outcome(lambda at, name=name: os.open(at / name, exclusive), place.path) == "EEXIST", name
        assert not (place.path / "nowhere").exists()

    def test_through_a_link(self, place: Place) -> None:
        (place.path / "dangling").symlink_to("made")
        write_at(place.path / "dangling", 0, b"by the link", os.O_CREAT | os.O_WRONLY)
        assert (place.path / "made").read_bytes() == b"by the link"
        assert outcome(lambda at: os.open(at / "link", os.O_RDONLY | os.O_NOFOLLOW), place.path) == "ELOOP"
        (place.path / "round").symlink_to("round")
        assert outcome(lambda at: os.open(at / "round", os.O_RDONLY), place.path) == "ELOOP"

    def test_the_wrong_kind(self, place: Place) -> None:
        assert outcome(lambda at: os.open(at / "data", os.O_RDONLY | os.O_DIRECTORY), place.path) == "ENOTDIR"
        assert outcome(lambda at: os.open(at / "sub", os.O_WRONLY), place.path) == "EISDIR"
        assert outcome(lambda at: os.open(at / "sub", os.O_RDWR | os.O_CREAT), place.path) == "EISDIR"
        assert outcome(lambda at: os.open(at / "data" / "x", os.O_RDONLY), place.path) == "ENOTDIR"
        assert outcome(lambda at: os.open(at / "nothing", os.O_WRONLY), place.path) == "ENOENT"
        with opened(place.path / "data", os.O_RDONLY) as fd:
            assert outcome(lambda _at: os.write(fd, b"x"), place.path) == "EBADF"
            assert outcome(lambda _at: os.ftruncate(fd, 1), place.path) == "EINVAL"

    def test_a_program_that_runs_is_not_written_to(self, place: Place) -> None:
        program = place.path / "program"
        program.write_bytes(Path("/bin/sleep").read_bytes())
        program.chmod(0o755)
        with subprocess.Popen([program, "30"]) as running:
            try:
                assert outcome(lambda _at: os.open(program, os.O_WRONLY), place.path) == "ETXTBSY"
            finally:
                running.kill()


class TestWriting:
    def test_appenders_do_not_overwrite_each_other(self, place: Place) -> None:
        writers = [subprocess.Popen([sys.executable, "-S", "-c", APPEND, name], cwd=place.path) for name in "abc"]
        assert [each.wait(60) for each in writers] == [0, 0, 0]
        content = (place.path / "data").read_bytes()
        assert content[:DATA] == data_bytes()
        lines = content[DATA:].decode().splitlines()
        assert sorted(lines) == [f"{name} {number:04}" for name in "abc" for number in range(200)]
        assert [line for line in lines if line.startswith("b")] == [f"b {number:04}" for number in range(200)]

    def test_appending_ignores_the_place(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR | os.O_APPEND) as fd:
            os.pwrite(fd, b"end", 5)  # Linux: pwrite(2) appends too
            assert os.lseek(fd, 0, os.SEEK_END) == DATA + 3
            assert os.pread(fd, 10, DATA - 2) == data_bytes()[-2:] + b"end"

    def test_opening_truncates(self, place: Place) -> None:
        (place.path / "data").chmod(0o640)
        with opened(place.path / "data", os.O_RDWR | os.O_TRUNC) as fd:
            status = os.fstat(fd)
            assert (status.st_size, stat.S_IMODE(status.st_mode)) == (0, 0o640)
        assert (place.path / "data").read_bytes() == b""
        assert outcome(lambda at: os.open(at / "sub", os.O_RDONLY | os.O_TRUNC), place.path) == "EISDIR"

    def test_truncate_down_and_up(self, place: Place) -> None:
        data = place.path / "data"
        with opened(data, os.O_RDWR) as fd:
            os.ftruncate(fd, 70_001)
            os.truncate(data, DATA + 5_000_000)
            assert os.pread(fd, DATA, 0) == data_bytes()[:70_001] + bytes(DATA - 70_001)
            assert os.fstat(fd).st_size == DATA + 5_000_000
            assert os.pread(fd, 10, DATA + 4_999_995) == bytes(5)
            assert os.pread(fd, 10, DATA + 5_000_000) == b""

    def test_truncate_to_what_cannot_be(self, place: Place) -> None:
        assert outcome(lambda at: os.truncate(at / "data", -1), place.path) == "EINVAL"
        assert outcome(lambda at: os.truncate(at / "data", 1 << 60), place.path) == "EFBIG"
        assert outcome(lambda at: os.truncate(at / "sub", 0), place.path) == "EISDIR"
        assert outcome(lambda at: os.truncate(at / "nothing", 0), place.path) == "ENOENT"
        assert (place.path / "data").read_bytes() == data_bytes()

    def test_holes(self, place: Place) -> None:
        with opened(place.path / "sparse", os.O_CREAT | os.O_RDWR) as fd:
            os.pwrite(fd, b"far", 40_000_000)
            os.ftruncate(fd, 80_000_000)
            assert os.pread(fd, 8, 39_999_997) == b"\0\0\0far\0\0"
            os.fsync(fd)
        status = (place.path / "sparse").stat()
        assert status.st_size == 80_000_000
        assert status.st_blocks * 512 < 1_000_000

    def test_holes_are_told_natively_only(self, place: Place) -> None:
        """On the mount all of a file counts as data, as lseek(2) allows."""
        with opened(place.path / "sparse", os.O_CREAT | os.O_RDWR) as fd:
            os.pwrite(fd, b"far", 4_000_000)
            assert os.lseek(fd, 0, os.SEEK_HOLE) == (0 if place.native else 4_000_003)
            assert (os.lseek(fd, 0, os.SEEK_DATA) > 3_000_000) == place.native

    def test_positions(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR) as fd:
            assert os.lseek(fd, -10, os.SEEK_END) == DATA - 10
            assert os.read(fd, 100) == data_bytes()[-10:]
            assert os.read(fd, 100) == b""
            assert outcome(lambda _at: os.lseek(fd, -1, os.SEEK_SET), place.path) == "EINVAL"
            assert os.preadv(fd, [bytearray(10), bytearray(10)], DATA - 15) == 15
            assert os.pwritev(fd, [b"one", b"two"], DATA) == 6
            assert os.pread(fd, 100, DATA) == b"onetwo"

    def test_copying_in_the_kernel(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDONLY) as source, opened(place.path / "copy", 0o102) as target:
            assert os.copy_file_range(source, target, DATA, 0, 0) == DATA
            assert os.sendfile(target, source, 0, 1000) == 1000
        assert (place.path / "copy").read_bytes() == data_bytes()[:1000] + data_bytes()[1000:]


class TestMaps:
    def test_shared(self, place: Place) -> None:
        data = place.path / "data"
        with opened(data, os.O_RDWR) as fd, opened(data, os.O_RDWR) as other:
            with mmap.mmap(fd, 0) as one, mmap.mmap(other, 0) as two:
                one[70_000:70_006] = b"shared"
                assert two[70_000:70_006] == b"shared"
                assert os.pread(other, 6, 70_000) == b"shared"
                os.pwrite(other, b"written", 80_000)
                assert one[80_000:80_007] == b"written"
                one.flush()
            assert os.fstat(fd).st_size == DATA
        expected = bytearray(data_bytes())
        expected[70_000:70_006], expected[80_000:80_007] = b"shared", b"written"
        assert data.read_bytes() == bytes(expected)

    def test_private(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDONLY) as fd:
            with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private:
                private[70_000:70_007] = b"private"
                assert private[69_990:70_007] == data_bytes()[69_990:70_000] + b"private"
                assert os.pread(fd, DATA, 0) == data_bytes()
            assert outcome(lambda _at: mmap.mmap(fd, 0), place.path) == "EACCES"
        assert (place.path / "data").read_bytes() == data_bytes()

    def test_the_rest_of_the_last_page(self, place: Place) -> None:
        with opened(place.path / "small", os.O_RDWR) as fd:
            os.ftruncate(fd, 4096)
            with mmap.mmap(fd, 4096) as mapped:
                mapped[100:104] = b"gone"
                os.ftruncate(fd, 8)
                assert mapped[:] == b"one\ntwo\n" + bytes(4088)
                mapped[200:204] = b"lost"
                mapped.flush()
            os.ftruncate(fd, 4096)
            assert os.pread(fd, 4096, 0) == b"one\ntwo\n" + bytes(4088)

    def test_a_map_outlives_the_name_and_the_descriptor(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR) as fd:
            mapped = mmap.mmap(fd, 0)
        os.unlink(place.path / "data")
        with mapped:
            mapped[0:4] = b"gone"
            assert mapped[:] == b"gone" + data_bytes()[4:]


class TestRemoved:
    def test_an_open_file(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR) as fd:
            before = os.fstat(fd)
            os.unlink(place.path / "data")
            after = os.fstat(fd)
            assert (before.st_nlink, after.st_nlink, after.st_ino) == (1, 0, before.st_ino)
            assert after.st_ctime_ns > before.st_ctime_ns
            os.pwrite(fd, b"still written", 70_000)
            os.ftruncate(fd, 90_000)
            os.fchmod(fd, 0o600)
            os.utime(fd, ns=(5, 7))
            assert (os.fstat(fd).st_mtime_ns, stat.S_IMODE(os.fstat(fd).st_mode)) == (7, 0o600)
            assert (
                os.pread(fd, DATA, 69_998)
                == data_bytes()[69_998:70_000] + b"still written" + data_bytes()[70_013:90_000]
            )
        (place.path / "data").write_bytes(b"another")
        assert (place.path / "data").read_bytes() == b"another"

    def test_a_file_that_is_only_pointed_at(self, place: Place) -> None:
        with opened(place.path / "data", os.O_PATH) as fd, opened(place.path / "twin a", os.O_PATH) as twin:
            os.unlink(place.path / "data")
            os.unlink(place.path / "twin a")
            assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, DATA)
            assert (os.fstat(twin).st_nlink, os.fstat(twin).st_ino) == (1, (place.path / "twin b").stat().st_ino)

    def test_a_file_that_another_took_the_place_of(self, place: Place) -> None:
        with opened(place.path / "data", os.O_PATH) as pointed, opened(place.path / "twin b", os.O_RDONLY) as fd:
            os.rename(place.path / "small", place.path / "data")
            os.rename(place.path / "link", place.path / "twin b")
            assert (os.fstat(pointed).st_nlink, os.fstat(fd).st_nlink) == (0, 1)
            assert os.pread(fd, DATA, 0) == data_bytes()[::-1]

    def test_a_working_directory(self, place: Place) -> None:
        (place.path / "gone").mkdir()
        with opened(place.path / "gone", os.O_RDONLY | os.O_DIRECTORY) as fd:
            number = os.fstat(fd).st_ino
            (place.path / "gone").rmdir()
            (place.path / "gone").mkdir()
            assert (os.fstat(fd).st_nlink, os.fstat(fd).st_ino) == (0, number)
            assert outcome(lambda _at: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd), place.path) == "ENOENT"
            assert outcome(lambda _at: os.mkdir("new", dir_fd=fd), place.path) == "ENOENT"
            assert outcome(lambda _at: os.listdir(fd), place.path) in ([], "ENOENT")
        assert os.listdir(place.path / "gone") == []


class TestSpace:
    def test_statfs(self, place: Place) -> None:
        found, behind = os.statvfs(place.path / "data"), os.statvfs(place.path.parent.parent.parent)
        assert (found.f_namemax, found.f_bsize > 0, found.f_files > 0) == (255, True, True)
        assert found.f_blocks * found.f_frsize == behind.f_blocks * behind.f_frsize

    def test_syncing(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR) as fd:
            os.pwrite(fd, b"synced", 70_000)
            os.fdatasync(fd)
            os.fchmod(fd, 0o600)
            os.fsync(fd)
        for name in ("sub", "."):
            with opened(place.path / name, os.O_RDONLY | os.O_DIRECTORY) as fd:
                os.fsync(fd)
                os.fdatasync(fd)
        with opened(place.path / "data", os.O_RDWR | os.O_SYNC) as fd:
            assert os.write(fd, b"at once") == 7

    def test_fallocate(self, place: Place) -> None:
        """Not on the mount, where posix_fallocate(3) writes zeros instead, where there are none."""
        with opened(place.path / "data", os.O_RDWR) as fd:
            _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            done = _libc.fallocate(fd, 0, 0, DATA + 1000)
            assert (done, ctypes.get_errno() if done else 0) == ((0, 0) if place.native else (-1, errno.EOPNOTSUPP))
            os.posix_fallocate(fd, 0, DATA + 1000)
            assert os.pread(fd, 2 * DATA, 0) == data_bytes() + bytes(1000)

    def test_what_only_the_native_file_system_has(self, place: Place) -> None:
        made = outcome(lambda at: os.close(os.open(at, os.O_TMPFILE | os.O_RDWR)), place.path)
        assert made == (None if place.native else "ENOTSUP")
        with opened(place.path / "data", os.O_RDONLY) as fd:
            asked = outcome(lambda _at: fcntl.ioctl(fd, GETFLAGS, bytes(8)) and None, place.path)
        assert asked in ((None, "ENOTTY") if place.native else ("ENOTTY",))
