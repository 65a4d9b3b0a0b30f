"""Read a unit's tree and tell what changed since it was last digested. Used by push, evict and verify.

Blocks as the local disk does; digesting reads whole files. Follows no symlink, so a record cannot lead us out of it.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from vfs import cache, linux
from vfs.errors import DamagedRecord
from vfs.journal import Known
from vfs.manifest import Content, File, digest_of

# Before Linux 6.13 two changes within a tick of the clock (10 ms at most) leave the same times.
_TICK_NS = 20_000_000
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
_ATTEMPTS = 3  # to read a file that is being written to, before it is left for later


class Changing(DamagedRecord):
    """A file went on changing while it was read; its bytes are taken at the next push."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One path as it is on the disk now."""

    path: bytes
    status: os.stat_result
    target: bytes = b""

    @property
    def kind(self) -> str:
        return kind_of(self.status.st_mode)

    def matches(self, known: Known, *, ctime: bool = True) -> bool:
        """Whether the file is the very one that was digested, untouched since."""
        status, file = self.status, known.file
        size = file.size if file.kind == "file" else status.st_size
        return (
            (status.st_ino, status.st_size, status.st_mtime_ns) == (known.inode, size, file.mtime_ns)
            and (not ctime or status.st_ctime_ns == known.ctime_ns)
            and self.kind == file.kind
        )


def kind_of(mode: int) -> str:
    """A manifest's word for a file type."""
    return _KINDS.get(stat.S_IFMT(mode), "other")


def walk(root: bytes) -> Iterator[Seen]:
    """Every path below `root`, parents before children, in byte order within a directory.

    What vanishes while we look is left out. Raises OSError when `root` itself cannot be read.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    yield from _walk(fd, b"")


def _walk(fd: int, prefix: bytes) -> Iterator[Seen]:
    try:
        with os.scandir(fd) as entries:
            names = sorted(os.fsencode(entry.name) for entry in entries)
        for name in names:
            try:
                seen = _see(fd, prefix + name, name)
            except FileNotFoundError:
                continue
            yield seen
            if stat.S_ISDIR(seen.status.st_mode):
                try:
                    child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                yield from _walk(child, prefix + name + b"/")
    finally:
        os.close(fd)


def _see(fd: int, path: bytes, name: bytes) -> Seen:
    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    target = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(status.st_mode) else b""
    return Seen(path, status, os.fsencode(target))


def differs(root: bytes, known: Mapping[bytes, Known], *, shadow: bool = False) -> list[Seen]:
    """What is not as it was digested, told by its stat alone; a vanished path counts through its directory.

    In a `shadow` the ctime does not count: bytes that come back change it, and every change by others goes through the
    mount, which marks the unit dirty first.
    """
    changed, left = [], set(known)
    for seen in walk(root):
        left.discard(seen.path)
        item = known.get(seen.path)
        if item is None or not (seen.matches(item, ctime=not shadow) or seen.kind == item.file.kind == "directory"):
            changed.append(seen)
    if left:
        changed.append(Seen(min(left), os.lstat(root)))
    return changed


@dataclass(frozen=True, slots=True)
class Scan:
    """A unit's files with their digests, `unsettled` paths that went on changing, and contents digested anew."""

    known: tuple[Known, ...]
    contents: Mapping[bytes, Content]
    unsettled: tuple[bytes, ...]
    changed: int

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(known.file for known in self.known)


def scan(
    root: bytes,
    before: Mapping[bytes, Known],
    *,
    content: Callable[[bytes], Content | None],
    hydrate: Callable[[bytes], None] | None = None,
) -> Scan:
    """Describe the tree at `root`, digesting only what is not what `before` says.

    `content(digest)` gives what is known of a digest; `hydrate(path)` is called for a placeholder that was written
    to in part and must be whole to be digested; without it the tree is no shadow, and a file that says of itself to be
    a placeholder is refused. Raises OSError, NoReplica (from `hydrate`), DamagedRecord.
    """
    known: list[Known] = []
    contents: dict[bytes, Content] = {}
    unsettled: list[bytes] = []
    first_link: dict[tuple[int, int], bytes] = {}
    changed = 0
    for seen in walk(root):
        old = before.get(seen.path)
        same = b""
        if seen.kind == "file" and seen.status.st_nlink > 1:
            identity = (seen.status.st_dev, seen.status.st_ino)
            same = first_link.setdefault(identity, seen.path)
            same = b"" if same == seen.path else same
        if old is not None and seen.matches(old) and (not old.file.digest or content(old.file.digest)):
            known.append(_as_it_is(seen, old, same))
            continue
        changed += 1
        if seen.kind != "file":
            described = replace(_describe(seen), attributes=_of_directory(root, seen))
            known.append(Known(described, seen.status.st_ino, seen.status.st_ctime_ns))
            continue
        try:
            taken, status, attributes, settled = _take(root, seen, content, hydrate)
        except FileNotFoundError:
            continue
        except Changing:
            unsettled.append(seen.path)
            if old is None or old.file.kind != "file":
                continue
            known.append(replace(old, ctime_ns=0))  # the last content that was whole; looked at again next time
            continue
        if not settled:
            unsettled.append(seen.path)
        contents[taken.digest] = taken
        described = _describe(replace(seen, status=status))
        file = replace(described, digest=taken.digest, size=taken.size, same=same, attributes=attributes)
        known.append(Known(file, status.st_ino, status.st_ctime_ns))
    return Scan(tuple(known), contents, tuple(unsettled), changed + max(0, len(before) - len(known)))


