"""Files of evicted records in runfs's own cache: placeholders, and which of their chunks are here.

Used by the file system (reads and writes), hydrate, evict and push. Calls touch the local disk only.

A placeholder is a sparse file with the exact size, mode and times of what it stands for and one extended attribute,
`user.runfs.content`. The attribute names the content it was made from and says which chunks of it are local. A file
without the attribute is an ordinary file: all of its bytes are here. So the state follows the inode through renames
and links, no crash can leave the two in disagreement, and the cache explains itself without the journal.

Attribute (little endian): 4 bytes b"RFC1", 32 bytes blake3 of the content, u64 its size, u8 1 if the file was
changed since (its bytes are then not that content), then pairs of u32 [first, end) of local chunks.

Order of writing, so that no crash shows wrong bytes: data first, fdatasync, then the attribute that calls it local.
Dropping: the attribute first, fsync, then the hole.
"""

import errno
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vfs import faults, linux, manifest
from vfs.errors import RunfsError
from vfs.manifest import CHUNK, belongs_to_record, chunk_count

log = logging.getLogger(__name__)

FLIGHT = 8  # chunks that travel together: 8 MiB ranges were as fast as larger ones
ATTRIBUTE = "user.runfs.content"
ATTRIBUTES_MOST = 2048  # bytes of names and values a record's file may have: half of ext4's block; ours need the rest
_NO_ROOM = (errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EOPNOTSUPP)
_HEAD = struct.Struct("<4s32sQB")
_RUN = struct.Struct("<II")
# ext4 keeps attributes of an inode in one block; beyond that the shortest runs are forgotten (and brought again).
_MAX_RUNS = 400
_ASKED_AGAIN_S = 1.0  # the kernel asks at once; a program or a person that tries again later gets a new try


class CacheError(RunfsError):
    """The cache directory cannot hold placeholders."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a placeholder says of itself. `runs` are half-open ranges of local chunks, ordered and disjoint."""

    digest: bytes
    size: int
    changed: bool = False
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def local_bytes(self) -> int:
        return sum(min(end * CHUNK, self.size) - first * CHUNK for first, end in self.runs)


