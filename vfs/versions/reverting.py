"""Make a unit's files what a manifest says. Used by rollback and by `runfs versions restore`.

Blocks on the local disk, and on stores where the unit is resident: what has to come is brought first, to a directory
beside the record, so nothing is touched for the sake of bytes that do not come. Then files are exchanged one by one,
each in one step. A crash leaves some of them done and that directory: planning and applying again does the rest, and
where all is done already, nothing.

A path changes only if it is what was planned with, and nobody has it open for writing; so what somebody writes
meanwhile stops the work instead of being lost.
"""

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vfs import cache, faults, linux, shadow
from vfs.core import Core
from vfs.errors import Refused, UsageError
from vfs.journal import Known
from vfs.manifest import SET_ID, File, Manifest, digest_of, foreign
from vfs.scan import Scan, Seen, open_file, reader
from vfs.units import Unit, set_aside_name

if TYPE_CHECKING:
    from vfs.hydrate import Hydrator
    from vfs.push import Pusher


@dataclass(frozen=True, slots=True)
class Changes:
    """What has to be done: paths to remove (children first), files to make (parents and first names first), files whose
    mode, times, owner or attributes change; all against `known`, what was there."""

    remove: tuple[File, ...]
    make: tuple[File, ...]
    touch: tuple[File, ...]
    directories: tuple[File, ...]
    known: Mapping[bytes, Known]

    @property
    def count(self) -> int:
        """Paths that change."""
        return len({file.path for file in (*self.remove, *self.make, *self.touch)})

    @property
    def bytes(self) -> int:
        """Bytes of the contents that are put in place."""
        return sum({f.digest: f.size for f in self.make if f.kind == "file"}.values())


def changes(known: Mapping[bytes, Known], wanted: Manifest, paths: Collection[bytes] = ()) -> Changes:
    """What makes the files `known` those of `wanted`, or only those at and below `paths`. Raises UsageError for a path
    that neither has."""
    present, target = {path: item.file for path, item in known.items()}, wanted.by_path()
    for path in paths:
        if path not in present and path not in target:
            raise UsageError(f"{os.fsdecode(path)} is neither in the record nor in version {wanted.generation}")
    chosen = {path for path in present.keys() | target.keys() if _chosen(path, paths)}
    for path in [path for path in chosen if path in target]:
        chosen |= {above for above in _above(path) if above not in present or present[above].kind != "directory"}
    remove, make, touch = [], [], []
    for path in sorted(chosen):
        here, there = present.get(path), target.get(path)
        if there is None or (here is not None and here.kind != there.kind):
            remove += [here] if here is not None else []
        if there is None:
            continue
        if here is None or not _same_content(here, there):
            make.append(there)
        elif _meta(here) != _meta(there):
            touch.append(there)
    made = {file.path for file in make}
    linked = [target[path] for path in chosen if path in target and target[path].same in made and path not in made]
    make = sorted((*make, *linked), key=lambda file: (file.kind != "directory", bool(file.same), file.path))
    directories = tuple(target[path] for path in chosen if path in target and target[path].kind == "directory")
    gone = tuple(sorted(remove, key=lambda file: file.path, reverse=True))
    return Changes(gone, tuple(make), tuple(touch), directories, known)


def _chosen(path: bytes, paths: Collection[bytes]) -> bool:
    return not paths or any(path == each or path.startswith(each + b"/") for each in paths)


def _above(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]


def _same_content(here: File, there: File) -> bool:
    return (here.kind, here.digest, here.target, here.same) == (there.kind, there.digest, there.target, there.same)


def _meta(file: File) -> tuple[object, ...]:
    """What can be set again; the mode of a link means nothing, only root can give files away, and set-id bits stay as
    they are: a version is a store's word."""
    owner = (file.uid, file.gid) if os.geteuid() == 0 else ()
    return (foreign(file).mode if file.kind != "symlink" else 0, file.mtime_ns, owner, file.attributes)


