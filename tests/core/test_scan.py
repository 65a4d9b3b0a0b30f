"""Reading a unit's tree: what is digested, what is taken as known, and what a file that will not stand still gives."""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.core.making import noise, until
from vfs import scan as scanning
from vfs.cache import Partial, make_placeholder, read_header
from vfs.errors import DamagedRecord
from vfs.journal import Known
from vfs.manifest import CHUNK, Content, digest_of
from vfs.scan import differs, open_file, scan, walk


@pytest.fixture
def tree(tmp_path: Path) -> bytes:
    root = tmp_path / "record"
    (root / "d" / "deep").mkdir(parents=True)
    (root / "a").write_bytes(b"one")
    (root / "d" / "b").write_bytes(noise(CHUNK + 5))
    (root / "empty").touch()
    os.link(root / "d" / "b", root / "d" / "linked")
    os.symlink("../outside", root / "link")
    os.mkfifo(root / "pipe")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).write_bytes(b"two")
    os.setxattr(root / "a", "user.note", b"\x00mine")
    return os.fsencode(root)


class Digested:
    """What is known, as the journal would give it."""

    def __init__(self) -> None:
        self.known: dict[bytes, Known] = {}
        self.contents: dict[bytes, Content] = {}

    def scan(self, root: bytes, **more: Any) -> scanning.Scan:
        found = scan(root, self.known, content=self.contents.get, **more)
        self.known = {known.file.path: known for known in found.known}
        self.contents.update(found.contents)
        return found


@pytest.fixture
def digested() -> Digested:
    return Digested()


def by_path(found: scanning.Scan) -> Mapping[bytes, Any]:
    return {file.path: file for file in found.files}


def test_walk_order(tree: bytes) -> None:
    paths = [seen.path for seen in walk(tree)]
    assert paths == [b"a", b"caf\xe9", b"d", b"d/b", b"d/deep", b"d/linked", b"empty", b"link", b"pipe"]


def test_walk_follows_no_link(tmp_path: Path, tree: bytes) -> None:
    os.symlink(tree, tmp_path / "door")
    with pytest.raises(OSError, match="door"):
        list(walk(os.fsencode(tmp_path / "door")))
    os.symlink(tree, os.path.join(tree, b"d/loop"))
    assert not any(seen.path.startswith(b"d/loop/") for seen in walk(tree))


def test_first_scan_describes_everything(tree: bytes, digested: Digested) -> None:
    found = digested.scan(tree)
    files = by_path(found)
    assert files[b"a"].digest == blake3(b"one").digest()
    assert files[b"a"].attributes == (("user.note", b"\x00mine"),)
    assert files[b"empty"].digest == blake3(b"").digest()
    assert (files[b"d/b"].size, files[b"d/b"].same, files[b"d/linked"].same) == (CHUNK + 5, b"", b"d/b")
    assert files[b"link"].target == b"../outside"
    assert (files[b"pipe"].kind, files[b"d"].kind) == ("other", "directory")
    assert found.contents[files[b"d/b"].digest].count == 2
    assert found.unsettled == ()
    assert found.changed == len(files)


