"""Write a record that a store holds into a directory of this machine: whole, checked, and never half.

Used by `vfs.records` and by import. Blocks on the store (each call within its deadline) and on the local disk. What a
store says is not believed: names are checked as a manifest's are, and bytes against its digests.

The files are written to a second name beside the directory, synced, and renamed; the `.machinable` markers, by which
others find a record, come last. What a crash leaves: a directory `.runfs-part-*` beside it, without markers, which a
later call removes when it is a day old; or the whole directory without its marker, which the next call adds.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

from vfs import faults, linux, shadow
from vfs.errors import DamagedRecord, Full, NotFound, Refused, WrongBytes
from vfs.format import MARKER
from vfs.hydrate import check
from vfs.manifest import Content, File, Manifest, digest_of
from vfs.scan import kind_of, open_file, reader
from vfs.stores import keys
from vfs.stores.protocol import Stat
from vfs.units import linked_record
from vfs.wire import Kept

PIECE = 8 << 20  # bytes of an object brought at a time
_AT_ONCE = 8
_LEFT_OVER_S = 86400.0  # what an interrupted call left is removed when it is this old
_SPARE = 16 << 20  # bytes of the disk that are left free
_PREFIX = b".runfs-part-"
_MARKER = os.fsencode(MARKER)


def retrieve(kept: Kept, manifest: Manifest, directory: str | os.PathLike[str], within: bytes = b"") -> int:
    """Make `directory` hold a record, or the part of one below the path `within`; the bytes that were brought.

    A directory that is there already must hold the same record, or nothing: files that are missing in it are added,
    others stay. Raises Refused, and changes nothing, where a file in it is not what the store has, where the directory
    holds something else, or where it is the link of an evicted record; WrongBytes, StoreError, Full, OSError.
    """
    target = _target(directory)
    files = _lacking(target, part_of(manifest, within))
    need_space(target, sum(file.size for file in files))
    with _beside(target) as made:
        _make_tree(made, files)
        brought = _bring_all(kept, manifest.contents, made, files)
        shadow.settle_directories(made, files)
        shadow.sync(made)
        _put(made, target, files)
    return brought


def part_of(manifest: Manifest, within: bytes) -> list[File]:
    """The files of a manifest below a path, by their paths from there. Raises NotFound where there are none."""
    prefix = within + b"/" if within else b""
    found = []
    for file in manifest.files:
        if file.path.startswith(prefix):
            same = file.same[len(prefix) :] if file.same.startswith(prefix) else b""
            found.append(replace(file, path=file.path[len(prefix) :], same=same))
    if not found:
        raise NotFound(f"{manifest.uuid} has nothing at {os.fsdecode(within)}")
    return found


def plain_manifest(kept: Kept, uuid: str, found: Iterable[Stat]) -> Manifest:
    """A record without a manifest as its listing describes it: names, sizes and times are the store's word, and there
    are no digests. Raises DamagedRecord for names that cannot be a tree."""
    files: dict[bytes, File] = {}
    for each in found:
        path = keys.name_of(each.key[len(uuid) + 1 :])
        parts = path.split(b"/")
        if any(part in (b"", b".", b"..") or b"\0" in part or len(part) > 255 for part in parts):
            raise DamagedRecord(f"{each.key} in {kept.name} is no name for a file; remove or rename that object")
        for count in range(1, len(parts)):
            above = b"/".join(parts[:count])
            if files.setdefault(above, File(above, "directory", 0o755, each.modified_ns or 0)).kind == "file":
                raise _twice(kept, files[above].key)
        if path in files:
            raise _twice(kept, each.key)
        files[path] = File(path, "file", 0o644, each.modified_ns or 0, each.size, key=each.key)
    if _MARKER not in files:
        files[_MARKER] = File(_MARKER, "file", 0o644, 0)
    return Manifest(uuid, 0, tuple(files[path] for path in sorted(files)))


def _twice(kept: Kept, what: str) -> DamagedRecord:
    return DamagedRecord(f"{what} in {kept.name} is a file and a directory at once; remove or rename one of the two")


def digested(kept: Kept, plain: Manifest, told: Callable[[int], None] = lambda _size: None) -> Manifest:
    """A plain record's manifest with digests: every byte is read once, none is kept. `told` gets the bytes read of
    each object. Raises WrongBytes for an object that changes meanwhile, StoreError."""
    contents: dict[bytes, Content] = {}
    files = []
    for file in plain.files:
        if file.kind == "file":
            content = _digest(kept, file)
            contents[content.digest] = content
            file = replace(file, digest=content.digest)
            told(file.size)
        files.append(file)
    return replace(plain, files=tuple(files), contents=contents)


def _digest(kept: Kept, file: File) -> Content:
    held: list[tuple[int, bytes]] = [(0, b"")]

    def read(offset: int, length: int) -> bytes:
        start, data = held[0]
        if not start <= offset < start + len(data):
            start, data = held[0] = offset, _read(kept, file, offset, min(PIECE, file.size - offset))
        return data[offset - start : offset - start + length]

    return digest_of(read, file.size)


def _read(kept: Kept, file: File, offset: int, length: int) -> bytes:
    with kept.watched():
        data = kept.store().read(file.key, offset, length)
    if len(data) != length:
        raise WrongBytes(
            f"{file.key} in {kept.name} gave {len(data)} bytes from {offset} on, not {length}: it changed, or it is "
            "not what its listing says; try again"
        )
    return data


# --- the directory -------------------------------------------------------------------------------------------------


def _target(directory: str | os.PathLike[str]) -> bytes:
    """Where the record goes, links on the way resolved. Raises Refused for an evicted record's link."""
    path = os.fsencode(os.path.abspath(directory))
    uuid = linked_record(path)
    if uuid is not None:
        raise Refused(
            f"{os.fsdecode(path)} is the link of the evicted record {uuid}; its bytes come through the mount, or back "
            f"with: runfs hydrate --restore {uuid}"
        )
    return os.path.realpath(path)