class Reverter:
    """Plans and carries out such changes."""

    def __init__(self, core: Core, pusher: "Pusher", hydrator: "Hydrator") -> None:
        self._core = core
        self._pusher = pusher
        self._hydrator = hydrator

    def plan(self, unit: Unit, wanted: Manifest, paths: Collection[bytes] = ()) -> Changes:
        """Digest what is here, and decide. Raises Refused while a file is being written to, UsageError, OSError."""
        found: Scan = self._pusher.scan(unit)
        if found.unsettled:
            raise Refused(f"{unit.uuid}: {os.fsdecode(found.unsettled[0])} is being written to; try again")
        return changes({item.file.path: item for item in found.known}, wanted, paths)

    def refuse_open(self, unit: Unit, planned: Changes) -> None:
        """Raises Refused when a file that is to change is open for writing."""
        if unit.writers:
            raise Refused(f"{unit.uuid}: a file of it is open for writing through the mount; close it and try again")
        for file in (*planned.remove, *planned.make):
            if file.path in planned.known:
                _refuse_changed(unit, file.path, planned.known[file.path])

    def apply(self, unit: Unit, planned: Changes) -> int:
        """Carry out what was planned; returns the bytes of the contents that were put in place. The caller holds
        `unit.moving` and has marked the unit dirty. Raises Refused, NoReplica, Full, OSError: then some of it may be
        done, and planning anew does the rest."""
        beside = unit.base + b".back" if unit.evicted else set_aside_name(unit) + b".back"
        shadow.remove(beside)
        os.mkdir(beside, 0o700)
        try:
            ready = self._prepare(unit, planned, beside)
            faults.point("revert.prepared")
            unit.note_change()
            _exchange(unit, planned, beside, ready)
        finally:
            shadow.remove(beside)
            unit.note_change()
        _sync(unit, planned)
        faults.point("revert.synced")
        self._pusher.scan(unit)
        for tell in self._core.content_changed:
            tell(unit)
        return planned.bytes

    def _prepare(self, unit: Unit, planned: Changes, beside: bytes) -> dict[bytes, bytes]:
        """Make every file under a name beside the record: path -> name. Placeholders, where the unit is evicted."""
        if not unit.evicted:
            self._core.need_space(planned.bytes)
        here = {item.file.digest: item.file.path for item in planned.known.values() if item.file.kind == "file"}
        ready: dict[bytes, bytes] = {}
        for number, file in enumerate(planned.make):
            if file.kind == "directory" or file.same:
                continue
            name = b"%d" % number
            source = here.get(file.digest) if not unit.evicted and file.kind == "file" and file.size else None
            if source is None or not _copied(unit.base, source, beside, name, file):
                self._make(unit, beside, name, file)
            ready[file.path] = name
        return ready

    def _make(self, unit: Unit, beside: bytes, name: bytes, file: File) -> None:
        fd = shadow.add_file(beside, replace(foreign(file), path=name, same=b""))
        if fd is None:
            return
        try:
            if not unit.evicted:
                self._hydrator.complete(fd, unit.uuid, file.path)
                os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
            os.fsync(fd)
        finally:
            os.close(fd)


def _copied(base: bytes, source: bytes, beside: bytes, name: bytes, file: File) -> bool:
    """Take a content from a file that has it here already; False when it has not after all."""
    try:
        fd = open_file(base, source, os.O_RDONLY)
    except OSError:
        return False
    target = os.path.join(beside, name)
    try:
        shadow.copy_to(fd, target)
    finally:
        os.close(fd)
    made = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(EOFError):
            if digest_of(reader(made), os.fstat(made).st_size).digest == file.digest:
                _set_meta(made, file)
                os.fsync(made)
                return True
    finally:
        os.close(made)
    os.unlink(target)
    return False


def _exchange(unit: Unit, planned: Changes, beside: bytes, ready: Mapping[bytes, bytes]) -> None:
    """The part that others see. Everything it needs is on this disk."""
    base, known = unit.base, planned.known
    replaced = {file.path for file in planned.make}
    unlinked: set[int] = set()  # inodes of which we took a name: their ctime says nothing any more
    for file in planned.remove:
        _refuse_changed(unit, file.path, known[file.path], unlinked)
        _remove(base, file)
        unlinked.add(known[file.path].inode)
        faults.point("revert.removed")
    removed = {file.path for file in planned.remove}
    for file in planned.make:
        if file.path in known and file.path not in removed and file.kind != "directory":
            _refuse_changed(unit, file.path, known[file.path], unlinked)
            unlinked.add(known[file.path].inode)
        _put(base, beside, file, ready)
        faults.point("revert.made")
    for file in planned.touch:
        if file.path not in replaced:
            _touch(base, file)
            faults.point("revert.touched")
    shadow.settle_directories(base, planned.directories)