def _as_it_is(seen: Seen, old: Known, same: bytes) -> Known:
    """What is known of a file whose content is what it was, with what else of it may have changed."""
    status, file = seen.status, old.file
    now = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, seen.target, same)
    if now == (file.mode, file.uid, file.gid, file.target, file.same):
        return old
    return replace(old, file=replace(_describe(seen), digest=file.digest, same=same, attributes=file.attributes))


def reader(fd: int) -> Callable[[int, int], bytes]:
    """`read(offset, length)` on an open file."""

    def read(offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    return read


def _describe(seen: Seen) -> File:
    status = seen.status
    return File(
        seen.path,
        seen.kind,
        stat.S_IMODE(status.st_mode),
        status.st_mtime_ns,
        status.st_size if seen.kind == "file" else 0,
        target=seen.target,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _of_directory(root: bytes, seen: Seen) -> tuple[tuple[str, bytes], ...]:
    """The extended attributes of what is no file: only directories have any."""
    if seen.kind != "directory":
        return ()
    try:
        fd = open_file(root, seen.path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    try:
        return cache.user_attributes(fd)
    finally:
        os.close(fd)


def _take(
    root: bytes,
    seen: Seen,
    content: Callable[[bytes], Content | None],
    hydrate: Callable[[bytes], None] | None,
) -> tuple[Content, os.stat_result, tuple[tuple[str, bytes], ...], bool]:
    """Digest one file, or take a placeholder's word for it: its content, stat and attributes, and whether that was
    all of it (not of a log that grows). Raises Changing when it will not stand still."""
    for attempt in range(_ATTEMPTS):
        fd = open_file(root, seen.path, os.O_RDONLY)
        try:
            if hydrate is None:
                refuse_mark(fd, seen.path)
            elif (header := cache.read_header(fd)) is not None:
                if not header.changed and (known := content(header.digest)) is not None:
                    return known, os.fstat(fd), cache.user_attributes(fd), True
                hydrate(seen.path)
                continue
            before = _let_settle(fd)
            try:
                digested = digest_of(reader(fd), before.st_size)
            except EOFError:
                continue
            attributes, after = cache.user_attributes(fd), os.fstat(fd)
        finally:
            os.close(fd)
        if (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns):
            return digested, after, attributes, True
        if attempt == _ATTEMPTS - 1 and after.st_size > before.st_size:
            return digested, before, attributes, False  # what it held when we began, and dirty still
    raise Changing(f"{os.fsdecode(seen.path)} went on changing while it was read")


def refuse_mark(fd: int, path: bytes) -> None:
    """Raise DamagedRecord for a file outside the cache that has a placeholder's mark. It is a copy of one, in which
    holes stand for bytes, or somebody wants his file taken for another content: neither its bytes nor its word will
    do."""
    if cache.has_mark(fd):
        raise DamagedRecord(
            f"{os.fsdecode(path)} is not whole: it has the attribute {cache.ATTRIBUTE}, as files in runfs's cache do. "
            f"Copy it from the mount instead, or if its bytes are right: setfattr -x {cache.ATTRIBUTE} FILE"
        )


def _let_settle(fd: int) -> os.stat_result:
    """See to it that whatever changes the file's bytes from now on changes its times too; these."""
    before = os.fstat(fd)
    for _ in range(_ATTEMPTS):
        age = time.time_ns() - before.st_ctime_ns
        if not 0 <= age < _TICK_NS:
            break
        time.sleep((_TICK_NS - age) / 1e9)
        before = os.fstat(fd)
    # Times change before the bytes do: what changed these may still be at it.
    if linux.has_writers(fd):
        os.fdatasync(fd)  # a store into a mapped page changes times only if the page is clean, as now they all are
    linux.wait_for_write(fd)
    return before


def open_file(root: bytes, path: bytes, flags: int) -> int:
    """Open a path below `root` without following any link."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return linux.open_beneath(top, path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    finally:
        os.close(top)