def _lacking(target: bytes, files: list[File]) -> list[File]:
    """The files that are not in `target` yet. Raises Refused when it holds anything else under one of their names."""
    if not os.path.isdir(target):
        if os.path.lexists(target):
            raise Refused(f"{os.fsdecode(target)} is in the way: it is no directory")
        return files
    if not os.listdir(target):
        return files
    if not os.path.lexists(os.path.join(target, b"id.json")):
        raise Refused(f"{os.fsdecode(target)} holds something that is no record; name an empty or a new directory")
    lacking, differing = [], []
    for file in files:
        there = _there(target, file)
        if there is None:
            lacking.append(file)
        elif not there:
            differing.append(file.path)
    if differing:
        raise _differs(target, differing)
    return lacking


def _differs(target: bytes, paths: list[bytes]) -> Refused:
    shown = ", ".join(repr(os.fsdecode(path)) for path in sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
    return Refused(
        f"{os.fsdecode(target)}: {shown} is not what the store holds, and was left alone; commit the record from "
        "there, or retrieve it into another directory"
    )


def _there(target: bytes, file: File) -> bool | None:
    """Whether a file is in the directory as it should be; None: it is missing, or only its bytes can tell."""
    try:
        directory, name = shadow.parent_of(target, file.path)
    except OSError as error:
        return None if error.errno == errno.ENOENT else False
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    finally:
        os.close(directory)
    if kind_of(status.st_mode) != file.kind or (file.kind == "file" and status.st_size != file.size):
        return False
    if file.kind == "symlink":
        return os.readlink(os.path.join(target, file.path)) == file.target
    if file.kind != "file" or file.path.rpartition(b"/")[2] == _MARKER:
        return True
    return _digest_here(target, file.path, file.size) == file.digest if file.digest else None


def _digest_here(root: bytes, path: bytes, size: int) -> bytes | None:
    fd = open_file(root, path, os.O_RDONLY)
    try:
        return digest_of(reader(fd), size).digest
    except EOFError:
        return None
    finally:
        os.close(fd)


def need_space(target: bytes, size: int) -> None:
    """Raise Full when `size` more bytes would not fit onto the disk around a path."""
    above = target
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    room = os.statvfs(above)
    if room.f_bavail * room.f_frsize < size + _SPARE:
        raise Full(f"no space in {os.fsdecode(above)} for {size:,} bytes; free some, or name another directory")


@contextmanager
def _beside(target: bytes) -> Iterator[bytes]:
    """A new directory beside `target`, gone afterwards; what older calls left there is removed."""
    place = os.path.dirname(target)
    os.makedirs(place, exist_ok=True)
    for name in os.listdir(place):
        left = os.path.join(place, name)
        with suppress(OSError):
            if name.startswith(_PREFIX) and time.time() - os.lstat(left).st_mtime > _LEFT_OVER_S:
                shadow.remove(left)
    made = os.path.join(place, _PREFIX + os.urandom(8).hex().encode())
    os.mkdir(made, 0o700)
    try:
        yield made
    finally:
        if os.path.lexists(made):
            shutil.rmtree(made, ignore_errors=True)


def _is_marker(file: File) -> bool:
    return file.path.rpartition(b"/")[2] == _MARKER and file.kind == "file"


def _made_name(file: File) -> bytes:
    """A file's name while the record is being made: a marker has another one, so that nobody finds half a record."""
    return file.path + b".runfs-part" if _is_marker(file) else file.path


def _make_tree(root: bytes, files: Iterable[File]) -> None:
    """Directories, and empty files of the right size. Links come last: nothing is ever written through one."""
    for file in files:
        path = os.path.join(root, _made_name(file))
        os.makedirs(path if file.kind == "directory" else os.path.dirname(path), mode=0o700, exist_ok=True)
        if file.kind == "file":
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, file.size)
            os.close(fd)