def _remove(base: bytes, file: File) -> None:
    directory, name = shadow.parent_of(base, file.path)
    try:
        with suppress(FileNotFoundError):
            os.rmdir(name, dir_fd=directory) if file.kind == "directory" else os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def _put(base: bytes, beside: bytes, file: File, ready: Mapping[bytes, bytes]) -> None:
    """Give one file its name, in one step also where another has it."""
    if file.kind == "directory":
        shadow.add_file(base, file)
        return
    directory, name = shadow.parent_of(base, file.path)
    try:
        if file.same:
            _link(base, beside, file)
            source = b"link"
        else:
            source = ready[file.path]
        os.rename(os.path.join(beside, source), name, dst_dir_fd=directory)
        with suppress(FileNotFoundError):  # rename(2) between two names of one file does nothing
            os.unlink(os.path.join(beside, source))
    finally:
        os.close(directory)


def _link(base: bytes, beside: bytes, file: File) -> None:
    first, name = shadow.parent_of(base, file.same)
    try:
        os.link(name, os.path.join(beside, b"link"), src_dir_fd=first, follow_symlinks=False)
    finally:
        os.close(first)


def _touch(base: bytes, file: File) -> None:
    directory, name = shadow.parent_of(base, file.path)
    try:
        if file.kind in ("file", "directory"):
            fd = open_file(base, file.path, os.O_RDONLY)
            try:
                _set_meta(fd, file)
                os.fsync(fd)
            finally:
                os.close(fd)
            return
        if os.geteuid() == 0:
            os.chown(name, file.uid, file.gid, dir_fd=directory, follow_symlinks=False)
        if file.kind != "symlink":
            linux.change_mode(directory, name, foreign(file).mode)
        os.utime(name, ns=(file.mtime_ns, file.mtime_ns), dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(directory)


def _set_meta(fd: int, file: File) -> None:
    wanted = dict(file.attributes)
    for attribute, value in cache.user_attributes(fd):
        if wanted.get(attribute) == value:
            del wanted[attribute]
        else:
            os.removexattr(fd, attribute)
    cache.give_attributes(fd, wanted.items())
    status = os.fstat(fd)
    same_owner = os.geteuid() != 0 or (status.st_uid, status.st_gid) == (file.uid, file.gid)
    if not same_owner:
        os.fchown(fd, file.uid, file.gid)
    os.fchmod(fd, foreign(file).mode | (status.st_mode & SET_ID if same_owner else 0))
    os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))


def _refuse_changed(unit: Unit, path: bytes, known: Known, unlinked: Collection[int] = ()) -> None:
    """Raises Refused when a path is not what was planned with, or open for writing."""
    shown = os.fsdecode(path)
    directory, name = shadow.parent_of(unit.base, path)
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    finally:
        os.close(directory)
    if stat.S_ISDIR(status.st_mode) or known.file.kind == "other":
        return
    if not Seen(path, status).matches(known, ctime=not unit.evicted and status.st_ino not in unlinked):
        raise Refused(f"{unit.uuid}: {shown} changed just now; try again when nobody writes to it")
    if known.file.kind != "file" or unit.evicted:
        return
    fd = open_file(unit.base, path, os.O_RDONLY)
    try:
        if linux.has_writers(fd):
            owners = ", ".join(f"{who}[{pid}]" for pid, who in linux.owners_of(status.st_dev, status.st_ino)[:3])
            raise Refused(f"{unit.uuid}: {shown} is open for writing in {owners or 'some process'}; close it first")
    finally:
        os.close(fd)


def _sync(unit: Unit, planned: Changes) -> None:
    """Make names durable: every directory in which one was made, removed or given another file."""
    touched: Iterable[File] = (*planned.remove, *planned.make)
    parents = {file.path.rpartition(b"/")[0] for file in touched} | {file.path for file in planned.directories}
    for path in parents:
        with suppress(FileNotFoundError, NotADirectoryError):
            linux.sync_directory(os.path.join(unit.base, path) if path else unit.base)
