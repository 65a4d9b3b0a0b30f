"""What most stores do in the same way: connecting, refusing, and what can be made of the other methods.

Used by the stores in this package, and by anybody's who likes. A store that inherits from `BaseStore` gives
`info`, `stat`, `read`, `upload`, `list` and `delete`; each begins with `_begin`. Nothing here blocks but through those.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vfs.errors import ConfigError, Conflict, StoreError, Unreachable, UsageError
from vfs.stores import keys, urls
from vfs.stores.limits import Limits
from vfs.stores.probing import check_store
from vfs.stores.protocol import Arrived, Check, Info, Stat, Volume

PROBLEMS_KEPT = 100

Source = Callable[[int, int], bytes]


class BaseStore(ABC):
    """The common half of a store. `name` is what people see, `url` has no secrets in it."""

    def __init__(self, name: str, url: str, *, read_only: bool = False, limits: Limits | None = None) -> None:
        self.name = name
        self.url = url
        self.problems: list[str] = []
        self._read_only = read_only
        self._limits = limits or Limits()
        self._connected = True

    @property
    def connected(self) -> bool:
        return self._connected

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        if credentials:
            self._use(credentials)
        self._connected = True

    def disconnect(self) -> None:
        self._connected = False

    def _use(self, credentials: Mapping[str, str]) -> None:
        """Take other credentials; a store that has some overrides it. Raises ConfigError."""
        raise ConfigError(f"{self.name}: {', '.join(sorted(credentials))}: this type of store takes no credentials")

    @abstractmethod
    def info(self) -> Info: ...

    @abstractmethod
    def stat(self, key: str, *, deadline: float | None = None) -> Stat: ...

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes: ...

    @abstractmethod
    def upload(
        self,
        key: str,
        source: Source,
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat: ...

    @abstractmethod
    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]: ...

    @abstractmethod
    def delete(self, key: str, *, deadline: float | None = None) -> None: ...

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        data = self.read(key, start, len(buffer), deadline=deadline)
        buffer[: len(data)] = data
        return len(data)

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        return self.upload(
            key, from_bytes(data), len(data), if_absent=if_absent, if_version=if_version, deadline=deadline
        )

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """Through this machine: engines that can do better override it."""
        found = self.stat(source, deadline=deadline)

        def piece(offset: int, length: int) -> bytes:
            data = self.read(source, offset, length)
            if offset + length == found.size and self.stat(source, deadline=deadline).version != found.version:
                raise Conflict(f"{self.name}: copy {source}: it was replaced while it was copied; try again")
            return data

        return self.upload(target, piece, found.size, if_absent=if_absent, deadline=deadline)

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """A copy, then a delete."""
        if source == target:
            return self.stat(source, deadline=deadline)
        moved = self.copy(source, target, if_absent=if_absent, deadline=deadline)
        self.delete(source, deadline=deadline)
        return moved

    def local_path(self, key: str) -> Path | None:
        return None

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        return 0

    def check(self) -> Check:
        return check_store(self)

    # For the stores
    # ----------------------------------------------------------------------------------------------------------

    def _begin(self, operation: str, key: str = "", *, changes: bool = False) -> None:
        """Raises Unreachable after `disconnect`, Denied for a change to a store that is read-only."""
        if not self._connected:
            raise Unreachable(f"{self.name}: {operation} {key}: the store is disconnected".replace(" :", ":"))
        if changes and self._read_only:
            raise urls.read_only_error(self.name, operation)

    def _check_range(self, key: str, start: int, length: int | None) -> None:
        if start < 0 or (length is not None and length < 0):
            raise UsageError(f"{self.name}: read {key}: start and length must not be negative")

    def _check_prefix(self, prefix: str) -> None:
        reason = keys.why_not_readable(prefix.removesuffix("/")) if prefix else None
        if reason is not None:
            raise UsageError(f"{self.name}: list: the prefix {prefix!r} {reason}")

    def _note_problem(self, name: str, reason: str) -> None:
        """Remember a name that was left out of a listing, and why."""
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(f"{self.name}: left out of the listing: {name[:200]!r} {reason}")


class BaseBroker:
    """The common half of a broker."""

    schemes: tuple[str, ...] = ()
    read_only: bool = False  # every store of this type is for reading only
    calculates: bool = False  # as `Info.calculates`
    wants: frozenset[str] = frozenset()  # options that a session gives, where the configuration does not: see `Home`

    def volume(self, config: Mapping[str, Any]) -> Volume | None:
        """Nothing has to be mounted first."""
        return None


def from_bytes(data: bytes) -> Source:
    """A source for `upload` that gives these bytes."""
    view = memoryview(data)
    return lambda offset, length: bytes(view[offset : offset + length])


def take_piece(store: str, key: str, source: Source, offset: int, length: int) -> bytes:
    """A piece of an upload's source. Raises StoreError when it is not what was announced, and what `source` raises."""
    piece = source(offset, length)
    if len(piece) != length:
        raise StoreError(f"{store}: upload {key}: the file gave {len(piece)} of {length} bytes: it changed meanwhile")
    return piece


def is_wanted(key: str, prefix: str, recursive: bool) -> bool:
    """Whether a listing with this prefix has this key in it."""
    return key.startswith(prefix) and (recursive or "/" not in key[len(prefix) :])
