"""Make files that another host added or changed appear in a local record, and those that it removed go. Used by push
after a merge, by the settling of conflicts and by repairs.

Blocks on the local disk, and on stores where the record is resident: its directory never holds a placeholder, so a
file is made whole beside it first. What a crash leaves: a directory beside the record, which the next call removes.

A local file is replaced in one step, and only if it is what was digested and nobody has it open; else theirs gets a
second name. So what somebody writes meanwhile is not lost.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from vfs import faults, linux, shadow
from vfs.journal import Known
from vfs.manifest import File, foreign
from vfs.scan import Seen, open_file
from vfs.units import Unit, set_aside_name

_GONE = b"gone."  # before the size, the mtime and the name of a file that is being removed

Complete = Callable[[int, bytes], None]


def take(unit: Unit, files: Iterable[File], known: Mapping[bytes, Known], complete: Complete) -> None:
    """Put `files` into the unit's directory. `known` is what was digested there; `complete(fd, path)` brings a file.

    Raises NoReplica (nothing was replaced by what could not be brought), Full, OSError.
    """
    base = unit.base
    with _beside(unit) as beside:
        for file in sorted(map(foreign, files), key=lambda item: item.path):
            if file.kind == "directory":
                shadow.add_file(base, file)
                continue
            fd = shadow.add_file(beside, replace(file, path=b"file", same=b""))
            if fd is not None:
                try:
                    if not unit.evicted:
                        complete(fd, file.path)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            faults.point("take.made")
            _put(base, beside, file, known.get(file.path))


def replaced_by(unit: Unit, file: File, known: Known, complete: Complete, kept: bytes) -> bool:
    """Bring `file` and put it in the place of what is there, if that is `known` and nobody has it open; what it
    replaces gets the name `kept` (b"": it goes). False, and nothing changed, otherwise. Raises NoReplica, Full,
    OSError."""
    with _beside(unit) as beside:
        fd = shadow.add_file(beside, replace(foreign(file), path=b"file", same=b""))
        assert fd is not None
        try:
            complete(fd, file.path)
            os.fsync(fd)
        finally:
            os.close(fd)
        faults.point("take.made")
        made = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        directory, name = shadow.parent_of(unit.base, file.path)
        try:
            done = _replaced(unit.base, made, directory, name, known, kept.rpartition(b"/")[2])
        finally:
            os.close(directory)
            os.close(made)
    linux.sync_directory(os.path.dirname(os.path.join(unit.base, file.path)))
    return done


def drop(unit: Unit, files: Iterable[File], known: Mapping[bytes, Known]) -> list[bytes]:
    """Remove `files` from the unit's directory, each only if it is what was digested and nobody writes to it. Gives the
    paths that stay, directories that still hold something not counted. Raises OSError."""
    stay: list[bytes] = []
    with _beside(unit) as beside:
        for file in sorted(files, key=lambda item: item.path, reverse=True):
            item = known.get(file.path)
            try:
                if file.kind == "directory":
                    _remove_directory(unit.base, file.path)
                elif item is None or not _gone(unit, beside, item):
                    stay.append(file.path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it is gone already
    return stay


@contextmanager
def _beside(unit: Unit) -> Iterator[bytes]:
    """A directory on the unit's file system, for what is about to get or has just lost its name. A crash leaves it, to
    be removed by the next one; but for a file that somebody has written to since it lost its name."""
    beside = unit.base + b".new" if unit.evicted else set_aside_name(unit) + b".new"
    if os.path.isdir(beside):
        for name in os.listdir(beside):
            if name.startswith(_GONE):
                _recover(unit.base, beside, name)
    shadow.remove(beside)
    os.mkdir(beside, 0o700)
    try:
        yield beside
    finally:
        shadow.remove(beside)


def _recover(base: bytes, beside: bytes, name: bytes) -> None:
    status = os.lstat(os.path.join(beside, name))
    size, mtime_ns, last = name.removeprefix(_GONE).split(b".", 2)
    if (status.st_size, status.st_mtime_ns) == (int(size), int(mtime_ns)):
        return
    made = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _back(made, name, root, last)
    finally:
        os.close(root)
        os.close(made)


def _remove_directory(base: bytes, path: bytes) -> None:
    directory, name = shadow.parent_of(base, path)
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        os.close(directory)


def _gone(unit: Unit, beside: bytes, item: Known) -> bool:
    """Take a file's name away and remove it; False, and nothing changed, when it is not `item` or somebody writes to
    it. Who only reads it goes on doing so. A ctime of 0 is not compared, nor is any in a shadow."""
    base, ctime = unit.base, bool(item.ctime_ns) and not unit.evicted
    made = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    directory, name = shadow.parent_of(base, item.file.path)
    opened = _lease(base, item) if item.file.kind == "file" else None
    leased = opened is not None
    try:
        if item.file.kind == "file" and opened is None:
            opened = open_file(base, item.file.path, os.O_RDONLY)
            if linux.has_writers(opened):
                return False
        if not _is(directory, name, item, ctime=ctime):
            return False
        was = os.stat(name, dir_fd=directory, follow_symlinks=False)
        gone = (_GONE + b"%d.%d." % (was.st_size, was.st_mtime_ns) + name)[:255]
        linux.rename_at(directory, name, made, gone, linux.NOREPLACE)
        faults.point("take.unnamed")
        used = opened is not None and (linux.lease_wanted_for_writing(opened) if leased else linux.has_writers(opened))
        if not used and _is(made, gone, item, ctime=False):
            os.unlink(gone, dir_fd=made)
            return True
        _back(made, gone, directory, name)
        return False
    finally:
        for fd in (opened, directory, made):
            if fd is not None:
                os.close(fd)


def _back(made: int, present: bytes, directory: int, name: bytes) -> None:
    """Give a file its name again, or another one where somebody has taken that meanwhile."""
    number = 0
    while True:
        try:
            linux.rename_at(made, present, directory, _numbered(name, number), linux.NOREPLACE)
            return
        except FileExistsError:
            number += 1


def _put(base: bytes, beside: bytes, file: File, known: Known | None) -> None:
    made = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    directory, name = shadow.parent_of(base, file.path)
    try:
        if known is not None and _replaced(base, made, directory, name, known):
            return
        _back(made, b"file", directory, name)
    finally:
        os.close(directory)
        os.close(made)


def _numbered(name: bytes, number: int) -> bytes:
    ending = b".conflict-theirs" + (b"-%d" % number if number > 1 else b"")
    return name[: 255 - len(ending)] + ending if number else name


def _replaced(base: bytes, made: int, directory: int, name: bytes, known: Known, kept: bytes = b"") -> bool:
    """Exchange the new file with the one under its name; False, and nothing changed, when that is not `known` or in
    use. Whoever opens it while we do keeps it: then it is put back. What was there goes, or gets the name `kept`."""
    leased = _lease(base, known)
    if known.file.kind == "file" and leased is None:
        return False
    try:
        if not _is(directory, name, known):
            return False
        linux.rename_at(made, b"file", directory, name, linux.EXCHANGE)
        if _is(made, b"file", known, ctime=False) and not (leased and linux.lease_wanted_for_writing(leased)):
            if kept:
                linux.rename_at(made, b"file", directory, kept, linux.NOREPLACE)
            else:
                os.unlink(b"file", dir_fd=made)
            return True
        linux.rename_at(made, b"file", directory, name, linux.EXCHANGE)
        return False
    finally:
        if leased is not None:
            os.close(leased)


def _is(directory: int, name: bytes, known: Known, *, ctime: bool = True) -> bool:
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return Seen(name, status).matches(known, ctime=ctime)
    return False


def _lease(base: bytes, known: Known) -> int | None:
    """A descriptor with a lease on the file; without one where the file system has none. None: it is open or gone."""
    if known.file.kind != "file":
        return None
    try:
        fd = open_file(base, known.file.path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if linux.lease(fd):
            return fd
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES):
            return fd
        os.close(fd)
        raise
    os.close(fd)
    return None
