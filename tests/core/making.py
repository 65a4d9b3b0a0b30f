"""Projects made by hand for the core's tests: records in format v1, an index, stores, sessions. No FUSE, no machinable.

`Place` is one project on one machine; two places with the same store URL are two hosts.
"""

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vfs.cache import CacheError, read_header
from vfs.index import Index
from vfs.manifest import CHUNK
from vfs.scan import walk
from vfs.session import Session
from vfs.settings import CacheSettings, ProofSettings, Settings, StoreSettings
from vfs.stores import Store, register
from vfs.stores.base import BaseBroker
from vfs.stores.memory import MemoryStore, Objects
from vfs.stores.observed import ObservedStore
from vfs.units import Unit

UUID = "recordAAAA01"
NESTED = "executionB01"
OLD_NS = 1_700_000_000_123_456_789


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that differ everywhere, the same for the same seed."""
    import random

    return random.Random(seed).randbytes(size)


# Small files that are kept, an empty one, large ones that go, one of several chunks, odd names.
FILES: dict[bytes, bytes] = {
    b"metrics.json": b'{"loss": 0.1}',
    b"empty": b"",
    b"weights.npy": noise(2 * CHUNK + 12345, 2),
    b"notes/by step/0.txt": b"step 0\n",
    b"notes/model.bin": noise(100_000, 3),
    b"caf\xe9 \xff.dat": noise(70_000, 4),
}


def write_record(
    directory: Path, uuid: str, files: Mapping[bytes, bytes], *, parent: str | None = None, finished: bool = True
) -> None:
    """A record directory in format v1. What it holds is old, so that nothing is too fresh for anybody."""
    directory.mkdir(parents=True)
    header = {"format": 1, "uuid": uuid, "kind": "Interface", "identity_key": "i", "predicate_key": "p"}
    model = {"uuid": uuid, "kind": "Interface", "module": "mymodel", "config": {"lr": 0.1}, "created_at_ns": OLD_NS}
    now = datetime.fromtimestamp(OLD_NS / 1e9, UTC).isoformat()
    (directory / ".machinable").touch()
    (directory / "id.json").write_text(json.dumps({**header, "parent": parent}))
    (directory / "model.json").write_text(json.dumps(model))
    (directory / "updated_at").write_text(now)
    (directory / "started_at").write_text(now)
    if finished:
        (directory / "finished_at").write_text(now)
    for name, content in files.items():
        path = os.path.join(os.fsencode(directory), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        os.utime(path, ns=(OLD_NS, OLD_NS))


def contents(directory: str | bytes | Path) -> dict[bytes, bytes]:
    """Every regular file below a directory, read as anybody reads it."""
    found = {}
    root = os.fsencode(directory)
    for top, _names, files in os.walk(root):
        for name in files:
            path = os.path.join(top, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, root)] = file.read()
    return found


@dataclass
class Place:
    """A project below `root`, with its state, cache and mountpoint (never mounted); stores by name."""

    root: Path
    stores: dict[str, str] = field(default_factory=dict)
    over: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.project.mkdir(parents=True, exist_ok=True)
        if not self.index.exists():
            Index.open(self.index, create=True).close()
        self.stores = self.stores or {"lab": (self.root / "store").as_uri()}

    @property
    def project(self) -> Path:
        return self.root / "project"

    @property
    def index(self) -> Path:
        return self.project / ".machinable.sqlite"

    def settings(self, **over: Any) -> Settings:
        given: dict[str, Any] = {
            "index": self.index,
            "stores": tuple(StoreSettings(name=name, url=url) for name, url in self.stores.items()),
            "state_dir": self.root / "state",
            "cache_dir": self.root / "cache",
            "runtime_dir": self.root / "run",
            "mountpoint": self.root / "mnt",
            "deadline_s": 5.0,
            "cache": CacheSettings(high=None, low=None),
            "proof": ProofSettings(),
        }
        return Settings(**{**given, **self.over, **over})

    def directory(self, uuid: str = UUID) -> Path:
        return self.project / "storage" / uuid

    def record(self, uuid: str = UUID, files: Mapping[bytes, bytes] = FILES, **more: Any) -> Path:
        """Write a record and index it."""
        write_record(self.directory(uuid), uuid, files, **more)
        self.ingest(self.directory(uuid))
        return self.directory(uuid)

    def ingest(self, directory: Path) -> None:
        index = Index.open(self.index)
        try:
            assert index.ingest(str(directory)) is not None
        finally:
            index.close()

    @contextmanager
    def session(self, **over: Any) -> Iterator[Session]:
        session = Session.open(self.settings(**over))
        try:
            yield session
        finally:
            session.close()

    @property
    def store(self) -> Path:
        """The directory of the file store `lab`."""
        return self.root / "store"


def unit_of(session: Session, uuid: str = UUID) -> Unit:
    return session.core.units.get(uuid)


def everything(session: Session, unit: Unit) -> dict[bytes, bytes]:
    """Every byte of a unit wherever it is, brought back through the hydrator where it is evicted."""
    if unit.evicted:
        session.evictor.hydrate(unit)
    return contents(unit.base)


def holes_below(directory: Path) -> list[bytes]:
    """Placeholders below a directory where there must never be any."""
    found = []
    for seen in walk(os.fsencode(directory)):
        if seen.kind == "file":
            try:
                header = read_header(os.path.join(os.fsencode(directory), seen.path))
            except CacheError:
                found.append(seen.path)
                continue
            if header is not None:
                found.append(seen.path)
    return found


def until(check: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so; fails when it never is."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


# --- a store that tests can look into and break --------------------------------------------------------------------


class Broken(Exception):
    """Stands for the end of the process: nothing in runfs catches it."""


class Hooked(MemoryStore):
    """A memory store that tells what is done with it. `before` may raise or sleep."""

    def __init__(self, name: str, objects: Objects) -> None:
        super().__init__(name, objects=objects, before=self._told)
        self.url = f"hooked://{name}"
        self.done: list[tuple[str, str]] = []
        self.hook: Callable[[str, str], None] = lambda _operation, _key: None
        self.guard = threading.Lock()

    def _told(self, operation: str, key: str) -> None:
        with self.guard:
            self.done.append((operation, key))
        self.hook(operation, key)

    def names(self) -> set[str]:
        return {stat.key for stat in MemoryStore(objects=self._objects).list()}

    def raw(self, key: str) -> bytes:
        return MemoryStore(objects=self._objects).read(key)

    def put(self, key: str, data: bytes) -> None:
        """Replace an object, as a fault or another tool would."""
        MemoryStore(objects=self._objects).write(key, data)

    def drop(self, key: str) -> None:
        MemoryStore(objects=self._objects).delete(key)


class HookedBroker(BaseBroker):
    """`hooked://name`; the store objects themselves are in `OPENED`."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        return []

    def open(self, config: Mapping[str, Any]) -> Store:
        host = str(config["url"]).removeprefix("hooked://")
        store = Hooked(host, OBJECTS.setdefault(host, Objects()))
        OPENED[host] = store
        return store


OBJECTS: dict[str, Objects] = {}
OPENED: dict[str, Hooked] = {}
register("hooked", HookedBroker())


def hooked(session: Session, name: str = "lab") -> Hooked:
    observed = session.core.home(name).store()
    assert isinstance(observed, ObservedStore)
    assert isinstance(observed.store, Hooked)
    return observed.store
