"""An item as it is read: a stream over the bytes of one version, each of them checked.

Used through `Bucket.get`. Blocks for the stores it reads from, one after the other until one gives the right bytes.
Memory is bounded: one flight of at most 8 MiB is kept.
"""

import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from blake3 import blake3

from vfs.errors import NoReplica, NotFound, RunfsError, StoreError, WrongBytes
from vfs.manifest import CHUNK, DIGEST, chunk_count
from vfs.objects import format as form
from vfs.objects.format import Version

T = TypeVar("T")

log = logging.getLogger(__name__)

FLIGHT = 8  # chunks asked for at once while the reader is sequential


@dataclass(frozen=True, slots=True)
class Stats:
    """What is known of one version of an item.

    `size` in bytes, `digest` the hex blake3 of all of it, `metadata` the JSON values that were put with it. `version`
    counts from 1; 0 is an item that was calculated, and is kept nowhere. `stale`: why there may be a newer state
    ("" when the store itself was asked). `waiting`: it is only here yet, and is sent by `Objects.settle`; its
    number may change then.
    """

    bucket: str
    name: str
    version: int
    size: int
    created: datetime
    digest: str
    metadata: dict[str, Any]
    stale: str = ""
    waiting: bool = False


def stats_of(bucket: str, name: str, version: Version, stale: str = "", waiting: bool = False) -> Stats:
    created = datetime.fromtimestamp(version.created_ns / 1e9, UTC)
    return Stats(
        bucket, name, version.number, version.size, created, version.digest, dict(version.metadata), stale, waiting
    )


class Place(Protocol):
    """Where bytes are read: a store, as far as it is needed here."""

    name: str

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes: ...


class Calculated:
    """One object of a store that calculates, as a place: whatever key is asked for."""

    def __init__(self, store: Place, key: str) -> None:
        self.name = store.name
        self._store = store
        self._key = key

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return self._store.read(self._key, start, length)


class Kept(Protocol):
    """The chunks of a version that are on this machine, by number. Nothing here raises a StoreError."""

    def find(self, number: int) -> bytes | None: ...

    def keep(self, number: int, data: bytes) -> None: ...

    def keep_digests(self, data: bytes) -> None: ...


class Verified:
    """The chunks of one version, from the first of `places` that gives them rightly. `kept`: those that are here
    already, which is given the others. `digests`: those of the chunks, where they are known and in no store."""

    def __init__(
        self,
        prefix: str,
        version: Version,
        places: Sequence[Place],
        kept: Kept | None = None,
        digests: bytes = b"",
    ) -> None:
        self._what = prefix.removeprefix(form.ROOT)
        self._prefix = prefix
        self._version = version
        self._places = places
        self._kept = kept
        self._list = digests or (b"" if version.chunks else bytes.fromhex(version.digest))

    @property
    def count(self) -> int:
        return chunk_count(self._version.size)

    def read(self, first: int, count: int) -> list[bytes]:
        """These chunks. Raises WrongBytes, NotFound, StoreError: of all places, the one that says most."""
        found: list[bytes] = []
        while len(found) < count:
            number = first + len(found)
            kept = self._kept.find(number) if self._kept else None
            if kept is not None and self._is_right(number, kept):
                found.append(kept)
            else:
                found += self._bring(number, count - len(found))
        return found

    def digests(self) -> bytes:
        """The digest of each chunk, concatenated."""
        if not self._list:
            self._list = self._first(self._read_digests)
            if self._kept is not None:
                self._kept.keep_digests(self._list)
        return self._list

    def _read_digests(self, store: Place) -> bytes:
        length = DIGEST * self.count
        data = store.read(self._prefix + form.DIGESTS + self._version.id, 0, length)
        if len(data) != length or blake3(data).hexdigest() != self._version.chunks:
            raise WrongBytes(f"{store.name} gives other digests for {self._what} than were put there")
        return data

    def _bring(self, first: int, count: int) -> list[bytes]:
        chunks = self._first(lambda store: self._read_chunks(store, first, count))
        for number, data in enumerate(chunks, first):
            if self._kept is not None:
                self._kept.keep(number, data)
        return chunks

    def _read_chunks(self, store: Place, first: int, count: int) -> list[bytes]:
        offset, size = first * CHUNK, self._version.size
        length = min(count * CHUNK, size - offset)
        data = store.read(self._prefix + form.DATA + self._version.id, offset, length)
        chunks = [data[at : at + CHUNK] for at in range(0, length, CHUNK)]
        for number, chunk in enumerate(chunks, first):
            if len(data) != length or not self._is_right(number, chunk):
                raise WrongBytes(
                    f"{store.name} gives other bytes for {self._what} than were put there; nothing of them was shown"
                )
        return chunks

    def _is_right(self, number: int, data: bytes) -> bool:
        size = min(CHUNK, self._version.size - number * CHUNK)
        wanted = self.digests()[number * DIGEST : (number + 1) * DIGEST]
        return len(data) == size and blake3(data).digest() == wanted

    def _first(self, ask: Callable[[Place], T]) -> T:
        """The answer of the first place that has a right one."""
        errors: list[RunfsError] = []
        for store in self._places:
            try:
                return ask(store)
            except (StoreError, WrongBytes) as error:
                if isinstance(error, WrongBytes):
                    log.warning("%s", error)
                errors.append(error)
        raise _worst(errors, self._what)


