"""Modes, owners and what they allow, for users who are not the daemon's, are as on the native file system."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened, outcome, write_at
from tests.posix.places import DATA, SOMEBODY, SOMEBODY_ELSE, Place, as_user, data_bytes

pytestmark = pytest.mark.mounted
ME, OTHER = SOMEBODY, SOMEBODY_ELSE


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def owner(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def mine(act: Callable[[Path], object], place: Place, *groups: int) -> object:
    """What an action gives when `ME` does it, or the name of its error."""
    return as_user(ME, ME, lambda: outcome(act, place.path), groups)


@pytest.fixture
def open_place(place: Place, users: None) -> Iterator[Place]:
    """Anybody can write in the directory."""
    place.path.chmod(0o777)
    yield place
    place.path.chmod(0o755)


def test_all_mode_bits(place: Place) -> None:
    for bits in (0o0, 0o7777, 0o4711, 0o2755, 0o1644, 0o600):
        for name in ("data", "sub", "small"):
            (place.path / name).chmod(bits)
            assert mode(place.path / name) == bits, name
    (place.path / "link").chmod(0o640)  # what it leads to
    assert (mode(place.path / "small"), mode(place.path / "link")) == (0o640, 0o777)


class TestMaking:
    def test_the_owner_is_who_makes_it(self, open_place: Place) -> None:
        def make(at: Path) -> None:
            (at / "file").write_bytes(b"mine")
            (at / "directory").mkdir()
            (at / "sym").symlink_to("file")
            os.mkfifo(at / "pipe")
            os.link(at / "file", at / "hard")

        mine(make, open_place)
        for name in ("file", "directory", "sym", "pipe", "hard"):
            assert owner(open_place.path / name) == (ME, ME), name

    def test_below_a_set_gid_directory(self, open_place: Place) -> None:
        os.chown(open_place.path, -1, OTHER)
        open_place.path.chmod(0o2777)
        mine(lambda at: [(at / "file").touch(), (at / "directory").mkdir(), os.mkfifo(at / "pipe")], open_place)
        assert {owner(open_place.path / name) for name in ("file", "directory", "pipe")} == {(ME, OTHER)}
        assert mode(open_place.path / "directory") == 0o2755

    def test_set_id_from_the_start(self, open_place: Place) -> None:
        made = os.O_CREAT | os.O_WRONLY
        mine(lambda at: os.close(os.open(at / "file", made, 0o4755)), open_place)
        mine(lambda at: os.close(os.open(at / "group", made, 0o2755)), open_place)
        mine(lambda at: os.mknod(at / "node", stat.S_IFREG | 0o6711), open_place)
        assert [mode(open_place.path / name) for name in ("file", "group", "node")] == [0o4755, 0o2755, 0o6711]
        assert owner(open_place.path / "node") == (ME, ME)


class TestChanging:
    def test_only_the_owner_may(self, open_place: Place) -> None:
        for act in (
            lambda at: (at / "data").chmod(0o777),
            lambda at: os.chown(at / "data", ME, ME),
            lambda at: os.chown(at / "data", -1, ME),
            lambda at: os.utime(at / "data", ns=(1, 1)),
        ):
            assert mine(act, open_place) == "EPERM"
        os.chown(open_place.path / "data", ME, ME)
        assert mine(lambda at: (at / "data").chmod(0o600), open_place) is None
        assert mine(lambda at: os.utime(at / "data", ns=(1, 1)), open_place) is None
        assert mine(lambda at: os.chown(at / "data", OTHER, -1), open_place) == "EPERM"
        assert mine(lambda at: os.chown(at / "data", -1, OTHER), open_place) == "EPERM"
        assert mine(lambda at: os.chown(at / "data", -1, OTHER), open_place, OTHER) is None
        assert (owner(open_place.path / "data"), mode(open_place.path / "data")) == ((ME, OTHER), 0o600)

    def test_of_links(self, open_place: Place) -> None:
        os.chown(open_place.path / "link", ME, OTHER, follow_symlinks=False)
        assert (owner(open_place.path / "link"), owner(open_place.path / "small")) == ((ME, OTHER), (0, 0))

    def test_set_gid_of_a_group_one_is_not_in(self, open_place: Place) -> None:
        os.chown(open_place.path / "data", ME, OTHER)
        mine(lambda at: (at / "data").chmod(0o2755), open_place)
        assert mode(open_place.path / "data") == 0o755
        mine(lambda at: (at / "data").chmod(0o2755), open_place, OTHER)
        assert mode(open_place.path / "data") == 0o2755

    def test_times_now_by_who_may_write(self, open_place: Place) -> None:
        (open_place.path / "data").chmod(0o666)
        os.utime(open_place.path / "data", ns=(5, 5))
        assert mine(lambda at: os.utime(at / "data"), open_place) is None
        assert os.stat(open_place.path / "data").st_mtime > 1e9
        (open_place.path / "data").chmod(0o644)
        assert mine(lambda at: os.utime(at / "data"), open_place) == "EACCES"


class TestSetId:
    """A change by anybody but root takes set-user-id away, and set-group-id of what the group can run."""

    @pytest.fixture
    def data(self, open_place: Place) -> Path:
        os.chown(open_place.path / "data", ME, ME)
        return open_place.path / "data"

    def test_writing(self, open_place: Place, data: Path) -> None:
        for bits, left in ((0o6777, 0o777), (0o4755, 0o755), (0o6766, 0o2766), (0o2777, 0o777)):
            data.chmod(bits)
            assert mine(lambda at: write_at(at / "data", 70_000, b"x"), open_place) == 1
            assert mode(data) == left, oct(bits)

    def test_truncating(self, open_place: Place, data: Path) -> None:
        for act in (
            lambda at: os.truncate(at / "data", 80_000),
            lambda at: os.close(os.open(at / "data", os.O_WRONLY | os.O_TRUNC)),
        ):
            data.chmod(0o6777)
            mine(act, open_place)
            assert mode(data) == 0o777

    def test_giving_away(self, open_place: Place, data: Path) -> None:
        data.chmod(0o6755)
        mine(lambda at: os.chown(at / "data", -1, OTHER), open_place, OTHER)
        assert mode(data) == 0o755
        data.chmod(0o6755)
        os.chown(data, OTHER, -1)  # by root too
        assert mode(data) == 0o755
        (open_place.path / "sub").chmod(0o6755)
        os.chown(open_place.path / "sub", OTHER, OTHER)
        assert mode(open_place.path / "sub") == 0o6755

    def test_root_keeps_them(self, open_place: Place, data: Path) -> None:
        data.chmod(0o6777)
        write_at(data, 70_000, b"x")
        os.truncate(data, 80_000)
        assert mode(data) == 0o6777


class TestAllowed:
    def test_reading_and_writing(self, open_place: Place) -> None:
        data = open_place.path / "data"
        os.chown(data, OTHER, OTHER)
        for bits, groups, reads, writes in (
            (0o604, (), True, False),
            (0o602, (), False, True),
            (0o640, (), False, False),
            (0o640, (OTHER,), True, False),
            (0o606, (OTHER,), False, False),  # the group's bits count, not everybody's
        ):
            data.chmod(bits)
            reading = mine(lambda at: (at / "data").read_bytes()[:4], open_place, *groups)
            assert reading == (data_bytes()[:4] if reads else "EACCES"), oct(bits)
            writing = mine(lambda at: write_at(at / "data", DATA, b"x"), open_place, *groups)
            assert writing == (1 if writes else "EACCES"), oct(bits)
            asked = mine(
                lambda at: (os.access(at / "data", os.R_OK), os.access(at / "data", os.W_OK)), open_place, *groups
            )
            assert asked == (reads, writes), oct(bits)
            os.truncate(data, DATA)

    def test_running(self, open_place: Place) -> None:
        data = open_place.path / "data"
        assert not os.access(data, os.X_OK)  # not even by root
        data.chmod(0o744)
        assert mine(lambda at: os.access(at / "data", os.X_OK), open_place) is False
        assert os.access(data, os.X_OK)

    def test_directories(self, open_place: Place) -> None:
        sub = open_place.path / "sub"
        sub.chmod(0o711)
        assert mine(lambda at: os.listdir(at / "sub"), open_place) == "EACCES"
        assert mine(lambda at: (at / "sub" / "leaf").read_bytes()[-4:], open_place) == b"leaf"
        sub.chmod(0o744)
        assert mine(lambda at: os.listdir(at / "sub"), open_place) == ["leaf"]
        assert mine(lambda at: (at / "sub" / "leaf").read_bytes(), open_place) == "EACCES"
        for act in (
            lambda at: (at / "sub" / "new").touch(),
            lambda at: os.unlink(at / "sub" / "leaf"),
            lambda at: os.rename(at / "sub" / "leaf", at / "x"),
            lambda at: os.mkdir(at / "sub" / "new"),
        ):
            assert mine(act, open_place) == "EACCES"
        open_place.path.chmod(0o755)
        assert mine(lambda at: (at / "new").touch(), open_place) == "EACCES"

    def test_sticky(self, open_place: Place) -> None:
        open_place.path.chmod(0o1777)
        os.chown(open_place.path / "small", ME, ME)
        for act in (
            lambda at: os.unlink(at / "data"),
            lambda at: os.rename(at / "data", at / "x"),
            lambda at: os.rename(at / "small", at / "data"),
            lambda at: os.rmdir(at / "sub"),
        ):
            assert mine(act, open_place) == "EPERM"
        assert mine(lambda at: os.rename(at / "small", at / "x"), open_place) is None
        assert mine(lambda at: os.unlink(at / "x"), open_place) is None

    def test_an_open_file_stays_open(self, open_place: Place) -> None:
        data = open_place.path / "data"
        data.chmod(0o666)

        def act(at: Path) -> object:
            with opened(at / "data", os.O_RDWR) as fd:
                return fd, os.dup(fd)

        _closed, fd = as_user(ME, ME, lambda: act(open_place.path))  # type: ignore[misc]
        try:
            data.chmod(0o600)
            assert as_user(ME, ME, lambda: os.pwrite(fd, b"still", 70_000)) == 5
            assert os.pread(fd, 5, 70_000) == b"still"
        finally:
            os.close(fd)
