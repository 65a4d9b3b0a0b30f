"""Make files that another host added or changed appear in a local record. Used by push after a merge.

Blocks on the local disk, and on stores where the record is resident: its directory never holds a placeholder, so a
file is made whole beside it first. What a crash leaves: a directory beside the record, which the next call removes.

A local file is replaced in one step, and only if it is what was digested and nobody has it open; else theirs gets a
second name. So what somebody writes meanwhile is not lost.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from vfs import faults, linux, shadow
from vfs.journal import Known
from vfs.manifest import File
from vfs.scan import Seen, open_file
from vfs.units import Unit, set_aside_name

Complete = Callable[[int, bytes], None]


def take(unit: Unit, files: Iterable[File], known: Mapping[bytes, Known], complete: Complete) -> None:
    """Put `files` into the unit's directory. `known` is what was digested there; `complete(fd, path)` brings a file.

    Raises NoReplica (nothing was replaced by what could not be brought), Full, OSError.
    """
    base = unit.base
    beside = base + b".new" if unit.evicted else set_aside_name(unit) + b".new"
    shadow.remove(beside)
    os.mkdir(beside, 0o700)
    try:
        for file in sorted(files, key=lambda item: item.path):
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
    finally:
        shadow.remove(beside)


def _put(base: bytes, beside: bytes, file: File, known: Known | None) -> None:
    made = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    directory, name = shadow.parent_of(base, file.path)
    try:
        if known is not None and _replaced(base, made, directory, name, known):
            return
        number = 0
        while True:
            try:
                linux.rename_at(made, b"file", directory, _numbered(name, number), linux.NOREPLACE)
                return
            except FileExistsError:
                number += 1
    finally:
        os.close(directory)
        os.close(made)


def _numbered(name: bytes, number: int) -> bytes:
    ending = b".conflict-theirs" + (b"-%d" % number if number > 1 else b"")
    return name[: 255 - len(ending)] + ending if number else name


def _replaced(base: bytes, made: int, directory: int, name: bytes, known: Known) -> bool:
    """Exchange the new file with the one under its name; False, and nothing changed, when that is not `known` or in
    use. Whoever opens it while we do keeps it: then it is put back."""
    leased = _lease(base, known)
    if known.file.kind == "file" and leased is None:
        return False
    try:
        if not _is(directory, name, known):
            return False
        linux.rename_at(made, b"file", directory, name, linux.EXCHANGE)
        if _is(made, b"file", known, ctime=False) and not (leased and linux.lease_wanted_for_writing(leased)):
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
