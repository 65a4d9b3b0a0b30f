"""Bringing one object from a store to another, with proof that it arrived.

Used by the stores that are made of stores. Blocks for the calls of both stores, each within its limits; memory stays
bounded. Nothing is visible in the target before all of it is there.
"""

from collections.abc import Callable

from blake3 import blake3

from vfs.errors import Conflict, WrongBytes
from vfs.stores.protocol import Stat, Store

PIECE = 8 * 1024 * 1024  # bytes read back at a time


def carry(
    source: Store,
    source_key: str,
    target: Store,
    target_key: str,
    *,
    if_absent: bool = False,
    if_version: str | None = None,
    progress: Callable[[int], None] | None = None,
    deadline: float | None = None,
) -> Stat:
    """Copy an object into another store and prove it: by the target's checksum where it keeps one, by reading it back
    where not. `deadline` in seconds, for each call. Gives the target's description.

    Raises NotFound, Conflict (the target's condition does not hold, or the object was replaced while it was read: then
    nothing was written), WrongBytes (the target gives back something else), StoreError of either store.
    """
    found = source.stat(source_key, deadline=deadline)
    sent = _Sent(source, source_key, found, deadline)
    stat = target.upload(
        target_key,
        sent.piece,
        found.size,
        if_absent=if_absent,
        if_version=if_version,
        progress=progress,
        deadline=deadline,
    )
    if not stat.verified and digest_of(target, stat.key, found.size, deadline) != sent.digest():
        if if_absent:  # it is ours, and nobody should find it
            target.delete(stat.key, deadline=deadline)
        raise WrongBytes(f"{target.name} gave back other bytes for {stat.key} than were sent; check it: runfs stores")
    return stat


class _Sent:
    """The source of one upload, digested on the way."""

    def __init__(self, store: Store, key: str, found: Stat, deadline: float | None) -> None:
        self._store = store
        self._key = key
        self._found = found
        self._deadline = deadline
        self._digest = blake3()
        self._position = 0

    def piece(self, offset: int, length: int) -> bytes:
        """The bytes asked for; the last ones only if the object is still the one that was begun with."""
        data = self._store.read(self._key, offset, length, deadline=self._deadline)
        if offset == self._position:
            self._digest.update(data)
            self._position += len(data)
        if offset + length >= self._found.size:
            self._must_be_the_same()
        return data

    def _must_be_the_same(self) -> None:
        now = self._store.stat(self._key, deadline=self._deadline)
        if (now.version, now.size, now.modified_ns) != (
            self._found.version,
            self._found.size,
            self._found.modified_ns,
        ):
            raise Conflict(f"{self._store.name}: {self._key} was replaced while it was read; try again")

    def digest(self) -> bytes:
        """The digest of the whole object; read again where a resumed upload did not ask for all of it."""
        if self._position == self._found.size:
            return self._digest.digest()
        return digest_of(self._store, self._key, self._found.size, self._deadline)


def digest_of(store: Store, key: str, size: int, deadline: float | None = None) -> bytes:
    """The blake3 of what a store gives back. Raises WrongBytes when that is not `size` bytes, NotFound, StoreError."""
    digest = blake3()
    for offset in range(0, size, PIECE):
        length = min(PIECE, size - offset)
        data = store.read(key, offset, length, deadline=deadline)
        if len(data) != length:
            raise WrongBytes(f"{key} in {store.name} ends at {offset + len(data)} of {size} bytes")
        digest.update(data)
    if store.stat(key, deadline=deadline).size != size:
        raise WrongBytes(f"{key} in {store.name} is longer than the {size} bytes that were sent")
    return digest.digest()
