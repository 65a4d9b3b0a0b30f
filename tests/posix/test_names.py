"""Names are as on the native file system: renames, links, special files, long names, inode numbers, link counts."""

import ctypes
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened, outcome
from tests.posix.places import DATA, Arena, Place, data_bytes, fill
from vfs.linux import EXCHANGE, NOREPLACE

pytestmark = pytest.mark.mounted
_libc = ctypes.CDLL(None, use_errno=True)
AT_SYMLINK_FOLLOW = 0x400


def rename_with(flags: int, source: Path, target: Path) -> None:
    if _libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def number(path: Path) -> int:
    return os.lstat(path).st_ino


class TestRename:
    def test_over_a_file(self, place: Place) -> None:
        with opened(place.path / "small", os.O_RDONLY) as covered:
            os.rename(place.path / "data", place.path / "small")
            assert os.read(covered, 100) == b"one\ntwo\n"
            assert os.fstat(covered).st_nlink == 0
        assert (place.path / "small").read_bytes() == data_bytes()
        assert "data" not in os.listdir(place.path)

    def test_over_an_empty_directory_elsewhere(self, place: Place) -> None:
        (place.other / "empty").mkdir()
        os.rename(place.path / "sub", place.other / "empty")
        assert os.listdir(place.other / "empty") == ["leaf"]
        assert not (place.path / "sub").exists()
        assert (place.path.stat().st_nlink, place.other.stat().st_nlink) == (2, 4)

    def test_what_cannot_be(self, place: Place) -> None:
        (place.path / "empty").mkdir()
        for source, target, expected in (
            ("empty", "sub", "ENOTEMPTY"),
            ("sub", "data", "ENOTDIR"),
            ("data", "sub", "EISDIR"),
            ("sub", "sub/in", "EINVAL"),
            ("nothing", "else", "ENOENT"),
            ("data", "nothing/x", "ENOENT"),
            ("data", "small/x", "ENOTDIR"),
            ("sub/.", "x", "EBUSY"),
        ):
            found = outcome(lambda at, s=source, t=target: os.rename(f"{at}/{s}", f"{at}/{t}"), place.path)
            assert found == expected, (source, target)
        assert sorted(os.listdir(place.path)) == ["data", "empty", "link", "small", "sub", "twin a", "twin b"]

    def test_of_an_open_file(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDWR) as fd:
            os.rename(place.path / "data", place.other / "moved")
            os.pwrite(fd, b"after", 70_000)
            os.rename(place.other / "moved", place.path / "link")
            os.pwrite(fd, b"later", 80_000)
            assert os.pread(fd, DATA, 80_005) == data_bytes()[80_005:]
        content = (place.path / "link").read_bytes()
        assert (content[70_000:70_005], content[80_000:80_005], len(content)) == (b"after", b"later", DATA)

    def test_two_names_of_one_file(self, place: Place) -> None:
        """rename(2) does nothing then."""
        os.rename(place.path / "twin a", place.path / "twin b")
        assert {"twin a", "twin b"} <= set(os.listdir(place.path))
        assert (place.path / "twin a").stat().st_nlink == 2
        os.rename(place.path / "data", place.path / "data")
        assert (place.path / "data").read_bytes() == data_bytes()

    def test_without_replacing(self, place: Place) -> None:
        path = place.path
        assert outcome(lambda at: rename_with(NOREPLACE, at / "data", at / "small"), path) == "EEXIST"
        assert (path / "small").read_bytes() == b"one\ntwo\n"
        rename_with(NOREPLACE, path / "data", path / "new")
        assert (path / "new").read_bytes() == data_bytes()

    def test_exchange(self, place: Place) -> None:
        path, numbers = place.path, {name: number(place.path / name) for name in ("data", "sub", "small")}
        rename_with(EXCHANGE, path / "data", path / "small")
        assert (path / "small").read_bytes() == data_bytes()
        assert (path / "data").read_bytes() == b"one\ntwo\n"
        rename_with(EXCHANGE, path / "sub", path / "small")
        assert (path / "sub").read_bytes() == data_bytes()
        assert os.listdir(path / "small") == ["leaf"]
        assert (number(path / "sub"), number(path / "small")) == (numbers["data"], numbers["sub"])
        assert outcome(lambda at: rename_with(EXCHANGE, at / "data", at / "nothing"), path) == "ENOENT"

    def test_between_records(self, arena: Arena) -> None:
        """Possible while both are resident; otherwise tools copy."""
        one, two, away = (arena.take("resident").path, arena.record("resident", _one).path, arena.take("evicted").path)
        before = number(one / "sub" / "leaf")
        os.rename(one / "sub", two / "one" / "sub 2")
        assert (two / "one" / "sub 2" / "leaf").read_bytes()[-4:] == b"leaf"
        assert number(two / "one" / "sub 2" / "leaf") == before
        os.rename(one / "data", two / "one" / "small")
        assert (two / "one" / "small").read_bytes() == data_bytes()
        for source, target in ((one / "small", away / "x"), (away / "data", one / "x"), (away / "sub", one / "x")):
            assert outcome(lambda _at, s=source, t=target: os.rename(s, t), one) == "EXDEV"


