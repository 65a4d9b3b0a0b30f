"""What every store can do, and the values that go in and out.

Used by the push, evict, hydrate and verify code, which know stores only through `Store`, and by every module
here that implements one. Nothing in this module blocks; every method of a `Store` may block, at most for its
deadline.

Rules that hold for every store:

- Keys are `str`; `keys.py` makes them and says which are accepted. A key may be an object and a prefix of
  others at once.
- Any thread may call any method at any time.
- What `write`, `upload` and `copy` put there appears whole or not at all (`Info.atomic_replace` tells where
  replacing an existing object is not atomic).
- `if_absent` with bytes that are there already, exactly the same, may succeed instead of raising Conflict (a write
  that was sent twice cannot tell its own first try from another's), and `Stat.verified` is then true.
- An engine that cannot hold an object beside objects below its name (SeaweedFS, with `if_absent`) raises Conflict
  though `stat` finds nothing: use another key.
- After `StoreTimeout` or `Unreachable` from a change, whether the store made the change is not known: ask
  with `stat`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Stat:
    """One object as the store describes it.

    `size` in bytes. `version` changes with each replacement (S3: the ETag). `modified_ns` since the epoch, by
    the store's clock, often in whole seconds. `checksum` is what the *store* computed over the content:
    `("md5", hex)` over all of it, or `("md5-parts", "hex-N")` (see `checksums.py`). An equal checksum proves;
    a different one only means that nothing is proven. `verified`: in the answer to a write or upload, the
    store's checksum was compared with the bytes that were sent, and is equal.
    """

    key: str
    size: int
    version: str | None
    modified_ns: int | None
    checksum: tuple[str, str] | None
    verified: bool = False


@dataclass(frozen=True, slots=True)
class Info:
    """What a store can do. `broker`: the registry's name. `conditional_write`: `if_absent` and `if_version`
    are decided by the store itself; without it the store is for a single writer. `checksum`: the kind that
    `Stat.checksum` can have."""

    broker: str
    ranges: bool
    conditional_write: bool
    atomic_replace: bool
    server_copy: bool
    checksum: str | None
    read_only: bool


@dataclass(slots=True)
class Check:
    """What trying a store for real found. Seconds; `clock_skew_s` is the store's clock minus ours.
    `conditional`: a second write of the probe with `if_absent` was refused, as it must be; None when that
    could not be tried."""

    reachable: bool = False
    readable: bool = False
    writable: bool = False
    conditional: bool | None = None
    latency_s: float | None = None
    clock_skew_s: float | None = None
    problems: list[str] = field(default_factory=list)


@runtime_checkable
class Store(Protocol):
    """A place that keeps records. `name` is what people see; `url` has no secrets in it; `problems` collects
    what was found odd on the way (names in a listing that cannot be keys), each one sentence, bounded."""

    name: str
    url: str
    problems: list[str]

    def info(self) -> Info:
        """What this store can do; asks nobody."""
        ...

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        """Describe one object. Raises NotFound."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        """Exactly the bytes asked for; fewer only where the object ends. Raises NotFound."""
        ...

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        """Make or replace one object. Raises Conflict when a condition does not hold."""
        ...

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
        """Stream `size` bytes; `source(offset, length)` gives them in order and is called in the caller's
        thread. `progress` gets the bytes handed over so far. Memory stays bounded. A failed upload leaves
        nothing visible. Raises Conflict."""
        ...

    def list(self, prefix: str = "", *, deadline: float | None = None) -> Iterator[Stat]:
        """All objects whose key starts with `prefix`, lazily; `deadline` bounds the wait for each page. No
        order is promised."""
        ...

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        """Remove one object; no error when there is none."""
        ...

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """Copy one object inside the store. Raises NotFound, Conflict."""
        ...

    def check(self) -> Check:
        """Try the store for real, with a probe object that is removed again. Never raises a StoreError."""
        ...

    def close(self) -> None:
        """Let go of what the store holds; calls after it are refused."""
        ...


@runtime_checkable
class Broker(Protocol):
    """A named type of store: the registry's unit. `schemes` are the URL schemes it takes besides its own
    name."""

    schemes: tuple[str, ...]

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        """Warnings about a configuration. Raises ConfigError naming the key that is wrong. Opens no
        connection."""
        ...

    def open(self, config: Mapping[str, Any]) -> Store:
        """A store for a validated configuration. Raises ConfigError, Unreachable."""
        ...
