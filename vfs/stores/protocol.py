"""What every store can do, and the values that go in and out.

Used by the push, evict, hydrate and verify code, which know stores only through `Store`, and by every module
here that implements one. Nothing in this module blocks; every method of a `Store` may block, at most for its
deadline.

Rules that hold for every store:

- Keys are `str`; `keys.py` makes them and says which are accepted. A key may be an object and a prefix of
  others at once.
- Any thread may call any method at any time.
- `deadline` is in seconds, for the whole call; None: what the store's configuration says (`limits.py`). Sizes and
  offsets are in bytes.
- Beside what each method names, every one may raise UsageError (a key or range that cannot be) and StoreError:
  StoreTimeout, Unreachable, Denied, StoreFull, or itself where the store failed in a way that has no class.
- What `write`, `upload` and `copy` put there appears whole or not at all (`Info.atomic_replace` tells where
  replacing an existing object is not atomic).
- `if_absent` with bytes that are there already, exactly the same, may succeed instead of raising Conflict (a write
  that was sent twice cannot tell its own first try from another's), and `Stat.verified` is then true.
- `upload` and `write` may put the object under another key (`Info.chooses_keys`): the caller keeps `Stat.key`.
- An engine that cannot hold an object beside objects below its name (SeaweedFS, with `if_absent`) raises Conflict
  though `stat` finds nothing: use another key.
- After `StoreTimeout` or `Unreachable` from a change, whether the store made the change is not known: ask
  with `stat`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What a store can do; the contract suite proves each claim, and the layers above ask instead of guessing.

    `broker`: the registry's name. `ranges`: `read` moves only the bytes asked for. `lists`: `list` works (a web server
    without a listing has none). `atomic_replace`: readers of an object that is replaced see the old one or the new one.
    `conditional_write`: `if_absent` and `if_version` are decided by the store itself; without it the store is for a
    single writer. `server_copy`, `server_move`: the store (its server, or the file system) does it; the bytes are not
    read and sent again. `checksum`: the kind that `Stat.checksum` can have. `max_object`: bytes an object may have,
    where the engine has a limit that is met in practice. `chooses_keys`: an upload may be answered with another key
    than the one asked for; the caller keeps `Stat.key`. A home may choose the keys of a record's contents, never that
    of a manifest; what it put outside the record's own prefixes is not removed with the record. `resumes`: an upload
    that was interrupted goes on where it was when the same bytes are uploaded to the same key. `sweeps`: interrupted
    uploads stay until `sweep` removes them.
    `exact_versions`: each replacement has another `Stat.version`; without it one that follows within the tick of the
    store's clock, with the same size, may have the same version.
    `calculates`: reading makes what is not there, which may take long and cost something: ask it last.
    """

    broker: str
    ranges: bool = True
    lists: bool = True
    atomic_replace: bool = False
    conditional_write: bool = False
    server_copy: bool = False
    server_move: bool = False
    checksum: str | None = None
    read_only: bool = False
    max_object: int | None = None
    chooses_keys: bool = False
    resumes: bool = False
    sweeps: bool = False
    calculates: bool = False
    exact_versions: bool = True


@dataclass(frozen=True, slots=True)
class Volume:
    """What has to be mounted before a broker's store can be used: `driver` as mount(8) knows it (`nfs`, ...),
    `remote_path` as the driver takes it (`host:/export`), `local_path` where it is to be."""

    driver: str
    remote_path: str
    local_path: Path


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


Arrived = Callable[[int], None]


@runtime_checkable
class Store(Protocol):
    """A place that keeps records. `name` is what people see; `url` has no secrets in it; `problems` collects
    what was found odd on the way (names in a listing that cannot be keys), each one sentence, bounded."""

    name: str
    url: str
    problems: list[str]

    @property
    def connected(self) -> bool:
        """Whether calls are accepted: true from the start, until `disconnect`. Asks nobody."""
        ...

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        """Accept calls again, with other credentials if some are given (the broker's secret options; they are
        tried at the next call). Raises ConfigError for credentials this type of store has no use for."""
        ...

    def disconnect(self) -> None:
        """Let go of what the store holds (connections, credentials given to `connect`); calls after it raise
        Unreachable. Calling it again does nothing."""
        ...

    def info(self) -> Info:
        """What this store can do; asks nobody."""
        ...

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        """Describe one object. Raises NotFound."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        """Exactly the bytes asked for; fewer only where the object ends. Raises NotFound."""
        ...

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        """Fill a writable buffer with the object's bytes from `start` on, without making another copy of them where
        the engine allows; fewer only where the object ends. The number of bytes. Raises NotFound.

        While the rest is on its way a store may call `arrived`, in this thread, with the bytes that are in the buffer
        so far. A try that failed is told by a smaller number."""
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

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        """All objects whose key starts with `prefix`, lazily, in pages; `deadline` bounds the wait for each page.
        Not `recursive`: only those with no `/` after the prefix. No order is promised."""
        ...

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        """Remove one object; no error when there is none. Objects below its name stay."""
        ...

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """Copy one object inside the store. Raises NotFound, Conflict."""
        ...

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """Give one object another key, replacing what is there. A crash may leave both, never neither. Raises
        NotFound, Conflict."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where this machine has the object as an ordinary file to be read, never written; None where it has
        none. Raises NotFound."""
        ...

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        """Remove what interrupted uploads left that nobody went on with for `older_than_s` seconds; the number
        removed. Objects are never touched."""
        ...

    def check(self) -> Check:
        """Try the store for real, with a probe object that is removed again. Never raises a StoreError."""
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

    def volume(self, config: Mapping[str, Any]) -> Volume | None:
        """What must be mounted first, or None. Raises ConfigError. Looks at nothing."""
        ...