def _one(record: Path) -> None:
    fill(record / "one")


class TestInodeNumbers:
    """`mv`, `ln` and what follows them keep the number; programs that watch a file by its number depend on it."""

    def test_renamed(self, place: Place) -> None:
        before = {name: number(place.path / name) for name in ("data", "sub", "sub/leaf", "link")}
        os.rename(place.path / "data", place.path / "moved")
        os.rename(place.path / "sub", place.other / "sub moved")
        os.rename(place.path / "link", place.path / "sym")
        (place.path / "data").touch()  # has the name, not the number
        after = (
            place.path / "moved",
            place.other / "sub moved",
            place.other / "sub moved" / "leaf",
            place.path / "sym",
        )
        assert [number(path) for path in after] == list(before.values())
        assert number(place.path / "data") not in before.values()
        numbers = [number(place.path / name) for name in os.listdir(place.path)]
        assert len(set(numbers)) == len(numbers) - 1  # of the twins

    def test_linked_and_unlinked(self, place: Place) -> None:
        before = number(place.path / "data")
        os.link(place.path / "data", place.path / "second")
        assert (number(place.path / "data"), number(place.path / "second")) == (before, before)
        os.unlink(place.path / "data")
        assert number(place.path / "second") == before
        twin = number(place.path / "twin a")
        assert number(place.path / "twin b") == twin
        os.unlink(place.path / "twin a")
        assert number(place.path / "twin b") == twin

    def test_an_editor_saves(self, place: Place) -> None:
        """A new file takes the place of the old one again and again: never two files with one number."""
        for turn in range(6):
            (place.path / "tmp").write_bytes(b"%d" % turn)
            new, old = number(place.path / "tmp"), number(place.path / "data")
            assert new != old
            os.rename(place.path / "tmp", place.path / "data")
            assert number(place.path / "data") == new