def _bring_all(kept: Kept, contents: Mapping[bytes, Content], root: bytes, files: list[File]) -> int:
    """Fill the files, several pieces at once, then give everything its mode, times and links."""
    wanted = [file for file in files if file.kind == "file" and not file.same]
    pieces = [(file, offset) for file in wanted for offset in range(0, file.size, PIECE)]

    def bring(piece: tuple[File, int]) -> None:
        file, offset = piece
        length = min(PIECE, file.size - offset)
        data = _read(kept, file, offset, length)
        if file.digest:
            check(data, contents[file.digest], offset, length, f"{file.key} in {kept.name}")
        _write(os.path.join(root, _made_name(file)), data, offset)

    with ThreadPoolExecutor(_AT_ONCE, "retrieve") as pool:
        futures = [pool.submit(bring, piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for file in files:
        _finish(root, file)
    return sum(file.size for file in wanted)


def _write(path: bytes, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Full(f"no space for {os.fsdecode(path)}; free some, or name another directory") from error
        raise
    finally:
        os.close(fd)


def _finish(root: bytes, file: File) -> None:
    path = os.path.join(root, _made_name(file))
    if file.kind == "symlink":
        os.symlink(file.target, path)
    elif file.kind == "other":
        os.mkfifo(path, file.mode & 0o777)
    elif file.kind == "directory":
        os.chmod(path, file.mode & 0o777 | 0o700)
    elif file.same and os.path.lexists(os.path.join(root, file.same)):
        os.unlink(path)
        os.link(os.path.join(root, file.same), path)
    else:
        for name, value in file.attributes:
            with suppress(OSError):  # the disk keeps none
                os.setxattr(path, name, value)
        os.chmod(path, file.mode & 0o777)  # never set-id bits: a store's word
    if file.kind in ("file", "symlink"):
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns), follow_symlinks=False)


def _put(made: bytes, target: bytes, files: list[File]) -> None:
    """Give what was made its name; in a directory that is there already each new file its own. Markers come last."""
    faults.point("retrieve.made")
    if not _renamed(made, target):
        for file in files:
            if not _is_marker(file):
                _put_one(made, target, file)
    faults.point("retrieve.renamed")
    for file in sorted(filter(_is_marker, files), key=lambda file: -file.path.count(b"/")):
        _put_one(made if os.path.lexists(made) else target, target, file)  # nested records first, the root last
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(target, _made_name(file)))  # of a call that was interrupted
        linux.sync_directory(os.path.dirname(os.path.join(target, file.path)))
    linux.sync_directory(os.path.dirname(target))


def _renamed(made: bytes, target: bytes) -> bool:
    """Give the new directory its name in one step; False when something has it already, perhaps since just now."""
    try:
        os.chmod(made, 0o755)
        os.rename(made, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        os.chmod(made, 0o700)
        return False
    return True


def _put_one(made: bytes, target: bytes, file: File) -> None:
    directory, name = shadow.parent_of(target, file.path)
    source, new = shadow.parent_of(made, _made_name(file))
    try:
        if file.kind == "directory":
            with suppress(FileExistsError):
                os.mkdir(name, file.mode & 0o777 | 0o700, dir_fd=directory)
            return
        try:
            linux.rename_at(source, new, directory, name, linux.NOREPLACE)
        except FileExistsError:
            there = _there(target, file)
            if there is None:
                size = file.size
                there = _digest_here(target, file.path, size) == _digest_here(made, _made_name(file), size)
            if not there:
                raise _differs(target, [file.path]) from None
    finally:
        os.close(directory)
        os.close(source)
