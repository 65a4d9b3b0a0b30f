"""A store mounted at a prefix of another one: changes stay in the front, everything else shows through from behind.

Used through `MountedStore(front, "study/", backing)`: the front's `a` is the whole's `study/a`. Blocks as its two
stores do.

- Reads: under the prefix the front is asked first; only where it has nothing, the backing store. A front that cannot be
  asked is an error, never a reason to show what the backing store has: that may be older.
- Changes are allowed under the prefix only, go to the front, and never touch the backing store. An object is replaced
  as a whole, so a write needs no copy of what it replaces: `if_version` against an object that only the backing store
  has compares that version, then makes the object in the front if nobody else did meanwhile, which is what copying it
  up first would come to, without the bytes. Who changes a part of an object (its metadata) calls `copy_up` first.
- `delete` of an object that only the backing store has is refused. Of one that both have, it removes the front's: the
  backing one shows through again.
- `move` of an object that the backing store has is refused for the same reason: it would stay where it is.
- Versions of one key differ between the two stores: after `copy_up` or `push` a version asked for earlier no longer
  holds (Conflict), though the bytes are the same. Ask again with `stat`.
- Within one process a key is changed by one caller at a time. From several processes the front's own conditional writes
  decide; only `push` must not run while another process writes the same key: it compares the front's version just
  before it removes the front's object, and between the two there is a moment (and where `Info.exact_versions` is false
  the comparison can miss a replacement).
- A listing gives the front's objects, then those that only the backing store has; it keeps the front's keys
  for that (at most 200,000; beyond that it asks the front for each of the backing store's).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vfs.errors import Conflict, Denied, NotFound, UsageError
from vfs.stores import keys
from vfs.stores.base import BaseStore
from vfs.stores.carrying import carry
from vfs.stores.limits import Limits
from vfs.stores.merging import KeyLocks, gather_problems, merge
from vfs.stores.probing import PROBE_PREFIX, check_store
from vfs.stores.protocol import Arrived, Check, Info, Stat, Store


class MountedStore(BaseStore):
    """`front` mounted at `prefix` of `backing`. Both belong to it: `disconnect` disconnects them.

    `prefix` is empty or ends in "/". `limits` bound the wait for a key that another thread is changing. Raises
    UsageError for a prefix that is no prefix of keys.
    """

    def __init__(
        self,
        front: Store,
        prefix: str,
        backing: Store,
        *,
        name: str | None = None,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        if prefix and not prefix.endswith("/"):
            raise UsageError(f"prefix = {prefix!r}: a store is mounted at a prefix that ends in '/', or at ''")
        if prefix:
            keys.check_writable(prefix[:-1])
        super().__init__(
            name or f"{front.name} on {backing.name}",
            f"{backing.url} with {front.url} at {prefix or '/'}",
            read_only=read_only or front.info().read_only,
            limits=limits,
        )
        self.front = front
        self.prefix = prefix
        self.backing = backing
        self._checksum = front.info().checksum  # what is written has that; without it none is given
        self._locks = KeyLocks()

    # What both can do together
    # ----------------------------------------------------------------------------------------------------------

    def info(self) -> Info:
        front, backing = self.front.info(), self.backing.info()
        return Info(
            broker="mounted",
            ranges=front.ranges and backing.ranges,
            lists=front.lists and backing.lists,
            atomic_replace=front.atomic_replace,
            conditional_write=front.conditional_write,
            checksum=self._checksum,
            read_only=self._read_only,
            max_object=front.max_object,
            chooses_keys=front.chooses_keys,
            resumes=front.resumes,
            exact_versions=front.exact_versions and backing.exact_versions,
            sweeps=front.sweeps or backing.sweeps,
            calculates=front.calculates or backing.calculates,
        )

    @property
    def connected(self) -> bool:
        return self._connected and self.front.connected and self.backing.connected

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        super().connect(credentials)
        self.front.connect()
        self.backing.connect()

    def disconnect(self) -> None:
        super().disconnect()
        self.front.disconnect()
        self.backing.disconnect()

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        self._begin("sweep", changes=True)
        swept = self.front.sweep(older_than_s, deadline=deadline)
        if not self.backing.info().read_only:  # a push that was interrupted left something there
            swept += self.backing.sweep(older_than_s, deadline=deadline)
        return swept

    def check(self) -> Check:
        return check_store(self, self.prefix + PROBE_PREFIX)

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        found = self._front_stat(key, deadline)
        return found if found is not None else self._behind(self.backing.stat(key, deadline=deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        if self._is_under(key):
            with suppress(NotFound):
                return self.front.read(self._inner(key), start, length, deadline=deadline)
        return self.backing.read(key, start, length, deadline=deadline)

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, len(buffer))
        if self._is_under(key):
            with suppress(NotFound):
                return self.front.read_into(self._inner(key), buffer, start, arrived=arrived, deadline=deadline)
        return self.backing.read_into(key, buffer, start, arrived=arrived, deadline=deadline)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        front = self._front_listing(prefix, recursive, deadline)
        backing = map(self._behind, self.backing.list(prefix, recursive=recursive, deadline=deadline))
        return self._merged(front, backing, deadline)

    def _merged(self, front: Iterator[Stat], backing: Iterator[Stat], deadline: float | None) -> Iterator[Stat]:
        yield from merge((front, backing), lambda _, key: self._front_stat(key, deadline) is not None)
        gather_problems(self, self.front, self.backing)

    def local_path(self, key: str) -> Path | None:
        self._begin("local_path", keys.check_readable(key))
        if self._is_under(key):
            with suppress(NotFound):
                path = self.front.local_path(self._inner(key))
                if path is not None or self._front_stat(key, None) is not None:
                    return path
        return self.backing.local_path(key)

    # Changes
    # ----------------------------------------------------------------------------------------------------------

    def upload(
        self,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat:
        inner = self._writable("upload", key)
        with self._locks(self._limits.budget(deadline, size), key):
            absent, version = self._condition(key, if_absent, if_version, deadline)
            stat = self.front.upload(
                inner,
                source,
                size,
                if_absent=absent,
                if_version=version,
                progress=progress,
                deadline=deadline,
            )
            return self._before(stat)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        inner = self._writable("copy", target)
        with self._locks(self._limits.budget(deadline), target):
            absent, _ = self._condition(target, if_absent, None, deadline)
            if self._front_stat(keys.check_readable(source), deadline) is None:
                return self._before(carry(self.backing, source, self.front, inner, if_absent=absent, deadline=deadline))
            return self._before(self.front.copy(self._inner(source), inner, if_absent=absent, deadline=deadline))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """Within the front. Raises Denied where the backing store has `source`, which would stay."""
        inner = self._writable("move", target)
        self._writable("move", source, reading=True)
        if source == target:
            return self.stat(source, deadline=deadline)
        with self._locks(self._limits.budget(deadline), source, target):
            absent, _ = self._condition(target, if_absent, None, deadline)
            if self._backing_stat(source, deadline) is not None:
                raise Denied(f"{self.name}: move {source}: {self.backing.name} has it and keeps it; copy it instead")
            return self._before(self.front.move(self._inner(source), inner, if_absent=absent, deadline=deadline))

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        """Remove the front's object; the backing store's shows through again. Raises Denied where only that has it."""
        inner = self._writable("delete", key, reading=True)
        with self._locks(self._limits.budget(deadline), key):
            if self._front_stat(key, deadline) is not None:
                self.front.delete(inner, deadline=deadline)
            elif self._backing_stat(key, deadline) is not None:
                raise Denied(f"{self.name}: delete {key}: only {self.backing.name} has it; delete it there")

    # Between the two
    # ----------------------------------------------------------------------------------------------------------

    def copy_up(self, key: str, *, deadline: float | None = None) -> Stat:
        """Have the front hold this object, proven, so that it can be changed there; nothing is done when it does.

        `deadline` in seconds, for each call. Raises NotFound, Denied outside the prefix, WrongBytes, StoreError.
        """
        inner = self._writable("copy_up", key)
        with self._locks(self._limits.budget(deadline), key):
            found = self._front_stat(key, deadline)
            if found is not None:
                return found
            try:
                return self._before(carry(self.backing, key, self.front, inner, if_absent=True, deadline=deadline))
            except Conflict:  # another process was faster
                return self._before(self.front.stat(inner, deadline=deadline))

    def push(self, key: str, *, progress: Callable[[int], None] | None = None, deadline: float | None = None) -> Stat:
        """Move an object down into the backing store: write it there, prove it, then remove it from the front.

        Readers find it at every moment; a crash leaves it in the front, or in both, and pushing again finishes it. What
        only the backing store has is down already. `deadline` in seconds, for each call. Gives the backing store's
        description. Raises NotFound, Denied, Conflict (somebody wrote it meanwhile: the front keeps that), WrongBytes.
        """
        inner = self._writable("push", key)
        with self._locks(self._limits.budget(deadline), key):
            found = self._front_stat(key, deadline)
            if found is None:
                return self._behind(self.backing.stat(key, deadline=deadline))
            there = self._backing_stat(key, deadline)
            conditional = self.backing.info().conditional_write
            stat = carry(
                self.front,
                inner,
                self.backing,
                key,
                if_absent=conditional and there is None,
                if_version=there.version if conditional and there is not None else None,
                progress=progress,
                deadline=deadline,
            )
            if self.front.stat(inner, deadline=deadline).version != found.version:
                raise Conflict(
                    f"{self.name}: push {key}: it was written meanwhile; the front keeps that, push it again"
                )
            self.front.delete(inner, deadline=deadline)
            return self._behind(stat)

    # Where a key is
    # ----------------------------------------------------------------------------------------------------------

    def _is_under(self, key: str) -> bool:
        return key.startswith(self.prefix)

    def _inner(self, key: str) -> str:
        return key[len(self.prefix) :]

    def _writable(self, operation: str, key: str, *, reading: bool = False) -> str:
        """The front's key for a change. Raises UsageError, Denied, Unreachable."""
        (keys.check_readable if reading else keys.check_writable)(key)
        self._begin(operation, key, changes=True)
        if not self._is_under(key):
            raise Denied(f"{self.name}: {operation} {key}: changes are allowed under {self.prefix} only")
        return self._inner(key)

    def _condition(
        self, key: str, if_absent: bool, if_version: str | None, deadline: float | None
    ) -> tuple[bool, str | None]:
        """The condition for the front that means the given one for both. Raises Conflict."""
        if not if_absent and if_version is None:
            return False, None
        if self._front_stat(key, deadline) is not None:
            return if_absent, if_version
        there = self._backing_stat(key, deadline)
        if if_absent and there is not None:
            raise Conflict(f"{self.name}: {key} exists already, in {self.backing.name}")
        if if_version is not None and (there is None or there.version != if_version):
            raise Conflict(f"{self.name}: {key} was changed by somebody else meanwhile")
        return True, None

    def _front_stat(self, key: str, deadline: float | None) -> Stat | None:
        if not self._is_under(key):
            return None
        try:
            return self._before(self.front.stat(self._inner(key), deadline=deadline))
        except NotFound:
            return None

    def _backing_stat(self, key: str, deadline: float | None) -> Stat | None:
        try:
            return self.backing.stat(key, deadline=deadline)
        except NotFound:
            return None

    def _front_listing(self, prefix: str, recursive: bool, deadline: float | None) -> Iterator[Stat]:
        if prefix.startswith(self.prefix):
            return map(self._before, self.front.list(self._inner(prefix), recursive=recursive, deadline=deadline))
        if recursive and self.prefix.startswith(prefix):
            return map(self._before, self.front.list(deadline=deadline))
        return iter(())

    def _before(self, stat: Stat) -> Stat:
        """The front's description, as of the whole."""
        return replace(stat, key=self.prefix + stat.key)

    def _behind(self, stat: Stat) -> Stat:
        """The backing store's description; without a checksum where `info` promises none."""
        return stat if self._checksum else replace(stat, checksum=None)