class TestLinks:
    def test_hard(self, place: Place) -> None:
        path = place.path
        os.link(path / "data", place.other / "again")
        assert (path / "data").stat().st_nlink == (place.other / "again").stat().st_nlink == 2
        (place.other / "again").write_bytes(b"by the other name")
        assert (path / "data").read_bytes() == b"by the other name"
        assert outcome(lambda at: os.link(at / "data", at / "small"), path) == "EEXIST"
        assert outcome(lambda at: os.link(at / "sub", at / "x"), path) == "EPERM"
        assert outcome(lambda at: os.link(at / "nothing", at / "x"), path) == "ENOENT"
        os.link(path / "link", path / "link 2", follow_symlinks=False)
        assert (os.readlink(path / "link 2"), os.lstat(path / "link").st_nlink) == ("small", 2)

    def test_by_descriptor(self, place: Place) -> None:
        with opened(place.path / "data", os.O_RDONLY) as fd:
            source, target = os.fsencode(f"/proc/self/fd/{fd}"), os.fsencode(place.path / "again")
            assert _libc.linkat(-100, source, -100, target, AT_SYMLINK_FOLLOW) == 0
            assert os.fstat(fd).st_nlink == 2

    def test_symbolic(self, place: Place) -> None:
        path = place.path
        for target in ("../nowhere", "x" * 4095, "großes\nμ", "/proc/self"):
            (path / "new").symlink_to(target)
            status = os.lstat(path / "new")
            assert (os.readlink(path / "new"), status.st_size) == (target, len(target.encode()))
            assert stat.S_IMODE(status.st_mode) == 0o777
            (path / "new").unlink()
        assert outcome(lambda at: os.symlink("", at / "x"), path) == "ENOENT"
        assert outcome(lambda at: os.symlink("x" * 4096, at / "x"), path) == "ENAMETOOLONG"
        assert outcome(lambda at: os.readlink(at / "data"), path) == "EINVAL"
        (path / "to sub").symlink_to("sub")
        assert (path / "to sub" / "leaf").stat().st_ino == (path / "sub" / "leaf").stat().st_ino
        assert outcome(lambda at: os.unlink(f"{at}/to sub/"), path) == "ENOTDIR"