def _worst(errors: list[RunfsError], what: str) -> RunfsError:
    """The error that tells a person most: wrong bytes, then a store that could not be asked, then a missing one."""
    for kind in (WrongBytes, StoreError):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, NotFound):
                return error
    if errors:
        return NotFound(f"{what}: its bytes are gone: that version was removed meanwhile, or the store lost them")
    return NoReplica(f"{what}: there is no store to read it from")


class Item(io.BufferedIOBase):
    """One version of an item, to be read like an open binary file; to be closed, best by `with`.

    `read` raises WrongBytes instead of giving bytes that are not those that were put, NotFound when the version
    was removed meanwhile, StoreError when no store can give it.
    """

    def __init__(self, stats: Stats, chunks: Verified) -> None:
        self.stats = stats
        self._chunks = chunks
        self._position = 0
        self._first = 0  # chunk that the flight begins with
        self._flight: list[bytes] = []

    @property
    def name(self) -> str:
        """The item's name; no path of this machine."""
        return self.stats.name

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON values put with it."""
        return self.stats.metadata

    @property
    def version(self) -> int:
        """Its number; 0 when it was calculated."""
        return self.stats.version

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stats.size

    @property
    def created(self) -> datetime:
        """When this version was put, in UTC, by the clock of the machine that put it."""
        return self.stats.created

    @property
    def digest(self) -> str:
        """The hex blake3 of all of it."""
        return self.stats.digest

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, counted from the start, from here or from the end. Raises ValueError before the start."""
        self._check_open()
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"{self.stats.name}: cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """The next `size` bytes (all that are left: None or negative), fewer only at the end."""
        self._check_open()
        left = max(0, self.size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        pieces = bytearray()
        while len(pieces) < wanted:
            pieces += self._here(wanted - len(pieces))
        return bytes(pieces)

    def read1(self, size: int = -1, /) -> bytes:
        """Some of the next bytes: what is there without asking twice."""
        self._check_open()
        left = max(0, self.size - self._position)
        wanted = CHUNK if size < 0 else size
        return self._here(min(wanted, left)) if min(wanted, left) else b""

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readinto1(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read1(len(view))
        view[: len(data)] = data
        return len(data)

    def peek(self, size: int = 0, /) -> bytes:
        """Bytes that come next, without going there: lines are read quickly by it."""
        position = self._position
        data = self.read1(CHUNK)
        self._position = position
        return data

    def _here(self, wanted: int) -> bytes:
        """At most `wanted` bytes from the position on, from one chunk; and goes there."""
        number, inside = divmod(self._position, CHUNK)
        if not self._first <= number < self._first + len(self._flight):
            self._fly(number, (inside + wanted + CHUNK - 1) // CHUNK)
        data = self._flight[number - self._first][inside : inside + wanted]
        self._position += len(data)
        return data

    def _fly(self, number: int, wanted: int) -> None:
        """Bring chunks: those the reader needs now; more when it goes on where the last flight ended."""
        sequential = bool(self._flight) and number == self._first + len(self._flight)
        count = max(wanted, 2 * len(self._flight) if sequential else 1)
        count = min(count, FLIGHT, self._chunks.count - number)
        self._flight = []  # before the next one, so that memory holds one
        self._flight, self._first = self._chunks.read(number, count), number

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.stats.name}: the item is closed")
