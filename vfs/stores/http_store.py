"""A store for reading only, on any web server: `https://host/directory`.

Used through `open_store`. Blocks its caller, at most for the call's deadline and a moment (`http_requests.py`).

- `pattern` says how a key becomes an address below the URL: `{key}`, or its first part `{uuid}` and the rest `{path}`;
  the URL itself may have them: `https://host/data/{uuid}/{path}`.
- `listing = "json"`: directories answer with JSON as nginx's `autoindex_format json` or Caddy's `file_server browse`.
  Without that there is no listing, and only what is known by name can be read.

An answer is believed only when all of it agrees: a range has to be the one asked for, a body as long as announced, and
all ranges of one object of the same version (the one last seen), or the read fails. Names in a listing that lead
elsewhere are never followed. Nothing is ever taken from the listing but names and times and sizes.
"""

import base64
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from vfs.errors import ConfigError, NotFound, RunfsError, StoreError, Unreachable
from vfs.stores import keys, urls
from vfs.stores.base import BaseBroker, BaseStore, is_wanted
from vfs.stores.http_requests import Client, Reply, short
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.protocol import Check, Info, Stat

LISTING_LIMIT = 64 * 1024 * 1024  # bytes of one directory's listing
SEEN = 10_000  # objects whose version is remembered
SKIPPED = 64 * 1024  # bytes of a body that is of no interest, taken so that the connection can be kept
_OPTIONS = frozenset({"username", "password", "token", "listing", "pattern", "read_only"})
_SECRETS = frozenset({"username", "password", "token"})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = frozenset({"key", "uuid", "path"})

Entries = list[dict[str, Any]]