class TestSpecialFiles:
    def test_fifo(self, place: Place) -> None:
        os.mkfifo(place.path / "pipe", 0o640)
        assert stat.S_IMODE(os.lstat(place.path / "pipe").st_mode) == 0o640
        assert outcome(lambda at: os.open(at / "pipe", os.O_WRONLY | os.O_NONBLOCK), place.path) == "ENXIO"
        writer = threading.Thread(target=(place.path / "pipe").write_bytes, args=(b"through the pipe",))
        writer.start()
        assert (place.path / "pipe").read_bytes() == b"through the pipe"
        writer.join()

    def test_socket(self, place: Place) -> None:
        with opened(place.path, os.O_PATH) as fd, socket.socket(socket.AF_UNIX) as server:
            name = f"/proc/self/fd/{fd}/socket"  # shorter than a socket's name may be
            server.bind(name)
            server.listen()
            assert stat.S_ISSOCK(os.lstat(name).st_mode)
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(name)
                other, _address = server.accept()
                with other:
                    one.sendall(b"hello")
                    assert other.recv(10) == b"hello"
            assert outcome(lambda _at: os.open(name, os.O_RDONLY), place.path) == "ENXIO"
            with socket.socket(socket.AF_UNIX) as again:
                assert outcome(lambda _at: again.bind(name), place.path) == "EADDRINUSE"
            os.unlink(name)

    def test_devices(self, place: Place, users: None) -> None:
        os.mknod(place.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        status = os.lstat(place.path / "null")
        assert (stat.S_ISCHR(status.st_mode), status.st_rdev) == (True, os.makedev(1, 3))
        if not place.native:  # as on every FUSE mount, unless mounted with -o dev
            assert outcome(lambda at: os.open(at / "null", os.O_WRONLY), place.path) == "EACCES"


class TestDirectories:
    def test_link_counts(self, place: Place) -> None:
        assert place.path.stat().st_nlink == 3
        (place.path / "new").mkdir()
        (place.path / "new" / "in").mkdir()
        assert [(place.path / name).stat().st_nlink for name in ("", "new", "new/in")] == [4, 3, 2]
        os.rename(place.path / "new" / "in", place.path / "sub" / "in")
        assert [(place.path / name).stat().st_nlink for name in ("", "new", "sub")] == [4, 2, 3]
        (place.path / "new").rmdir()
        assert place.path.stat().st_nlink == 3

    def test_removing(self, place: Place) -> None:
        for name, expected in (("sub", "ENOTEMPTY"), ("data", "ENOTDIR"), ("nothing", "ENOENT"), ("sub/.", "EINVAL")):
            assert outcome(lambda at, n=name: os.rmdir(f"{at}/{n}"), place.path) == expected, name
        assert outcome(lambda at: os.rmdir(f"{at}/sub/.."), place.path) == "ENOTEMPTY"
        assert outcome(lambda at: os.unlink(at / "sub"), place.path) == "EISDIR"
        (place.path / "sub" / "leaf").unlink()
        (place.path / "sub").rmdir()
        assert not (place.path / "sub").exists()

    def test_modes(self, place: Place) -> None:
        os.umask(0o027)
        os.mkdir(place.path / "new", 0o1777)
        assert stat.S_IMODE((place.path / "new").stat().st_mode) == 0o1750
        assert outcome(lambda at: os.mkdir(at / "new"), place.path) == "EEXIST"
        assert outcome(lambda at: os.mkdir(at / "data"), place.path) == "EEXIST"
        assert outcome(lambda at: os.mkdir(at / "nothing" / "new"), place.path) == "ENOENT"


@contextmanager
def deep(start: Path, names: list[str]) -> Iterator[int]:
    """A descriptor of a directory below `start`, made name by name."""
    fd = os.open(start, os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    try:
        yield fd
    finally:
        os.close(fd)


class TestLongNames:
    def test_of_255_bytes(self, place: Place) -> None:
        longest = "ä" * 127 + "x"
        (place.path / longest).write_bytes(b"kept")
        os.rename(place.path / longest, place.path / ("y" * 255))
        (place.path / ("l" * 255)).symlink_to("y" * 255)
        assert (place.path / ("l" * 255)).read_bytes() == b"kept"
        for act in (
            lambda at: os.mkdir(at / ("z" * 256)),
            lambda at: os.stat(at / ("z" * 256)),
            lambda at: os.rename(at / "data", at / ("z" * 256)),
            lambda at: os.symlink("x", at / ("z" * 256)),
            lambda at: os.link(at / "data", at / ("z" * 256)),
            lambda at: os.open(at / ("z" * 256) / "x", os.O_CREAT),
        ):
            assert outcome(act, place.path) == "ENAMETOOLONG"

    def test_odd_ones(self, place: Place) -> None:
        odd = [b"\xff\xfe", b"new\nline", b" ", b"a\\b", b"%41", b"...", b"-rf", b"\x01"]
        odd += ["e\u0301".encode(), "\u00e9".encode()]  # look alike
        for name in odd:
            with open(os.path.join(os.fsencode(place.path), name), "xb") as file:
                file.write(name)
        for name in odd:
            with open(os.path.join(os.fsencode(place.path), name), "rb") as file:
                assert file.read() == name
        assert set(odd) <= set(os.listdir(os.fsencode(place.path)))

    def test_paths_longer_than_a_call_takes(self, place: Place) -> None:
        names = [letter * 250 for letter in "abcdefghijklmnopqrst"]
        with deep(place.path, names) as fd:
            with open(os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=fd), "wb") as file:
                file.write(b"deep below")
            os.link("file", "second", src_dir_fd=fd, dst_dir_fd=fd)
            os.rename("second", "third", src_dir_fd=fd, dst_dir_fd=fd)
            os.symlink("file", "sym", dir_fd=fd)
            assert sorted(os.listdir(fd)) == ["file", "sym", "third"]
            with open(os.open("third", os.O_RDONLY, dir_fd=fd), "rb") as file:
                assert file.read() == b"deep below"
            assert os.stat("file", dir_fd=fd).st_nlink == 2
            os.fsync(fd)
        long = "/".join(names)
        assert outcome(lambda at: os.stat(f"{at}/{long}"), place.path) == "ENAMETOOLONG"
        _remove_deep(place.path / names[0])


def _remove_deep(directory: Path) -> None:
    """shutil.rmtree keeps a descriptor for each level; so does this."""
    fds = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY)]
    names: list[str] = []
    while subdirectories := [name for name in os.listdir(fds[-1]) if len(name) == 250]:
        names.append(subdirectories[0])
        fds.append(os.open(names[-1], os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
    for name in os.listdir(fds[-1]):
        os.unlink(name, dir_fd=fds[-1])
    os.close(fds.pop())
    while names:
        os.rmdir(names.pop(), dir_fd=fds[-1])
        os.close(fds.pop())
    directory.rmdir()
