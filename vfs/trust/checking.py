"""Look at the bytes of one content in every place that should have them: this disk, and each home. Used by the scrub.

Blocks on the local disk and on stores, each call within its deadline, and as long as the pace wants. Changes nothing.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from blake3 import blake3

from vfs import cache, linux
from vfs.core import Core, Home
from vfs.errors import NotFound, RunfsError, StoreError, WrongBytes
from vfs.journal import Known, Replica
from vfs.manifest import CHUNK, Content
from vfs.scan import open_file
from vfs.units import Unit

PIECE = 8 << 20  # bytes read at a time


class Word(Enum):
    """What a place has of a content."""

    GOOD = "good"  # all of it, and right
    PART = "part"  # what is there is right: a placeholder, or nothing
    BAD = "bad"  # other bytes
    GONE = "gone"  # nothing where it should be
    UNKNOWN = "unknown"  # nobody could ask
    OTHER = "other"  # it is in use, or was changed since it was digested: the next push digests it


@dataclass(frozen=True, slots=True)
class Verdict:
    """One place and what it has. `reason` in words, for what is not right."""

    word: Word
    reason: str = ""


class Stopped(Exception):
    """Nobody listens any more."""


class Pace:
    """Lets at most `rate` bytes a second be read by all threads together (None: as fast as it goes), and none once
    `stopped()`. Counts what was read."""

    def __init__(self, rate: float | None, stopped: Callable[[], bool]) -> None:
        self._rate = rate
        self._stopped = stopped
        self._lock = threading.Lock()
        self._due = time.monotonic()
        self.bytes = 0

    def spend(self, count: int) -> None:
        """Wait until `count` bytes may be read. Raises Stopped."""
        with self._lock:
            self.bytes += count
            self._due = max(self._due, time.monotonic()) + (count / self._rate if self._rate else 0.0)
            due = self._due
        while True:
            if self._stopped():
                raise Stopped
            left = due - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.2))


def in_store(home: Home, replica: Replica, content: Content, pace: Pace) -> Verdict:
    """Read a replica back, all of it."""
    try:
        _read_back(home, replica.key, content, pace)
    except NotFound:
        return Verdict(Word.GONE, f"its copy {replica.key} is gone")
    except WrongBytes as error:
        return Verdict(Word.BAD, str(error))
    except RunfsError as error:
        return Verdict(Word.UNKNOWN, str(error))
    return Verdict(Word.GOOD)


def _read_back(home: Home, key: str, content: Content, pace: Pace) -> None:
    whole, store = blake3(), home.store()
    for offset in range(0, content.size, PIECE):
        length = min(PIECE, content.size - offset)
        pace.spend(length)
        with home.watched():
            data = store.read(key, offset, length)
        whole.update(data)
        if len(data) != length:
            raise WrongBytes(f"its copy {key} ends at {offset + len(data):,} of {content.size:,} bytes")
    with home.watched():
        size = store.stat(key).size
    if size != content.size:
        raise WrongBytes(f"its copy {key} has {size:,} bytes instead of {content.size:,}")
    if whole.digest() != content.digest:
        raise WrongBytes(f"its copy {key} has other bytes than were pushed")


def on_disk(core: Core, unit: Unit, item: Known, content: Content, pace: Pace) -> Verdict:
    """Read a file of a unit as it is here. One that has the inode and the mtime it was digested with must have its
    bytes, whatever its ctime says: what changes bytes and leaves the mtime is damage, or hides like it."""
    try:
        fd = open_file(unit.base, item.file.path, os.O_RDONLY)
    except OSError as error:
        return _refused(error, "opened")
    try:
        if core.in_use(fd) is not None or linux.has_writers(fd):
            return Verdict(Word.OTHER)
        # What the page cache has may be better than what the disk has.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before = os.fstat(fd)
        found = _look(unit, fd, item, content, pace)
        after = os.fstat(fd)
        same = (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
        return found if same else Verdict(Word.OTHER)
    except OSError as error:
        return _refused(error, "read")
    finally:
        os.close(fd)


def _refused(error: OSError, what: str) -> Verdict:
    """Only where the disk itself says that it is damaged it is; a file may also be gone, or just being evicted."""
    if error.errno in (errno.EIO, errno.EUCLEAN, errno.EBADMSG):
        return Verdict(Word.BAD, f"it cannot be {what}: {error.strerror}")
    return Verdict(Word.OTHER)


def _look(unit: Unit, fd: int, item: Known, content: Content, pace: Pace) -> Verdict:
    try:
        header = cache.read_header(fd) if unit.evicted else None
    except cache.CacheError:
        return Verdict(Word.BAD, "its placeholder is damaged")
    if header is not None:
        if header.changed or header.digest != content.digest:
            return Verdict(Word.OTHER)
        return _chunks(fd, header, content, pace)
    status = os.fstat(fd)
    if (status.st_ino, status.st_mtime_ns) != (item.inode, item.file.mtime_ns) or (unit.evicted and unit.dirty):
        return Verdict(Word.OTHER)
    if status.st_size != content.size:
        return Verdict(Word.BAD, f"it has {status.st_size:,} bytes instead of {content.size:,}")
    whole = blake3()
    for offset in range(0, content.size, PIECE):
        pace.spend(min(PIECE, content.size - offset))
        whole.update(os.pread(fd, PIECE, offset))
    return (
        Verdict(Word.GOOD) if whole.digest() == content.digest else Verdict(Word.BAD, "it has other bytes than it had")
    )


def _chunks(fd: int, header: cache.Header, content: Content, pace: Pace) -> Verdict:
    bad = bad_chunks(fd, header, content, pace)
    if bad:
        return Verdict(Word.BAD, f"its bytes in the cache are wrong from {bad[0] * CHUNK:,} on")
    return Verdict(Word.PART)


def bad_chunks(fd: int, header: cache.Header, content: Content, pace: Pace) -> list[int]:
    """Numbers of the chunks that a placeholder calls local and that are not right."""
    bad = []
    for first, end in header.runs:
        for number in range(first, min(end, content.count)):
            length = min(CHUNK, content.size - number * CHUNK)
            pace.spend(length)
            if blake3(os.pread(fd, length, number * CHUNK)).digest() != content.chunk(number):
                bad.append(number)
    return bad


# --- manifests -----------------------------------------------------------------------------------------------------


class Said(Enum):
    """How the manifest in a store stands to the one that was published from here."""

    SAME = "same"
    NEWER = "newer"  # another host's
    GONE = "gone"
    WRONG = "wrong"  # damaged, or one that this one had replaced
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Found:
    """What a store has for a manifest. `body` and `version` where it is wrong."""

    said: Said
    reason: str = ""
    body: bytes = b""
    version: str | None = None


def manifest_in(home: Home, uuid: str, published: bytes) -> Found:
    """Compare the manifest in a store with the one that was `published` there last, as far as this host knows."""
    from vfs.errors import ManifestError
    from vfs.manifest import parse
    from vfs.wire import manifest_key

    store, key = home.store, manifest_key(uuid)
    try:
        with home.watched():
            version = store().stat(key).version
            body = store().read(key)
    except NotFound:
        return Found(Said.GONE, "its manifest is gone")
    except StoreError as error:
        return Found(Said.UNKNOWN, str(error))
    if body == published:
        return Found(Said.SAME)
    try:
        theirs = parse(body, uuid)
    except ManifestError as error:
        return Found(Said.WRONG, str(error), body, version)
    ours = parse(published, uuid).generation
    if theirs.generation > ours:
        return Found(Said.NEWER, "another host published a newer version")
    return Found(Said.WRONG, f"it is version {theirs.generation} again, which version {ours} replaced", body, version)