def read_header(target: int | bytes) -> Header | None:
    """The header of an open file or a path (links are not followed), None for a file whose bytes are all here."""
    try:
        if isinstance(target, int):
            raw = os.getxattr(target, ATTRIBUTE)
        else:
            raw = os.getxattr(target, ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise
    if len(raw) < _HEAD.size or raw[:4] != b"RFC1":
        raise CacheError("a placeholder's attribute is damaged; `runfs verify --repair` makes it again")
    _magic, digest, size, changed = _HEAD.unpack_from(raw)
    tail = raw[_HEAD.size :]
    return Header(digest, size, bool(changed), tuple(_RUN.iter_unpack(tail[: len(tail) // 8 * 8])))


def has_mark(fd: int) -> bool:
    """Whether an open file says of itself, truly or not, that it is a placeholder."""
    try:
        os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise
    return True


def user_attribute_sizes(target: int | str) -> list[tuple[str, int]]:
    """The names of a file's extended attributes that belong to its record, `user.*` without ours, and the sizes of
    their values in bytes."""
    try:
        names = os.listxattr(target)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    return [(name, len(os.getxattr(target, name))) for name in sorted(names) if belongs_to_record(name)]


def user_attributes(fd: int) -> tuple[tuple[str, bytes], ...]:
    """The extended attributes of an open file or directory that belong to its record, by name; those that go beyond
    what a manifest carries of one file are left out."""
    found, left = [], manifest.ATTRIBUTES_MOST
    for name, size in user_attribute_sizes(fd):
        left -= len(os.fsencode(name)) + size
        if left >= 0:
            found.append((name, os.getxattr(fd, name)))
    return tuple(found)


def give_attributes(fd: int, attributes: Iterable[tuple[str, bytes]]) -> None:
    """Set a record's extended attributes on an open file, as many as its file system takes."""
    for name, value in attributes:
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            log.warning("extended attribute %s was left out: %s", name, os.strerror(error.errno))


def write_header(fd: int, header: Header) -> None:
    """Set the attribute. The caller has synced the data that it newly calls local."""
    head, runs, most = _HEAD.pack(b"RFC1", header.digest, header.size, header.changed), header.runs, _MAX_RUNS
    while True:
        if len(runs) > most:
            if header.changed:
                raise CacheError("too many separate changes to an evicted file; bring it back first: runfs hydrate")
            runs = tuple(sorted(sorted(runs, key=lambda run: run[0] - run[1])[:most]))
        try:
            os.setxattr(fd, ATTRIBUTE, head + b"".join(_RUN.pack(*run) for run in runs))
            return
        except OSError as error:
            if error.errno != errno.ENOSPC or not runs:
                raise
            most = len(runs) // 2  # the record's own attributes take the room


def clear_header(fd: int) -> None:
    """Call the whole file local. The caller has synced its data."""
    os.removexattr(fd, ATTRIBUTE)


def supports_attributes(directory: bytes) -> bool:
    """Whether the file system of `directory` keeps user attributes; without them nothing can be evicted into it."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.setxattr(fd, ATTRIBUTE, b"probe")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def make_placeholder(directory: int, name: bytes, digest: bytes, size: int, mode: int) -> int:
    """Create a placeholder and return its open descriptor (read-write). It is not synced."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        if size:  # an empty file has nothing to bring
            write_header(fd, Header(digest, size))
            os.ftruncate(fd, size)
        os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_writable(fd: int) -> int:
    """Open a file of the cache again for reading and writing, also one whose mode forbids its owner to write."""
    name = f"/proc/self/fd/{fd}"
    try:
        return os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        os.fchmod(fd, mode | stat.S_IWUSR)
        try:
            return os.open(name, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.fchmod(fd, mode)


def drop(fd: int, digest: bytes, size: int) -> int:
    """Turn a whole or partial cache file that holds exactly content `digest` into a placeholder again.

    Times are kept. Returns the bytes freed. The caller has proof, and has made sure that nobody has it open.
    """
    before = os.fstat(fd)
    write_header(fd, Header(digest, size))
    os.fsync(fd)
    faults.point("cache.drop.marked")
    linux.punch(fd, 0, (size // CHUNK + 1) * CHUNK)  # beyond the end, or the block that holds it would stay
    faults.point("cache.drop.punched")
    os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
    return (before.st_blocks - os.fstat(fd).st_blocks) * 512


class Partial:
    """An evicted file while it is in use: which chunks are here, which are on their way, who waits.

    One object for each inode, shared by all of its handles and by hydration. Thread-safe. `fd` is its own, read-write.
    """

    def __init__(self, fd: int, header: Header) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.key = (status.st_dev, status.st_ino)
        self.digest = header.digest
        self.size = header.size
        self.changed = header.changed
        self.users = 0
        self.flying: dict[int, object] = {}
        self.failed: dict[int, tuple[float, RunfsError]] = {}  # when and why a chunk could not be brought
        self.mtime_ns = status.st_mtime_ns  # of the record's file; arriving bytes move that of the inode for a moment
        self.lock = threading.RLock()
        self._quiet = threading.Condition(self.lock)
        self._filling: set[int] = set()
        self._saving = threading.Lock()  # taken before `lock`
        self._saved_sequence = 0
        self._waiting: dict[int, list[Callable[[RunfsError | None], None]]] = {}
        self._here = bytearray(chunk_count(header.size))
        self._left = len(self._here)
        self._saved = header.runs
        for first, end in header.runs:
            for number in range(first, min(end, len(self._here))):
                self._set(number)
        if header.changed:  # it was cut, and ended before it could say so: what was cut off is nobody's to bring
            self._cut(status.st_size)
        self._sequence = int(self._left == 0)  # then the attribute has nothing more to say, and goes with the next save

    def _set(self, number: int) -> None:
        if not self._here[number]:
            self._here[number] = 1
            self._left -= 1

    @property
    def complete(self) -> bool:
        return self._left == 0

    @property
    def unsaved(self) -> bool:
        """Whether something came or was changed since the last `save`."""
        return self._sequence != self._saved_sequence

    @property
    def local_bytes(self) -> int:
        with self.lock:
            return sum(min(CHUNK, self.size - n * CHUNK) for n, here in enumerate(self._here) if here)

    def missing(self, offset: int, length: int) -> list[int]:
        """Numbers of the chunks that must be brought before [offset, offset + length) can be read."""
        if self._left == 0 or length <= 0:
            return []
        end = min((offset + length + CHUNK - 1) // CHUNK, len(self._here))
        with self.lock:
            return [number for number in range(offset // CHUNK, end) if not self._here[number]]

    def fill(self, first: int, data: bytes | memoryview) -> None:
        """Write checked chunks that follow each other, from number `first` on. Chunks that became local meanwhile
        (they were overwritten) are left alone. The lock is not held while bytes are copied: readers go on."""
        view = memoryview(data)
        with self.lock:
            times = os.fstat(self.fd)
            # Never beyond the end: a file that was cut before a crash, and could not say so, stays cut.
            view = view[: max(times.st_size - first * CHUNK, 0)]
            mine = [n for n in range(first, first + chunk_count(len(view))) if self._may_fill(n)]
            self._filling.update(mine)
        filled: list[int] = []
        try:
            for start, end in _runs_of(mine):
                _write_whole(self.fd, view[(start - first) * CHUNK : (end - first) * CHUNK], start * CHUNK)
            faults.point("cache.filled")
            filled = mine
        finally:
            self._filled(mine, filled, times)

    def _may_fill(self, number: int) -> bool:
        return number < len(self._here) and not self._here[number] and number not in self._filling

    def _filled(self, tried: list[int], numbers: list[int], times: os.stat_result) -> None:
        with self.lock:
            if tried and not self.changed:  # arriving bytes are no change: the times stay those of the record
                os.utime(self.fd, ns=(times.st_atime_ns, self.mtime_ns))
            for number in numbers:
                self._set(number)
                self._sequence += 1
            self._filling.difference_update(tried)
            self._quiet.notify_all()

    def _wait_for_fills(self, numbers: Iterable[int]) -> None:
        """Before a change: bytes that are just being copied in must not come after it."""
        wanted = frozenset(numbers)
        while not self._filling.isdisjoint(wanted):
            self._quiet.wait()

    def arrived(self, numbers: Iterable[int], error: RunfsError | None) -> None:
        """Wake who waits for these chunks, with an error if they could not be brought."""
        calls: list[Callable[[RunfsError | None], None]] = []
        with self.lock:
            self.note_failed(numbers, error)
            for number in numbers:
                self.flying.pop(number, None)
                calls += self._waiting.pop(number, ())
        for call in calls:
            call(error)

    def note_failed(self, numbers: Iterable[int], error: RunfsError | None) -> None:
        """Remember why chunks did not come; with None, that they came."""
        with self.lock:
            for number in numbers:
                if error is None:
                    self.failed.pop(number, None)
                else:
                    self.failed[number] = (time.monotonic(), error)

    def failed_just_now(self, numbers: Iterable[int]) -> RunfsError | None:
        """Why one of these chunks failed to come a moment ago. The kernel asks again for a page it was refused: that
        question must not wait for another deadline."""
        with self.lock:
            for number in numbers:
                at, error = self.failed.get(number, (0.0, None))
                if error is not None and time.monotonic() - at < _ASKED_AGAIN_S:
                    return error
        return None

    def when_here(self, number: int, call: Callable[[RunfsError | None], None]) -> bool:
        """Have `call(error)` called once when the chunk's flight ends; False when it is here already."""
        with self.lock:
            if number >= len(self._here) or self._here[number]:
                return False
            self._waiting.setdefault(number, []).append(call)
            return True

    def needed_for_write(self, offset: int, length: int) -> list[int]:
        """Chunks that must be brought before a write: those it covers only in part."""
        with self.lock:
            end = offset + length
            edges = []
            for number in self.missing(offset, length):
                first, last = number * CHUNK, min((number + 1) * CHUNK, self.size)
                if offset > first or end < last:
                    edges.append(number)
            return edges

    def needed_for_truncate(self, size: int) -> list[int]:
        return self.missing(size - 1, 1) if 0 < size < self.size and size % CHUNK else []

    def write(self, fd: int, data: bytes, offset: int) -> int:
        """Write to the file; the chunks covered in part are here already. Returns the bytes written.

        Chunks covered wholly become local without being brought. A short write (the disk filled up) ends at
        a chunk's border, so that no chunk is half old, half new.
        """
        with self.lock:
            self._wait_for_fills(range(offset // CHUNK, chunk_count(offset + len(data))))
            covered = self.missing(offset, len(data))
            self._begin_change()
            written = os.pwrite(fd, data, offset)
            if written < len(data) and covered:
                whole = [n for n in covered if min((n + 1) * CHUNK, self.size) <= offset + written]
                torn = [n for n in covered if n not in whole]
                if torn and torn[0] * CHUNK < offset + written:
                    written = torn[0] * CHUNK - offset
                covered = whole
            for number in covered:
                self._set(number)
            self._sequence += 1
            if written <= 0 < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written

    def truncate(self, size: int, fd: int) -> None:
        """Cut or extend the file to `size`; what lies beyond is nobody's to bring. Its edge is here already."""
        with self.lock:
            self._wait_for_fills(range(size // CHUNK, len(self._here)))
            edge = size // CHUNK
            if size % CHUNK and size < self.size and not any(first <= edge < end for first, end in self._saved):
                os.fdatasync(self.fd)
                self._mark(self._runs())  # else the chunk that is cut through could be brought again, whole
            self._begin_change()
            os.ftruncate(fd, size)
            faults.point("cache.cut")
            if self._cut(size):  # at once: were it lost, a later extension would show the old bytes again
                self._saved = _united(self._saved, (chunk_count(size), len(self._here)))
                write_header(self.fd, Header(self.digest, self.size, True, self._saved))
            self._sequence += 1

    def _cut(self, size: int) -> bool:
        """Take all chunks from `size` on as local; whether one of them was not."""
        left = self._left
        for number in range(chunk_count(size), len(self._here)):
            self._set(number)
        return self._left != left

    def _begin_change(self) -> None:
        if not self.changed:
            # Only the mark: chunks that came since the last save may not be on the disk yet. The mark is synced by the
            # caller's next fsync; until then nothing of the change was acknowledged.
            write_header(self.fd, Header(self.digest, self.size, True, self._saved))
            self.changed = True
            faults.point("cache.changed")

    def _runs(self) -> tuple[tuple[int, int], ...]:
        runs: list[tuple[int, int]] = []
        position = 0
        while (first := self._here.find(1, position)) >= 0:
            end = self._here.find(0, first)
            end = len(self._here) if end < 0 else end
            runs.append((first, end))
            position = end
        return tuple(runs)

    def save(self) -> None:
        """Make durable what is here: data first, then the attribute. A complete file becomes an ordinary one.

        The lock is not held while the disk works. What comes meanwhile is left for the next save. The attribute itself
        is not waited for: lost in a power cut, it only means that the bytes are brought again.
        """
        with self._saving:
            while self.unsaved:
                with self.lock:
                    sequence, runs, saved = self._sequence, self._runs(), self._saved
                os.fdatasync(self.fd)
                faults.point("cache.save.synced")
                with self.lock:
                    if self._saved is not saved:
                        continue  # it was cut meanwhile: the attribute says more than these runs
                    self._mark(runs)
                faults.point("cache.save.marked")
                self._saved_sequence = sequence
                return

    def _mark(self, runs: tuple[tuple[int, int], ...]) -> None:
        """Say in the attribute that these chunks are local."""
        if sum(end - first for first, end in runs) < len(self._here):
            write_header(self.fd, Header(self.digest, self.size, self.changed, runs))
        elif read_header(self.fd) is not None:
            clear_header(self.fd)
        self._saved = runs

    def close(self) -> None:
        """Save and give the descriptor back. Nobody uses the object any more."""
        try:
            self.save()
        finally:
            os.close(self.fd)


def _runs_of(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    first = end = -1
    for number in numbers:
        if number != end:
            if end > first:
                yield first, end
            first = number
        end = number + 1
    if end > first:
        yield first, end


def _write_whole(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _united(runs: tuple[tuple[int, int], ...], tail: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Runs with everything from `tail[0]` to the end added."""
    kept = [(first, min(end, tail[0])) for first, end in runs if first < tail[0]]
    if kept and kept[-1][1] == tail[0]:
        tail = (kept.pop()[0], tail[1])
    return (*kept, tail)
