"""A store in memory: small, complete and real. It passes the same contract suite as the others.

Used by tests and for trying things out (`memory://name`; the same name is the same store within the process).
Blocks only where `before` does.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vfs.errors import ConfigError, Conflict, NotFound, StoreTimeout
from vfs.stores import checksums, keys, urls
from vfs.stores.base import BaseBroker, BaseStore, is_wanted, take_piece
from vfs.stores.limits import Limits, read_limits
from vfs.stores.protocol import Info, Stat


@dataclass(slots=True)
class Objects:
    """What is in a memory store; stores with the same URL share it. The lock covers both fields."""

    content: dict[str, tuple[bytes, Stat]] = field(default_factory=dict)
    changes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_SHARED: dict[str, Objects] = {}
_OPTIONS = frozenset({"read_only"})


class MemoryStore(BaseStore):
    """Objects in a dictionary. `before(operation, key)` is called ahead of each operation, outside the lock:
    it may sleep or raise, which is how tests make a store slow or broken."""

    def __init__(
        self,
        name: str = "memory",
        *,
        objects: Objects | None = None,
        read_only: bool = False,
        limits: Limits | None = None,
        before: Callable[[str, str], None] | None = None,
    ) -> None:
        super().__init__(name, f"memory://{name}", read_only=read_only, limits=limits)
        self.before = before
        self._objects = objects or Objects()

    def info(self) -> Info:
        return Info(
            broker="memory",
            atomic_replace=True,
            conditional_write=True,
            server_copy=True,
            server_move=True,
            checksum=checksums.MD5,
            read_only=self._read_only,
        )

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._get(key)[1]

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        end = None if length is None else start + length
        return self._get(key)[0][start:end]

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        self._begin("write", keys.check_writable(key), changes=True)
        return self._put(key, bytes(data), if_absent, if_version)

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
        self._begin("upload", keys.check_writable(key), changes=True)
        budget = self._limits.budget(deadline, size)
        data = bytearray()
        while len(data) < size:
            wanted = min(checksums.PART, size - len(data))
            data += take_piece(self.name, key, source, len(data), wanted)
            if progress is not None:
                progress(len(data))
            if not budget.left():
                raise StoreTimeout(f"{self.name}: upload of {key} passed its deadline of {budget.total_s:g} s")
        return self._put(key, bytes(data), if_absent, if_version)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        with self._objects.lock:
            every = sorted(self._objects.content.items())
        return iter([stat for key, (_, stat) in every if is_wanted(key, prefix, recursive)])

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._begin("delete", keys.check_readable(key), changes=True)
        with self._objects.lock:
            self._objects.content.pop(key, None)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        self._begin("copy", keys.check_writable(target), changes=True)
        return self._put(target, self._get(keys.check_readable(source))[0], if_absent, None)

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        keys.check_readable(source)
        self._begin("move", keys.check_writable(target), changes=True)
        if source == target:
            return self._get(source)[1]
        with self._objects.lock:
            found = self._objects.content.get(source)
            if found is None:
                raise NotFound(f"{self.name}: there is no {source}")
            if if_absent and target in self._objects.content:
                raise Conflict(f"{self.name}: {target} exists already")
            self._objects.changes += 1
            stat = replace(found[1], key=target, version=f"{self._objects.changes}-moved")
            self._objects.content[target] = (found[0], stat)
            del self._objects.content[source]
        return stat

    def _begin(self, operation: str, key: str = "", *, changes: bool = False) -> None:
        super()._begin(operation, key, changes=changes)
        if self.before is not None:
            self.before(operation, key)

    def _get(self, key: str) -> tuple[bytes, Stat]:
        with self._objects.lock:
            found = self._objects.content.get(key)
        if found is None:
            raise NotFound(f"{self.name}: there is no {key}")
        return found

    def _put(self, key: str, data: bytes, if_absent: bool, if_version: str | None) -> Stat:
        checksum = checksums.Checksum.of(data).value()
        with self._objects.lock:
            present = self._objects.content.get(key)
            if if_absent and present is not None:
                raise Conflict(f"{self.name}: {key} exists already")
            if if_version is not None and (present is None or present[1].version != if_version):
                raise Conflict(f"{self.name}: {key} was changed by somebody else meanwhile")
            self._objects.changes += 1
            stat = Stat(key, len(data), f"{self._objects.changes}-{checksum[1]}", time.time_ns(), checksum)
            self._objects.content[key] = (data, stat)
        return Stat(key, stat.size, stat.version, stat.modified_ns, checksum, verified=True)


class Broker(BaseBroker):
    """`memory://name`: for tests and trials. Options: `read_only`."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, _OPTIONS)
        read_limits(config)
        if not location.host or location.path:
            raise ConfigError(f"url = {location.url!r}: give memory://NAME")
        return [f"{location.url}: what is in memory is gone when the process ends; it is no home for anything"]

    def open(self, config: Mapping[str, Any]) -> MemoryStore:
        self.validate(config)
        location = urls.split(config)
        store = MemoryStore(
            config.get("name") or location.host,
            objects=_SHARED.setdefault(location.host, Objects()),
            read_only=urls.truth(config, location, "read_only"),
            limits=read_limits(config),
        )
        store.url = location.url
        return store
