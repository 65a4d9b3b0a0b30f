"""Bring contents of a record to a store, and prove by reading that they are there. A part of the form of a record in a
store, see `vfs/wire.py`. Used by the daemon's push and proofs, and by `vfs.records`.

Blocks on the store (each call within its deadline) and on the local disk. An object that was uploaded when a crash came
is found by the next upload, read back and adopted, or the content goes to another key.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from blake3 import blake3

from vfs import faults
from vfs.errors import Conflict, NotFound, RunfsError, StoreTimeout, WrongBytes
from vfs.manifest import Content, File
from vfs.scan import Changing, open_file
from vfs.stores.protocol import Stat
from vfs.wire import Kept, data_key, plain_key

log = logging.getLogger(__name__)

SMALL = 8 << 20  # bytes; up to here a content is one request, with its md5 to compare
_PIECE = 8 << 20  # bytes read back at a time
RENEW_S = 1800.0  # half the time after which an object that nobody needs is swept by default
ADOPTED = "read back"  # how an object that was there already was proven


@dataclass(frozen=True, slots=True)
class Placed:
    """A content that is in a store: under which key, and when (ns; 0: not yet) and how that was proven."""

    digest: bytes
    key: str
    proven_ns: int
    how: str


Mover = Callable[[bytes, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _unseen(_path: bytes, _size: int) -> Iterator[Callable[[int], None]]:
    yield lambda _done: None


@dataclass(frozen=True, slots=True)
class Uploads:
    """Uploading contents of the record at `root` (a local directory) to one store.

    `contents` by digest; `taken`: keys that the store's manifest uses already, which are never written; `lacking`:
    for each digest to be uploaded every path that has it; `moving(path, size)` shows the progress of a large file.
    An object that no manifest names and that is older than `renew_s` seconds may be swept by another host at any
    moment: it is written again before anything counts on it.
    """

    kept: Kept
    uuid: str
    root: bytes
    contents: Mapping[bytes, Content]
    taken: frozenset[str]
    lacking: Mapping[bytes, Sequence[File]]
    moving: Mover = _unseen
    renew_s: float = RENEW_S

    def run(self, pool: Executor, note: Callable[[Sequence[Placed]], None]) -> dict[bytes, str]:
        """Upload all that is lacking: small contents many at once, large ones one after the other (each is parallel
        in itself). `note` gets what has been placed, before anything is raised. Returns digest -> key.

        Raises Changing for a file that changed meanwhile or cannot be read, StoreError.
        """
        todo = [same[0] for same in self.lacking.values()]
        futures = [pool.submit(self.small, file) for file in todo if file.size <= SMALL]
        done: dict[bytes, str] = {}
        small: list[Placed] = []
        errors: list[BaseException] = []
        for future in futures:
            try:
                small.append(future.result())
            except (RunfsError, OSError) as error:
                errors.append(error)
        note(small)
        if errors:
            raise errors[0] if isinstance(errors[0], RunfsError) else Changing(str(errors[0]))
        done |= {placed.digest: placed.key for placed in small}
        for file in todo:
            if file.size > SMALL:
                placed = self.large(file)
                note([placed])
                done[placed.digest] = placed.key
        return done

    def small(self, file: File) -> Placed:
        """Upload up to `SMALL` bytes in one request. Proven at once where the store keeps an md5."""
        data = self._read_all(file)
        if len(data) != file.size or blake3(data).digest() != file.digest:
            raise Changing(f"{os.fsdecode(file.path)} changed while it was pushed")

        def write(key: str, if_absent: bool) -> Stat:
            with self.kept.watched():
                return self.kept.store().write(key, data, if_absent=if_absent)

        return self._place(file, write)

    def large(self, file: File) -> Placed:
        """Stream a file up, digesting what is sent: what arrived there is what the manifest says, or it is removed."""
        fd = open_file(self.root, file.path, os.O_RDONLY)
        try:
            return self._place(file, lambda key, if_absent: self._stream(fd, file, key, if_absent))
        finally:
            os.close(fd)

    def _stream(self, fd: int, file: File, key: str, if_absent: bool) -> Stat:
        sent = blake3()
        position = 0

        def source(offset: int, length: int) -> bytes:
            nonlocal position
            data = os.pread(fd, length, offset)
            if offset == position and len(data) == length:
                sent.update(data)
                position += length
            return data

        with self.moving(file.path, file.size) as step, self.kept.watched():
            stat = self.kept.store().upload(key, source, file.size, if_absent=if_absent, progress=step)
        if position != file.size or sent.digest() != file.digest:
            self.kept.store().delete(stat.key)
            raise Changing(f"{os.fsdecode(file.path)} changed while it was pushed")
        return stat

    def _read_all(self, file: File) -> bytes:
        fd = open_file(self.root, file.path, os.O_RDONLY)
        try:
            return b"".join(iter(lambda: os.read(fd, SMALL), b""))
        finally:
            os.close(fd)

    def _place(self, file: File, write: Callable[[str, bool], Stat]) -> Placed:
        """Write under the plain name if nothing is there, else adopt what is there, else under the digest."""
        store = self.kept.store()
        content = self.contents[file.digest]
        for key in (plain_key(self.uuid, file.path), data_key(self.uuid, file.digest)):
            if key in self.taken and key != data_key(self.uuid, file.digest):
                continue
            try:
                if store.info().conditional_write:
                    placed = _placed(file, write(key, True))
                elif self._exists(key):
                    raise Conflict(f"{key} exists")
                else:
                    placed = _placed(file, write(key, False))
            except Conflict:
                try:
                    read_back(self.kept, key, content)
                except (WrongBytes, NotFound):
                    continue
                if self._may_be_swept(key) and (again := write(key, False)).key != key:
                    return _placed(file, again)
                self._place_others(file, key)
                return Placed(file.digest, key, time.time_ns(), ADOPTED)
            faults.point("push.uploaded")
            self._place_others(file, placed.key)
            return placed
        # Its name is the digest of other bytes, so it is of no use to anybody: the one object that is replaced.
        log.warning("%s holds wrong bytes under %s; they are replaced", self.kept.name, key)
        return _placed(file, write(key, False))

    def _place_others(self, file: File, source: str) -> None:
        """The plain objects of other paths with the same content: any tool finds all of a record by its names."""
        store = self.kept.store()
        if store.info().chooses_keys:  # nobody would find them
            return
        for other in self.lacking[file.digest][1:]:
            key = plain_key(self.uuid, other.path)
            if key in self.taken or self._exists(key):
                continue
            with suppress(Conflict), self.kept.watched():
                if store.info().server_copy:
                    store.copy(source, key, if_absent=store.info().conditional_write)
                elif file.size <= SMALL and blake3(data := self._read_all(file)).digest() == file.digest:
                    store.write(key, data, if_absent=store.info().conditional_write)

    def _may_be_swept(self, key: str) -> bool:
        if not self.taken or key in self.taken:  # without a manifest nothing is swept
            return False
        with self.kept.watched():
            modified = self.kept.store().stat(key).modified_ns
        return modified is not None and time.time_ns() - modified > self.renew_s * 1e9

    def _exists(self, key: str) -> bool:
        try:
            with self.kept.watched():
                self.kept.store().stat(key)
        except NotFound:
            return False
        return True


def _placed(file: File, stat: Stat) -> Placed:
    """What a write or upload did: proven where the store's own checksum equals that of what was sent."""
    proven = stat.verified and stat.checksum is not None
    how = f"{stat.checksum[0]} of the store" if proven and stat.checksum else ""
    return Placed(file.digest, stat.key, time.time_ns() if proven else 0, how)


def read_back(kept: Kept, key: str, content: Content, deadline_s: float | None = None) -> None:
    """Prove by reading: every byte of the object is what the content says. Raises WrongBytes, StoreError."""
    whole = blake3()
    store = kept.store()
    began = time.monotonic()
    for offset in range(0, content.size, _PIECE):
        length = min(_PIECE, content.size - offset)
        with kept.watched():
            data = store.read(key, offset, length)
        if len(data) != length:
            raise WrongBytes(f"{key} in {kept.name} ends at {offset + len(data)} of {content.size} bytes")
        whole.update(data)
        if deadline_s is not None and time.monotonic() - began > deadline_s:
            raise StoreTimeout(f"{kept.name}: reading {key} back took longer than {deadline_s:.0f} s")
    with kept.watched():
        size = store.stat(key).size
    if whole.digest() != content.digest or size != content.size:
        raise WrongBytes(f"{key} in {kept.name} does not hold the bytes that were pushed")
