"""Anything that has an fsspec implementation, as a store: the bridge to storage that runfs has no broker for.

Used through `open_store("fsspec+PROTOCOL://...")`; needs the extra `fsspec` and the implementation's package. What is
after `fsspec+` is fsspec's URL; options that runfs does not know go to the implementation (its documentation has
them). Every method blocks its caller at most for its deadline. fsspec's calls cannot be ended from outside: each
runs in a thread of its own, and one that has not come back by then is left behind; whether it still does something
is not known.

fsspec promises little, so little is claimed: no conditional writes (conditions are looked at before: a store for a
single writer) and, but for the protocols known to have it, no atomic replacing. Bytes go to `.runfs.tmp/` first, so
that what is cut off is never seen under a key. Where the implementation is a file system, a key cannot be an object
and a prefix of others at once: Conflict.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from vfs.errors import (
    ConfigError,
    Conflict,
    Denied,
    NotFound,
    RunfsError,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unreachable,
)
from vfs.stores import checksums, keys, places, urls
from vfs.stores.base import BaseBroker, BaseStore, is_wanted, take_piece
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.protocol import Info, Stat

T = TypeVar("T")
Entry = Mapping[str, Any]

PREFIX = "fsspec+"
LEAST_SECRET = 6  # characters; replacing anything shorter would garble the messages
_LOCAL = frozenset({"file", "local"})
_ATOMIC = _LOCAL | {"memory"}  # a rename, and an assignment
_BLIND = frozenset({"memory"})  # takes what is below a file, and does not list it
_TIMES = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")
_MARKS = ("ETag", "etag", "version_id", "generation", "uid", "ino")
_BLOCKED = (FileExistsError, IsADirectoryError, NotADirectoryError)


class FsspecStore(BaseStore):
    """A directory of an fsspec file system. Made by `Broker.open`. `files` is the implementation, `root` the
    directory as it takes it."""

    def __init__(
        self,
        files: Any,
        root: str,
        *,
        name: str,
        url: str,
        read_only: bool = False,
        limits: Limits | None = None,
        secrets: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, url, read_only=read_only, limits=limits)
        self._files = files
        self._root = root.rstrip("/")
        self._secrets = secrets
        protocol = files.protocol
        self._protocols = frozenset([protocol] if isinstance(protocol, str) else protocol)
        self._copies = _has_own(files, "cp_file")

    def info(self) -> Info:
        return Info(
            broker="fsspec",
            atomic_replace=bool(self._protocols & _ATOMIC),
            server_copy=self._copies,
            read_only=self._read_only,
            sweeps=True,
            exact_versions=False,
        )

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._stat("stat", key, self._limits.budget(deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        size = self._stat("read", key, self._limits.budget(deadline)).size
        end = size if length is None else min(size, start + length)
        budget = self._limits.budget(deadline, max(0, end - start))
        if start >= end:
            return b""
        data = self._call("read", key, budget, lambda: self._files.cat_file(self._path(key), start=start, end=end))
        if len(data) != end - start:
            raise StoreError(f"{self.name}: read {key}: {len(data)} of {end - start} bytes came; read it again")
        return bytes(data)

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
        self._check(key, if_absent, if_version, budget)
        temporary = self._temporary()
        try:
            self._fill(temporary, key, source, size, progress, budget)
            self._check(key, if_absent, if_version, budget)
            self._publish(temporary, key, budget)
        except BaseException:
            self._discard(temporary)
            raise
        stat = self._stat("upload", key, budget)
        if stat.size != size:
            raise StoreError(f"{self.name}: upload {key}: the store has {stat.size} of {size} bytes; push it again")
        return stat

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        todo = [prefix[: prefix.rfind("/") + 1].rstrip("/")]
        while todo:
            directory = todo.pop()
            for found in self._entries(directory, self._limits.budget(deadline)):
                key = self._key(found)
                if not key or key == directory or key.split("/", 1)[0] in places.HIDDEN:
                    continue
                if found.get("type") == "directory":
                    if (recursive and (key + "/").startswith(prefix)) or prefix.startswith(key + "/"):
                        todo.append(key)
                elif is_wanted(key, prefix, recursive):
                    yield from self._listed(key, found)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._begin("delete", keys.check_readable(key), changes=True)
        budget = self._limits.budget(deadline)
        with suppress(NotFound):
            self._stat("delete", key, budget)  # a directory is no object: never removed
            self._call("delete", key, budget, lambda: self._files.rm_file(self._path(key)))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """As the protocol says; by the implementation where it can copy."""
        keys.check_readable(source)
        self._begin("copy", keys.check_writable(target), changes=True)
        found = self._stat("copy", source, self._limits.budget(deadline))
        if not self._copies or source == target:
            return super().copy(source, target, if_absent=if_absent, deadline=deadline)
        budget = self._limits.budget(deadline, found.size)
        self._check(target, if_absent, None, budget)
        temporary = self._temporary()
        try:
            self._make_parent(temporary, target, budget)
            self._call("copy", source, budget, lambda: self._files.cp_file(self._path(source), self._path(temporary)))
            self._publish(temporary, target, budget)
        except BaseException:
            self._discard(temporary)
            raise
        return self._stat("copy", target, budget)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        self._begin("sweep", "", changes=True)
        budget = self._limits.budget(deadline)
        removed = 0
        for found in self._entries(places.TEMPORARY, budget):
            changed = _modified(found)
            if changed is not None and time.time() - changed / 1e9 > older_than_s:
                self._call("sweep", "", budget, partial(self._files.rm_file, found["name"]))
                removed += 1
        return removed

    # Steps
    # ----------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root or "/"

    def _key(self, found: Mapping[str, Any]) -> str:
        """The key of an entry; empty for what is not below the root."""
        name = str(found.get("name", "")).rstrip("/")
        start = self._root + "/"
        return name[len(start) :] if name.startswith(start) else ""

    def _entries(self, directory: str, budget: Budget) -> Sequence[Entry]:
        def ask() -> Sequence[Entry]:
            self._files.invalidate_cache()
            return tuple(self._files.ls(self._path(directory), detail=True))

        try:
            return self._call("list", directory, budget, ask)
        except NotFound:
            return ()

    def _listed(self, key: str, found: Mapping[str, Any]) -> Iterator[Stat]:
        reason = keys.why_not_readable(key)
        if reason is None and found.get("type") != "file":
            reason = "is no regular file"
        if reason is None:
            yield self._described(key, found)
        else:
            self._note_problem(key, reason)

    def _stat(self, operation: str, key: str, budget: Budget) -> Stat:
        def ask() -> dict[str, Any]:
            self._files.invalidate_cache()
            found: dict[str, Any] = self._files.info(self._path(key))
            return found

        try:
            found = self._call(operation, key, budget, ask)
        except Conflict:  # something above it is a file
            found = {}
        if found.get("type") != "file":
            raise NotFound(f"{self.name}: {operation} {key}: there is no such object")
        return self._described(key, found)

    def _described(self, key: str, found: Mapping[str, Any]) -> Stat:
        size = int(found.get("size") or 0)
        changed = _modified(found)
        mark = next((str(found[each]) for each in _MARKS if found.get(each) is not None), "")
        return Stat(key, size, f"{mark}-{changed}-{size}", changed, None)

    def _check(self, key: str, if_absent: bool, if_version: str | None, budget: Budget) -> None:
        if not if_absent and if_version is None:
            return
        try:
            present: str | None = self._stat("stat", key, budget).version
        except NotFound:
            present = None
        if (if_absent and present is not None) or (if_version is not None and present != if_version):
            raise Conflict(f"{self.name}: {key}: it is there already, or was changed meanwhile")

    def _fill(
        self,
        temporary: str,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> None:
        self._make_parent(temporary, key, budget)
        file = self._call("upload", key, budget, lambda: self._files.open(self._path(temporary), "wb"))
        try:
            for offset in range(0, size, checksums.PART):
                piece = take_piece(self.name, key, source, offset, min(checksums.PART, size - offset))
                self._call("upload", key, budget, partial(file.write, piece))
                if progress is not None:
                    progress(offset + len(piece))
        finally:
            self._call("upload", key, budget, file.close)

    def _publish(self, temporary: str, key: str, budget: Budget) -> None:
        source, target = self._path(temporary), self._path(key)

        def move() -> None:
            if self._files.isdir(target):
                raise IsADirectoryError(errno.EISDIR, "is a directory", key)
            if self._protocols & _BLIND and any(map(self._files.isfile, self._parents(key))):
                raise NotADirectoryError(errno.ENOTDIR, "is below a file", key)
            if self._copies and not self._protocols & _LOCAL:
                self._files.cp_file(source, target)
                self._files.rm_file(source)
            else:
                self._files.mv(source, target)

        self._make_parent(key, key, budget)
        self._call("write", key, budget, move)

    def _make_parent(self, path: str, key: str, budget: Budget) -> None:
        parent = self._path(path).rpartition("/")[0]
        if parent:
            self._call("write", key, budget, lambda: self._files.makedirs(parent, exist_ok=True))

    def _parents(self, key: str) -> Sequence[str]:
        parts = key.split("/")
        return [self._path("/".join(parts[:depth])) for depth in range(1, len(parts))]

    @staticmethod
    def _temporary() -> str:
        return f"{places.TEMPORARY}/{os.getpid()}-{os.urandom(8).hex()}"

    def _discard(self, temporary: str) -> None:
        """Remove what a failed upload leaves, in the background: the first error is the one to report."""

        def remove() -> None:
            with suppress(Exception):  # whatever the implementation raises; `sweep` comes by
                self._files.rm_file(self._path(temporary))

        thread = threading.Thread(target=remove, name="runfs-fsspec", daemon=True)
        thread.start()
        thread.join(1.0)

    def _call(self, operation: str, key: str, budget: Budget, work: Callable[[], T]) -> T:
        """What `work` gives, from a thread of its own. Raises our errors; StoreTimeout when it does not end in time."""
        ended = threading.Event()
        result: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:  # goes to the caller's thread
                failure.append(error)
            ended.set()

        threading.Thread(target=run, name="runfs-fsspec", daemon=True).start()
        if not ended.wait(budget.left()):
            raise StoreTimeout(f"{self.name}: {operation} {key}: no end within {budget.total_s:g} s; is it reachable?")
        if failure:
            raise self._explained(failure[0], operation, key) from failure[0]
        return result[0]

    def _explained(self, error: BaseException, operation: str, key: str) -> BaseException:
        what = f"{self.name}: {operation} {key}".rstrip()
        if isinstance(error, RunfsError) or not isinstance(error, Exception):
            return error
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{what}: there is no such object")
        if isinstance(error, _BLOCKED):
            return Conflict(f"{what}: a directory or file of another key is in its place; use another key")
        if isinstance(error, NotImplementedError):
            return StoreError(f"{what}: fsspec's {'/'.join(sorted(self._protocols))} cannot do that; use another store")
        text = self._without_secrets(" ".join(str(error).split()) or type(error).__name__)
        if isinstance(error, PermissionError):
            return Denied(f"{what}: {text}; check the credentials and who owns it")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"{what}: {text}; make room there or use another store")
        if isinstance(error, TimeoutError | ConnectionError):
            return Unreachable(f"{what}: {text}; is it up and reachable?")
        return StoreError(f"{what}: {type(error).__name__}: {text}")

    def _without_secrets(self, text: str) -> str:
        for each in self._secrets:
            text = text.replace(each, "***")
        return text


def _has_own(files: Any, method: str) -> bool:
    """Whether an implementation has a method of its own, not fsspec's placeholder."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    if isinstance(files, AsyncFileSystem):
        return getattr(type(files), "_" + method) is not getattr(AsyncFileSystem, "_" + method, None)
    return getattr(type(files), method) is not getattr(AbstractFileSystem, method)


