"""Files in a Globus collection: `globus://COLLECTION/path`, brought and sent by way of a collection of this machine.

Used through `open_store`. Globus moves whole files between collections: an upload is written into a staging directory
that the local collection (Globus Connect Personal, or a server's) shows, and sent from there; a read brings the file
into that directory once and is answered from it (`staging.py`). Blocks until the task has
ended, at most for the deadline. Tasks are queued by Globus and take seconds at least: this is a store for large files.

An upload goes to a temporary name in `.runfs.tmp/` of the collection and is then renamed. Whether a rename replaces an
existing file is the collection's to decide; where it does not, the old file is set aside first, so for a moment there
is none, and a crash then leaves it in `.runfs.tmp/`. There are no conditions: one writer.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from vfs.errors import ConfigError, Conflict, Denied, NotFound, StoreError, StoreTimeout
from vfs.stores import keys, urls
from vfs.stores.base import BaseBroker, BaseStore, Source, is_wanted
from vfs.stores.directory import explain
from vfs.stores.globus.service import Login, Service, require_sdk
from vfs.stores.globus.staging import Staging
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.protocol import Info, Stat

TEMPORARY = ".runfs.tmp"
_ASIDE = "old-"
DEADLINE_S = 300.0  # a task waits in a queue before it begins
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_CREDENTIALS = ("client_id", "client_secret", "refresh_token")
_OPTIONS = frozenset({*_CREDENTIALS, "local_endpoint", "local_directory", "local_path", "data_access", "read_only"})


class GlobusStore(BaseStore):
    """`root`: the collection and the path below which keys are. `local`: this machine's collection, which shows the
    staging directory."""

    def __init__(
        self,
        name: str,
        url: str,
        root: tuple[str, str],
        local: str,
        staging: Staging,
        login: Login,
        *,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(name, url, read_only=read_only, limits=limits or Limits(deadline_s=DEADLINE_S))
        self._collection, self._root = root
        self._local = local
        self._staging = staging
        self._login = login
        self._made: set[str] = set()  # directories known to be there
        self._service = self._new_service()

    def _new_service(self) -> Service:
        return Service(self.name, self._login, timeout_s=min(30.0, self._limits.deadline_s))

    def disconnect(self) -> None:
        super().disconnect()
        self._service.close()

    def _use(self, credentials: Mapping[str, str]) -> None:
        unknown = sorted(set(credentials) - set(_CREDENTIALS))
        if unknown:
            raise ConfigError(f"{self.name}: {unknown[0]}: no credential of Globus; give {', '.join(_CREDENTIALS)}")
        self._login = replace(self._login, **credentials)  # type: ignore[arg-type]
        self._service.close()
        self._service = self._new_service()

    def info(self) -> Info:
        return Info(broker="globus", ranges=False, server_move=True, read_only=self._read_only, sweeps=True)

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._stat(key)

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        found = self._stat(key)
        wanted = max(0, found.size - start)
        wanted = wanted if length is None else min(length, wanted)
        if not wanted:
            return b""
        budget = self._limits.budget(deadline, found.size)

        def bring(incoming: Path) -> None:
            there = (self._local, self._staging.called(incoming))
            self._service.transfer((self._collection, self._path(key)), there, budget)

        try:
            with open(self._staging.brought(found, bring), "rb") as file:
                return os.pread(file.fileno(), wanted, start)
        except OSError as error:
            raise explain(error, self.name, "read", key) from error

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
    ) -> Stat:
        self._begin("upload", keys.check_writable(key), changes=True)
        budget = self._limits.budget(deadline, size)
        self._check(key, if_absent, if_version)
        with self._staging.filled(key, source, size, progress) as staged:
            self._send(staged, key, if_absent, if_version, budget)
        try:
            found = self._stat(key)
        except NotFound:
            raise self._changed(key) from None
        if found.size != size:
            raise StoreError(f"{self.name}: upload {key}: {size} bytes were sent, the collection shows {found.size}")
        return found

    def _send(self, staged: Path, key: str, if_absent: bool, if_version: str | None, budget: Budget) -> None:
        temporary = self._temporary(staged.name)
        self._make_parents(f"{TEMPORARY}/x")
        try:
            there = (self._local, self._staging.called(staged))
            self._service.transfer(there, (self._collection, temporary), budget)
            self._check(key, if_absent, if_version)  # it took a while
            self._rename(temporary, key, budget)
        except BaseException:
            with suppress(StoreError):  # a sweep finds it otherwise
                self._service.remove(self._collection, temporary, self._limits.budget(5.0))
            raise

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        top = prefix.rpartition("/")[0]
        try:
            yield from self._walk(top, prefix, recursive)
        except NotFound:
            return

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._begin("delete", keys.check_readable(key), changes=True)
        try:
            self._stat(key)  # a directory is no object
        except NotFound:
            return
        self._service.remove(self._collection, self._path(key), self._limits.budget(deadline))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        self._begin("move", keys.check_readable(source), changes=True)
        keys.check_writable(target)
        found = self._stat(source)
        if source == target:
            return found
        self._check(target, if_absent, None)
        self._rename(self._path(source), target, self._limits.budget(deadline))
        return self._stat(target)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        """Remove staged files here, and temporary ones in the collection, that are so old. An older version
        that was set aside may be the only one, so it stays, and is named in `problems`."""
        self._begin("sweep", changes=True)
        budget = self._limits.budget(deadline)
        count = self._staging.remove(older_than_s)
        try:
            left = [entry for entry in self._service.entries(self._collection, self._temporary("")) if _is_file(entry)]
        except NotFound:
            return count
        for entry in left:
            if str(entry["name"]).startswith(_ASIDE):
                self._note_problem(
                    f"{TEMPORARY}/{entry['name']}", "was set aside when something interrupted its change"
                )
            elif time.time() - (_modified_ns(entry) or 0) / 1e9 >= older_than_s:
                self._service.remove(self._collection, self._temporary(str(entry["name"])), budget)
                count += 1
        return count

    # --- the collection ------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root or "/"

    def _temporary(self, name: str) -> str:
        return self._path(f"{TEMPORARY}/{name}")

    def _stat(self, key: str) -> Stat:
        entry = self._service.stat(self._collection, self._path(key))
        if not _is_file(entry):
            raise NotFound(f"{self.name}: {key} is no file")
        return _described(key, entry)

    def _check(self, key: str, if_absent: bool, if_version: str | None) -> None:
        """Look before the work; Globus itself knows no conditions."""
        if not if_absent and if_version is None:
            return
        try:
            version = self._stat(key).version
        except NotFound:
            version = None
        if if_absent and version is not None:
            raise Conflict(f"{self.name}: {key} exists already")
        if if_version is not None and version != if_version:
            raise self._changed(key)

    def _changed(self, key: str) -> Conflict:
        return Conflict(f"{self.name}: {key} was changed by somebody else meanwhile")

    def _walk(self, top: str, prefix: str, recursive: bool) -> Iterator[Stat]:
        for entry in self._service.entries(self._collection, self._path(top)):
            name = str(entry.get("name"))
            key = f"{top}/{name}" if top else name
            reason = "is a link" if entry.get("link_target") else keys.why_not_readable(key)
            if key == TEMPORARY:
                continue
            if reason is None and "/" in name:
                reason = "has a slash in a name"
            if reason is not None:
                self._note_problem(key, reason)
            elif entry.get("type") == "dir":
                if recursive and (f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")):
                    yield from self._walk(key, prefix, recursive)
            elif entry.get("type") == "file" and is_wanted(key, prefix, recursive):
                yield _described(key, entry)

    def _rename(self, path: str, key: str, budget: Budget) -> None:
        """Give a file its name, in the place of what is there."""
        self._make_parents(key)
        target = self._path(key)
        try:
            self._service.rename(self._collection, path, target)
            return
        except (Denied, NotFound, StoreTimeout):
            raise
        except StoreError as error:  # what a collection says of a name that is taken differs
            self._stat_or_raise(key, error)
        aside = self._temporary(f"{_ASIDE}{os.urandom(8).hex()}-{key.replace('/', '+')[:200]}")
        try:
            self._service.rename(self._collection, target, aside)
        except NotFound:
            raise self._changed(key) from None
        try:
            self._service.rename(self._collection, path, target)
        except Conflict:  # somebody else's file came in its place
            raise self._changed(key) from None
        except StoreError:
            self._service.rename(self._collection, aside, target)
            raise
        self._service.remove(self._collection, aside, budget)

    def _stat_or_raise(self, key: str, error: StoreError) -> None:
        """Whether the rename failed because a file is in its place; what else is there is a conflict."""
        try:
            self._stat(key)
        except NotFound:
            raise Conflict(
                f"{self.name}: {key} cannot have its name: {error}; is a file or a directory in its way?"
            ) from error

    def _make_parents(self, key: str) -> None:
        parts = key.split("/")[:-1]
        for count in range(len(parts) + 1):
            path = self._path("/".join(parts[:count]))
            if path not in self._made and path not in ("/", "/~"):
                self._service.mkdir(self._collection, path)
                self._made.add(path)


def _is_file(entry: Mapping[str, Any]) -> bool:
    return entry.get("type") == "file" and not entry.get("link_target")


def _described(key: str, entry: Mapping[str, Any]) -> Stat:
    size = entry.get("size")
    if not isinstance(size, int) or size < 0:
        raise StoreError(f"the collection says that {key} has {size!r} bytes")
    return Stat(key, size, f"{entry.get('last_modified')}-{size}", _modified_ns(entry), None)


def _modified_ns(entry: Mapping[str, Any]) -> int | None:
    try:
        return int(datetime.fromisoformat(str(entry.get("last_modified"))).timestamp() * 1e9)
    except (ValueError, OverflowError):
        return None


class Broker(BaseBroker):
    """`globus://COLLECTION_UUID/path`. Options: `local_endpoint`, this machine's collection; `local_directory`, an
    existing directory here that it shows (files are staged in it); `local_path`, how it calls that, where that differs;
    `data_access`, ask for that consent with a client's login; `client_id` with `client_secret` or `refresh_token`."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, _OPTIONS)
        read_limits(config)
        if not _UUID.fullmatch(location.host):
            raise ConfigError(f"url = {location.url!r}: give globus://UUID-OF-THE-COLLECTION/path")
        local = urls.option(config, location, "local_endpoint")
        if not isinstance(local, str) or not _UUID.fullmatch(local):
            raise ConfigError("local_endpoint: give the UUID of this machine's collection (`globus endpoint local-id`)")
        directory = urls.option(config, location, "local_directory")
        if not isinstance(directory, str) or not os.path.isabs(directory):
            raise ConfigError("local_directory: give the full path of a directory that local_endpoint shows")
        urls.truth(config, location, "read_only")
        _login(config, location)
        require_sdk()
        return [
            f"{location.url}: no conditional writes: push from one machine only; a read brings the whole file, and "
            "tasks wait in a queue: give it a deadline_s of some minutes"
        ]

    def open(self, config: Mapping[str, Any]) -> GlobusStore:
        self.validate(config)
        location = urls.split(config)
        local = str(urls.option(config, location, "local_endpoint"))
        directory = str(urls.option(config, location, "local_directory")).rstrip("/")
        called = str(urls.option(config, location, "local_path") or directory).rstrip("/")
        name = str(config.get("name") or "globus")
        limits = read_limits(config)
        if config.get("deadline_s") is None:
            limits = replace(limits, deadline_s=DEADLINE_S)
        return GlobusStore(
            name,
            location.url,
            (location.host, f"/{location.path}" if location.path else ""),
            local,
            Staging(name, Path(directory) / ".runfs-staging", f"{called}/.runfs-staging"),
            _login(config, location),
            read_only=urls.truth(config, location, "read_only"),
            limits=limits,
        )


def _login(config: Mapping[str, Any], location: urls.Location) -> Login:
    """Who asks, from the configuration or the environment, never from the URL."""
    found = {key: config.get(key) or os.environ.get(f"GLOBUS_{key.upper()}") for key in _CREDENTIALS}
    if not found["client_id"]:
        raise ConfigError(
            "client_id: set it, or GLOBUS_CLIENT_ID, to an application of app.globus.org/settings/developers"
        )
    if not found["client_secret"] and not found["refresh_token"]:
        raise ConfigError(
            "client_secret, refresh_token: set one of them, or GLOBUS_CLIENT_SECRET, GLOBUS_REFRESH_TOKEN"
        )
    asks = urls.truth(config, location, "data_access")
    collections = (location.host, str(urls.option(config, location, "local_endpoint"))) if asks else ()
    return Login(str(found["client_id"]), found["client_secret"], found["refresh_token"], collections)