def test_second_scan_reads_nothing(tree: bytes, digested: Digested, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digested.scan(tree)

    def no(*_args: object) -> Content:
        raise AssertionError("it was read again")

    monkeypatch.setattr(scanning, "digest_of", no)
    second = digested.scan(tree)
    assert second.changed == 0
    assert second.files == first.files
    assert differs(tree, digested.known) == []


def rewrite(name: bytes, content: bytes = b"new") -> Callable[[bytes], object]:
    return lambda root: Path(os.fsdecode(root + b"/" + name)).write_bytes(content)


CHANGES: dict[str, list[Callable[[bytes], object]]] = {
    "content": [rewrite(b"a")],
    "mode": [lambda root: os.chmod(root + b"/a", 0o600)],
    "gone": [lambda root: os.unlink(root + b"/a")],
    "new": [rewrite(b"z", b"")],
    "renamed": [lambda root: os.rename(root + b"/a", root + b"/z")],
    "replaced": [rewrite(b"z"), lambda root: os.rename(root + b"/z", root + b"/a")],
    "same size and times": [rewrite(b"a", b"ONE"), lambda root: os.utime(root + b"/a", ns=(1, 1))],
    "other target": [lambda root: os.unlink(root + b"/link"), lambda root: os.symlink("else", root + b"/link")],
    "file to directory": [lambda root: os.unlink(root + b"/a"), lambda root: os.mkdir(root + b"/a")],
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_seen(tree: bytes, digested: Digested, changes: list[Callable[[bytes], object]]) -> None:
    os.utime(tree + b"/a", ns=(1, 1))
    before = digested.scan(tree)
    for change in changes:
        change(tree)
    assert differs(tree, digested.known)
    after = digested.scan(tree)
    assert after.changed
    assert after.files != before.files
    assert by_path(after) == by_path(Digested().scan(tree))


def test_a_change_in_the_same_tick_is_seen(tree: bytes, digested: Digested) -> None:
    """Times have ticks of milliseconds: a digest is taken of what is old enough for its times to tell."""
    path = Path(os.fsdecode(tree + b"/a"))
    path.write_bytes(b"new")
    began = time.time_ns()
    digested.scan(tree)
    assert time.time_ns() - began >= 10_000_000


def test_a_store_into_a_mapped_page_is_seen(tree: bytes, digested: Digested) -> None:
    """A page that is dirty already changes no times when it is stored to again: it must be written out first."""
    fd = os.open(tree + b"/a", os.O_RDWR)
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as page:
        page[0] = 1
        digested.scan(tree)
        page[0] = 2
    os.close(fd)
    assert by_path(digested.scan(tree))[b"a"].digest == blake3(b"\x02ne" + bytes(4093)).digest()


def while_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Have something done each time a piece of a file is read."""
    real = scanning.reader

    def reader(fd: int) -> Callable[[int, int], bytes]:
        read = real(fd)

        def meanwhile(offset: int, length: int) -> bytes:
            data = read(offset, length)
            change()
            return data

        return meanwhile

    monkeypatch.setattr(scanning, "reader", reader)


class SlowBytes:
    """A page of memory that write(2) can take its bytes from only when they are `given`: userfaultfd(2)."""

    _SYS_USERFAULTFD, _API, _REGISTER, _COPY = 323, 0xC018AA3F, 0xC020AA00, 0xC028AA03

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.syscall(self._SYS_USERFAULTFD, os.O_CLOEXEC) if os.uname().machine == "x86_64" else -1
        if self._fd < 0:
            pytest.skip("userfaultfd is not to be had")
        fcntl.ioctl(self._fd, self._API, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        fcntl.ioctl(self._fd, self._REGISTER, bytearray(struct.pack("<QQQQ", self._at, mmap.PAGESIZE, 1, 0)))

    def write(self, fd: int, length: int) -> None:
        assert self._libc.pwrite(fd, ctypes.c_void_p(self._at), length, 0) == length

    def given(self, data: bytes) -> None:
        source = ctypes.create_string_buffer(data, mmap.PAGESIZE)
        fields = struct.pack("<QQQQq", self._at, ctypes.addressof(source), mmap.PAGESIZE, 0, 0)
        fcntl.ioctl(self._fd, self._COPY, bytearray(fields))
        os.close(self._fd)


def test_a_write_that_is_under_way_is_waited_for(tmp_path: Path, digested: Digested) -> None:
    """write(2) sets a file's times, then copies: bytes read in between must not pass for those of these times."""
    path = tmp_path / "weights"
    path.write_bytes(b"old bytes")
    os.utime(path, ns=(1, 1))
    slow, fd = SlowBytes(), os.open(path, os.O_WRONLY)
    writing = threading.Thread(target=slow.write, args=(fd, 3))
    scanning = threading.Thread(target=digested.scan, args=(os.fsencode(tmp_path),))
    writing.start()
    until(lambda: path.stat().st_mtime_ns != 1)
    times = path.stat()
    scanning.start()
    time.sleep(0.2)
    slow.given(b"new")
    writing.join()
    scanning.join()
    os.close(fd)
    assert path.read_bytes() == b"new bytes"
    assert path.stat().st_mtime_ns == times.st_mtime_ns, "the write came after its times, or this shows nothing"
    found = digested.scan(os.fsencode(tmp_path))
    assert by_path(found)[b"weights"].digest == blake3(b"new bytes").digest()


def test_a_growing_log_gives_what_it_held(tmp_path: Path, digested: Digested, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "record" / "log"
    log.parent.mkdir()
    log.write_bytes(noise(2 * CHUNK))

    def append() -> None:
        with open(log, "ab") as file:
            file.write(b"line\n")

    while_read(monkeypatch, append)
    found = digested.scan(os.fsencode(log.parent))
    (file,) = found.files
    assert file.size >= 2 * CHUNK
    assert file.digest == blake3(log.read_bytes()[: file.size]).digest()
    assert found.unsettled == (b"log",), "its end is still to come"
    assert differs(os.fsencode(log.parent), digested.known)


def test_a_file_rewritten_all_the_time_is_left_for_later(
    tmp_path: Path, digested: Digested, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "record" / "db"
    database.parent.mkdir()
    root = os.fsencode(database.parent)
    database.write_bytes(noise(2 * CHUNK))

    def rewrite() -> None:
        with open(database, "r+b") as file:
            file.write(os.urandom(8))

    with monkeypatch.context() as busy:
        while_read(busy, rewrite)
        found = digested.scan(root)
        assert (found.unsettled, found.files) == ((b"db",), ()), "it has no content that ever was"
    (before,) = digested.scan(root).files
    rewrite()
    while_read(monkeypatch, rewrite)
    found = digested.scan(root)
    assert (found.unsettled, found.files) == ((b"db",), (before,)), "the last content that was whole"
    assert differs(root, digested.known)


def test_what_vanishes_meanwhile_is_left_out(tree: bytes, digested: Digested, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(root: bytes, path: bytes, flags: int) -> int:
        if path == b"a":
            os.unlink(tree + b"/a")
        return open_file(root, path, flags)

    monkeypatch.setattr(scanning, "open_file", vanish)
    found = digested.scan(tree)
    assert b"a" not in by_path(found)
    assert found.unsettled == ()


def test_a_path_that_leads_out_is_not_opened(tmp_path: Path, tree: bytes) -> None:
    (tmp_path / "secret").write_text("s")
    os.symlink(tmp_path, tree + b"/d/out")
    for path in (b"d/out/secret", b"../secret", b"link"):
        with pytest.raises(OSError, match=r"secret|link"):
            open_file(tree, path, os.O_RDONLY)


# --- placeholders --------------------------------------------------------------------------------------------------


@pytest.fixture
def placed(tree: bytes, digested: Digested) -> Iterator[Partial]:
    """The file `p`, of which only the digest is known."""
    content = digest_of(lambda offset, length: noise(2 * CHUNK)[offset : offset + length], 2 * CHUNK)
    digested.contents[content.digest] = content
    top = os.open(tree, os.O_PATH)
    fd = make_placeholder(top, b"p", content.digest, content.size, 0o644)
    os.close(top)
    header = read_header(fd)
    assert header is not None
    yield Partial(fd, header)
    os.close(fd)


def test_a_placeholders_word_is_taken(tree: bytes, digested: Digested, placed: Partial) -> None:
    def hydrate(path: bytes) -> None:
        raise AssertionError(f"{path!r} need not be brought")

    assert by_path(digested.scan(tree, hydrate=hydrate))[b"p"].digest == placed.digest
    assert os.fstat(placed.fd).st_blocks * 512 < CHUNK, "nothing was brought for it"


def test_a_changed_placeholder_is_completed_first(tree: bytes, digested: Digested, placed: Partial) -> None:
    placed.write(placed.fd, b"n" * CHUNK, 0)
    placed.save()

    def hydrate(path: bytes) -> None:
        assert path == b"p"
        placed.fill(1, noise(2 * CHUNK)[CHUNK:])
        placed.save()

    found = by_path(digested.scan(tree, hydrate=hydrate))
    assert found[b"p"].digest == blake3(b"n" * CHUNK + noise(2 * CHUNK)[CHUNK:]).digest()


@pytest.mark.parametrize("changed", [False, True])
def test_a_placeholder_outside_a_shadow_is_refused(
    tree: bytes, digested: Digested, placed: Partial, changed: bool
) -> None:
    """Its word would let a file be taken for any content we know; its bytes are holes."""
    if changed:
        placed.write(placed.fd, b"n" * CHUNK, 0)
    with pytest.raises(DamagedRecord, match="p is not whole"):
        digested.scan(tree)


def test_a_pipe_without_a_writer_does_not_hold_the_scan(tree: bytes) -> None:
    code = "import sys, os; from vfs.scan import scan; scan(os.fsencode(sys.argv[1]), {}, content=lambda d: None)"
    subprocess.run([sys.executable, "-c", code, os.fsdecode(tree)], timeout=30, check=True)