class HttpStore(BaseStore):
    """Files behind a web server. Made by `Broker.open`. `base` ends without a slash."""

    def __init__(
        self,
        name: str,
        base: str,
        pattern: str = "{key}",
        *,
        lists: bool = False,
        credentials: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(name, base, read_only=True, limits=limits)
        self._base = base
        self._pattern = pattern
        self._lists = lists
        self._configured = dict(credentials or {})
        self._seen: OrderedDict[str, tuple[str | None, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._open(self._configured)

    def info(self) -> Info:
        return Info(broker="http", lists=self._lists, read_only=True, exact_versions=False)

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        if not self.connected and not credentials:
            self._open(self._configured)
        super().connect(credentials)

    def disconnect(self) -> None:
        super().disconnect()
        self._client.close()

    def _use(self, credentials: Mapping[str, str]) -> None:
        wrong = sorted(credentials.keys() - _SECRETS)
        if wrong:
            raise ConfigError(f"{self.name}: {wrong[0]}: not a credential of an http store")
        self._open({**self._configured, **credentials})

    def _open(self, credentials: Mapping[str, str]) -> None:
        self._client = Client(self.name, self._limits, _authorization(credentials), list(credentials.values()))

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._stat(key, self._limits.budget(deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        budget = self._limits.budget(deadline, length or 0)
        if length == 0 or (length is None and deadline is None):
            size = self._stat(key, budget).size  # how long it may take depends on how much it is
            if length == 0 or start >= size:
                return b""
            budget = self._limits.budget(deadline, size - start)
        asked = {} if not start and length is None else {"Range": _asked(start, length)}

        def handle(reply: Reply) -> bytes:
            return self._received(reply, key, start, length)

        return self._client.run(("read", key), "GET", self._address(key), handle, budget, headers=lambda: asked)

    def upload(self, key: str, *_: Any, **__: Any) -> Stat:
        self._begin("upload", keys.check_writable(key), changes=True)
        raise AssertionError("a store for reading only")

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._begin("delete", key, changes=True)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        self._begin("copy", target, changes=True)
        raise AssertionError("a store for reading only")

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        self._begin("move", target, changes=True)
        raise AssertionError("a store for reading only")

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        """As the protocol says. Raises StoreError where the server has no listing."""
        self._begin("list", prefix)
        self._check_prefix(prefix)
        if not self._lists:
            raise StoreError(f'{self.name}: there is no listing; if the server gives one as JSON, say listing = "json"')
        waiting = [prefix[: prefix.rfind("/") + 1]]
        while waiting:
            here = waiting.pop()
            for entry in self._entries(here, self._limits.budget(deadline)):
                key, below = named(here, entry, self._note_problem)
                if key is None:
                    continue
                if below and recursive and (f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")):
                    waiting.append(f"{key}/")
                elif not below and is_wanted(key, prefix, recursive):
                    stat = listed(key, entry, self._note_problem)
                    if stat is not None:
                        yield stat

    def check(self) -> Check:
        """As the protocol says; without a listing, whether the server answers at all."""
        if self._lists:
            return super().check()
        result = Check()
        began = time.monotonic()
        try:
            address = f"{self._base}/"
            self._client.run(("check", ""), "HEAD", address, lambda reply: reply.status, self._limits.budget(None))
            result.reachable = True
            result.latency_s = time.monotonic() - began
        except NotFound:
            result.reachable = True
        except RunfsError as error:
            result.problems.append(str(error))
            return result
        result.problems.append(f"{self.name} is read-only, and has no listing: what it holds cannot be looked at")
        return result

    # Objects
    # ----------------------------------------------------------------------------------------------------------

    def _address(self, key: str) -> str:
        uuid, _, path = key.partition("/")
        values = {"key": key, "uuid": uuid, "path": path}
        if not path and "{path}" in self._pattern:
            raise NotFound(f"{self.name}: {key}: there is no such object (the pattern wants UUID/PATH)")
        return f"{self._base}/" + _FIELD.sub(lambda found: quote(values[found[1]], safe="/"), self._pattern)

    def _stat(self, key: str, budget: Budget) -> Stat:
        what = ("stat", key)

        def handle(reply: Reply) -> Stat:
            if reply.status != 200:
                raise self._client.failure(what, reply)
            size = reply.length()
            if size is None or reply.header("Content-Encoding") not in (None, "identity"):
                raise StoreError(f"{self.name}: stat {key}: the server does not tell its size: it cannot be used")
            version = _version(reply)
            self._remember(key, version, size)
            modified = _time(reply.header("Last-Modified"))
            return Stat(key, size, version or f"{modified}-{size}", modified, None)

        return self._client.run(what, "HEAD", self._address(key), handle, budget)

    def _received(self, reply: Reply, key: str, start: int, length: int | None) -> bytes:
        """The bytes of an answer to a read."""
        what = ("read", key)
        if reply.status == 416:
            reply.body(SKIPPED)
            total = (reply.header("Content-Range") or "").rpartition("/")[2]
            if total.isascii() and total.isdigit() and start < int(total):
                raise StoreError(f"{self.name}: read {key}: the server refuses a range that it says it has")
            return b""
        if reply.status not in (200, 206):
            raise self._client.failure(what, reply)
        if reply.header("Content-Encoding") not in (None, "identity"):
            raise StoreError(f"{self.name}: read {key}: the server sent it compressed, though asked not to")
        if reply.status == 206:
            return self._partial(reply, key, start, length)
        return self._whole(reply, key, start, length)

    def _partial(self, reply: Reply, key: str, start: int, length: int | None) -> bytes:
        found = _RANGE.fullmatch(reply.header("Content-Range") or "")
        if found is None or int(found[1]) != start:
            raise StoreError(f"{self.name}: read {key}: the server sent another range than the one asked for")
        wanted = int(found[2]) + 1 - start
        total = None if found[3] == "*" else int(found[3])
        complete = wanted == length or (total is not None and start + wanted == total)
        if wanted < 1 or (length is not None and wanted > length) or not complete:
            raise StoreError(f"{self.name}: read {key}: the server sent another range than the one asked for")
        self._compare(key, _version(reply), total)
        received = reply.body(wanted)
        if len(received) != wanted or reply.length() not in (None, wanted):
            raise short(self.name, ("read", key))
        reply.body(1)  # to its end, so that the connection can be kept
        return received

    def _whole(self, reply: Reply, key: str, start: int, length: int | None) -> bytes:
        """A range out of an answer that is all of it: the server has no ranges."""
        if not reply.bounded:
            raise StoreError(f"{self.name}: read {key}: the server does not tell where the body ends")
        total = reply.length()
        self._compare(key, _version(reply), total)
        end = None if length is None else start + length
        received, at = bytearray(), 0
        for piece in reply.pieces(end if end is not None else 1 << 62):
            received += piece[max(0, start - at) :]
            at += len(piece)
        if at != end and total is not None and at != total:
            raise short(self.name, ("read", key))
        return bytes(received)

    def _remember(self, key: str, version: str | None, size: int) -> None:
        with self._lock:
            self._seen[key] = (version, size)
            self._seen.move_to_end(key)
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)

    def _compare(self, key: str, version: str | None, size: int | None) -> None:
        """Raises StoreError when this is not the version that was seen before: ranges of two would be mixed."""
        with self._lock:
            seen = self._seen.get(key)
            if seen is not None and (seen[0] != version or (size is not None and seen[1] != size)):
                del self._seen[key]
                raise StoreError(
                    f"{self.name}: read {key}: it was replaced meanwhile, or the server gives two versions of it; "
                    "read it again from the start"
                )
        if seen is None and size is not None:
            self._remember(key, version, size)

    # Listings
    # ----------------------------------------------------------------------------------------------------------

    def _entries(self, here: str, budget: Budget) -> Entries:
        """What a directory's listing says; nothing where there is no such directory. Raises StoreError when it is no
        listing."""
        what = ("list", here)

        def handle(reply: Reply) -> bytes:
            if reply.status == 404 and here:
                return b"[]"
            if reply.status == 404:
                raise Unreachable(f"{self.name}: list: there is nothing at {self._base}/; check the store's URL")
            if reply.status != 200:
                raise self._client.failure(what, reply)
            body = reply.body(LISTING_LIMIT + 1)
            if not reply.bounded or reply.length() not in (None, len(body)):
                raise short(self.name, what)
            return body

        address = f"{self._base}/{quote(here, safe='/')}"
        body = self._client.run(what, "GET", address, handle, budget, headers=lambda: {"Accept": "application/json"})
        try:
            entries = json.loads(body)
        except (ValueError, RecursionError):
            entries = None
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise StoreError(f"{self.name}: list {here}: the answer is no JSON listing as nginx and Caddy make it")
        return entries


def named(here: str, entry: dict[str, Any], note: Callable[[str, str], None]) -> tuple[str | None, bool]:
    """The key an entry of a listing stands for (None: one that cannot be asked for), and whether it is a directory.
    `note` is told of names that are left out, and why."""
    name = entry.get("name")
    below = entry.get("type") == "directory" or entry.get("is_dir") is True
    if not isinstance(name, str):
        note(here + repr(name), "is no name")
        return None, below
    name = name.removesuffix("/") if below else name
    reason = "has a slash in it" if "/" in name else keys.why_not_readable(here + name)
    if reason is not None:
        note(here + name, reason)
        return None, below
    return here + name, below


def listed(key: str, entry: dict[str, Any], note: Callable[[str, str], None]) -> Stat | None:
    """What an entry of a listing says of an object; None for one without a size."""
    size = entry.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        note(key, "has no size")
        return None
    return Stat(key, size, None, _time(entry.get("mtime") or entry.get("mod_time")), None)


class Broker(BaseBroker):
    """`http://host/directory`, `https://...`, for reading. Options: `listing` (`json` or `none`), `pattern`, `username`
    and `password`, or `token`."""

    schemes = ("https",)
    read_only = True

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, _OPTIONS)
        read_limits(config)
        if location.scheme not in ("http", "https") or not location.host:
            raise ConfigError(f"url = {location.url!r}: give https://HOST/DIRECTORY")
        listing = urls.option(config, location, "listing") or "none"
        if listing not in ("json", "none"):
            raise ConfigError(f'listing = {listing!r}: give "json" or "none"')
        _, pattern = _split_pattern(config, location)
        if listing == "json" and pattern != "{key}":
            raise ConfigError("listing: a pattern has no directories to be listed; leave one of the two out")
        found = []
        if listing == "none":
            found.append(f"{location.url}: no listing: only what is known by name can be read from it")
        if location.scheme == "http" and not location.host.startswith(("127.", "localhost")):
            found.append(f"{location.url}: plain http: others on the network can read and change what is sent")
        return found

    def open(self, config: Mapping[str, Any]) -> HttpStore:
        self.validate(config)
        location = urls.split(config)
        base, pattern = _split_pattern(config, location)
        store = HttpStore(
            str(config.get("name") or location.host),
            base,
            pattern,
            lists=urls.option(config, location, "listing") == "json",
            credentials={key: str(config[key]) for key in _SECRETS if config.get(key)},
            limits=read_limits(config),
        )
        store.url = location.url
        return store


def _split_pattern(config: Mapping[str, Any], location: urls.Location) -> tuple[str, str]:
    """The address up to the first part with a field in it, and the pattern after it. Raises ConfigError."""
    parts = location.path.split("/") if location.path else []
    fixed = next((at for at, part in enumerate(parts) if "{" in part), len(parts))
    base = f"{location.scheme}://{location.host}" + "".join("/" + quote(part) for part in parts[:fixed])
    given = urls.option(config, location, "pattern")
    inside = "/".join(parts[fixed:])
    if given and inside:
        raise ConfigError("pattern: the url has one already; leave one of the two out")
    pattern = str(given or inside or "{key}").lstrip("/")
    fields = {found[1] for found in _FIELD.finditer(pattern)}
    if not (fields == {"key"} or fields == {"uuid", "path"}):
        raise ConfigError(f"pattern = {pattern!r}: give {{key}}, or {{uuid}} and {{path}}, in it")
    return base, pattern


def _authorization(credentials: Mapping[str, str]) -> dict[str, str]:
    if credentials.get("token"):
        return {"Authorization": f"Bearer {credentials['token']}"}
    if credentials.get("username"):
        pair = f"{credentials['username']}:{credentials.get('password', '')}".encode()
        return {"Authorization": "Basic " + base64.b64encode(pair).decode()}
    return {}


def _asked(start: int, length: int | None) -> str:
    return f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"


def _version(reply: Reply) -> str | None:
    return reply.header("ETag") or reply.header("Last-Modified")


def _time(text: object) -> int | None:
    """A time in a header or a listing, in ns since the epoch."""
    if not isinstance(text, str):
        return None
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return int(when.timestamp() * 1000) * 10**6