def _modified(found: Mapping[str, Any]) -> int | None:
    """When it was changed, in ns, as far as the implementation says."""
    given = next((found[each] for each in _TIMES if found.get(each) is not None), None)
    if isinstance(given, str):
        with suppress(ValueError):
            given = datetime.fromisoformat(given)
    if isinstance(given, datetime):
        given = given if given.tzinfo is not None else given.replace(tzinfo=UTC)
        return int(given.timestamp()) * 10**9 + given.microsecond * 1000
    return round(given * 1e6) * 1000 if isinstance(given, int | float) else None  # a float has no more than that


class Broker(BaseBroker):
    """`fsspec+PROTOCOL://...`: any fsspec implementation. Options: `read_only`; all others go to the implementation."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        read_limits(config)
        self._implementation(location)
        return [f"{location.url}: fsspec has no conditional writes: push to it from one machine only"]

    def open(self, config: Mapping[str, Any]) -> FsspecStore:
        location = urls.split(config)
        made = self._implementation(location)
        known = urls.COMMON | {"read_only"}
        options = {key: value for key, value in {**location.query, **config}.items() if key not in known}
        protocol = location.scheme.removeprefix(PREFIX)
        secrets = [str(value) for key, value in options.items() if urls.is_secret(key)]
        try:
            files = made(**options)
            root = files._strip_protocol(f"{protocol}://{location.host}/{location.path}".rstrip("/"))
        except Exception as error:  # the implementation's own complaint about its options
            text = str(error)
            for each in secrets:
                text = text.replace(each, "***")
            raise ConfigError(f"url {location.url}: fsspec's {protocol} does not take these options: {text}") from None
        return FsspecStore(
            files,
            root,
            name=str(config.get("name") or location.host or location.path.rsplit("/", 1)[-1] or protocol),
            url=location.url,
            read_only=urls.truth(config, location, "read_only"),
            limits=read_limits(config),
            secrets=tuple(each for each in secrets if len(each) >= LEAST_SECRET),
        )

    def _implementation(self, location: urls.Location) -> Any:
        """fsspec's class for the URL's protocol. Raises ConfigError."""
        protocol = location.scheme.removeprefix(PREFIX)
        if not location.scheme.startswith(PREFIX) or not protocol:
            raise ConfigError(f"url = {location.url!r}: give fsspec+PROTOCOL://..., such as fsspec+memory://name")
        if not location.host and not location.path:
            raise ConfigError(f"url = {location.url!r}: name a directory, so that nothing beside it is touched")
        try:
            import fsspec
        except ImportError:
            raise ConfigError(f"url {location.url}: fsspec is not installed; pip install 'runfs[fsspec]'") from None
        try:
            return fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            raise ConfigError(f"url {location.url}: fsspec's {protocol} needs another package: {error}") from None
        except ValueError:
            raise ConfigError(f"url {location.url}: fsspec has no implementation called {protocol}") from None
