"""Remote stores: S3 and every other engine that opendal has, with our own deadlines, retries and error
sentences.

Used through `open_store("s3://...")`. Every method blocks its caller, at most for the call's deadline and
`event_loop`'s margin; the waiting itself happens on the one asyncio thread (`remote_calls.py`).

Changes are sent at least once: a conditional write that was tried again may find its own first try, so what
is there is compared with what was sent before a lost race is reported. A write's answer is never taken from a
later writer: where the store's checksum is not ours, the bytes are read back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from opendal.types import Entry, Metadata

from vfs.errors import Conflict, Denied, NotFound, StoreError
from vfs.stores import checksums, keys, remote_config, s3_small, urls
from vfs.stores.base import BaseBroker, BaseStore, is_wanted, take_piece
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.protocol import Arrived, Check, Info, Stat
from vfs.stores.remote_calls import TEMPORARY, Calls, Condition, MaybeOurs
from vfs.stores.remote_config import Target
from vfs.stores.remote_errors import ServerFailed
from vfs.stores.remote_listing import Listings
from vfs.stores.remote_reads import Reads
from vfs.stores.s3_parts import uploads

WHOLE_LIMIT = 512 * 1024 * 1024  # bytes; engines without multipart uploads need the object in memory
_HEADERS = {"if_not_exists": "If-None-Match", "if_match": "If-Match"}
COPY_LIMIT = 5 * 1024 * 1024 * 1024  # bytes; S3's limit for one server-side copy


class RemoteStore(BaseStore):
    """A store behind opendal. Made by `Broker.open`."""

    def __init__(self, target: Target, limits: Limits) -> None:
        super().__init__(target.name, target.url, read_only=target.read_only, limits=limits)
        self._configured = target
        self._target = target
        self._calls = Calls(target, limits)
        self._reads = Reads(target, limits, self._calls)
        self._listings = Listings(target, limits, self._calls)
        self._uploads = uploads(target, limits)
        self._small = s3_small.small_reads(target, limits)

    def info(self) -> Info:
        can = self._calls.can
        return Info(
            broker=self._target.scheme,
            conditional_write=self._calls.conditional,
            resumes=self._uploads is not None,
            sweeps=self._calls.by_rename or self._uploads is not None,
            atomic_replace=self._target.conditions and not self._calls.by_rename,
            server_copy=can.copy,
            server_move=can.rename,
            checksum=checksums.MD5 if self._target.scheme == "s3" else None,
            read_only=self._target.read_only or not can.write,
            max_object=None if can.write_can_multi else WHOLE_LIMIT,
        )

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        if not self.connected and not credentials:
            self._take(self._target)
        super().connect(credentials)

    def disconnect(self) -> None:
        super().disconnect()
        self._calls.closed = True
        self._reads.close()
        self._close_uploads()
        self._target = self._configured

    def _close_uploads(self) -> None:
        if self._uploads is not None:
            self._uploads.close()
        if self._small is not None:
            self._small.close()

    def _use(self, credentials: Mapping[str, str]) -> None:
        self._take(remote_config.with_credentials(self._configured, credentials))

    def _take(self, target: Target) -> None:
        before, self._target = self._calls, target
        self._calls = Calls(target, self._limits)
        self._reads.close()
        self._reads = Reads(target, self._limits, self._calls)
        self._listings = Listings(target, self._limits, self._calls)
        self._close_uploads()
        self._uploads = uploads(target, self._limits)
        self._small = s3_small.small_reads(target, self._limits)
        before.closed = True

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._stat(key, self._limits.budget(deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        if length == 0:
            return b""
        budget = self._limits.budget(deadline, length or 0)
        if length is None and deadline is None:
            size = self._stat(key, budget).size - start  # how long it may take depends on how much it is
            budget = self._limits.budget(None, max(0, size))
        return self._calls.read(key, start, length, budget)

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
        if not buffer:
            return 0
        return self._reads.read_into(key, start, buffer, self._limits.budget(deadline, len(buffer)), arrived)

    def small_reads(self) -> s3_small.SmallReads | None:
        """A cheaper way to read many small objects, where there is one and it works."""
        return self._small if self._small is not None and self._small.usable else None

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        self._check_change("write", key)
        if len(data) > checksums.PART and self._calls.can.write_can_multi:
            return super().write(key, data, if_absent=if_absent, if_version=if_version, deadline=deadline)
        return self._write(key, data, if_absent, if_version, self._limits.budget(deadline, len(data)))

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
        self._check_change("upload", key)
        budget = self._limits.budget(deadline, size)
        if checksums.part_count(size) == 1 or not self._calls.can.write_can_multi:
            if size > WHOLE_LIMIT:
                raise StoreError(
                    f"{self.name}: {key} has {size} bytes; this type of store takes at most {WHOLE_LIMIT} at once"
                )
            stat = self._write(key, self._piece(key, source, 0, size), if_absent, if_version, budget)
            if progress is not None:
                progress(size)
            return stat
        return self._upload_parts(key, source, size, if_absent, if_version, progress, budget)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        for entries in self._listings.pages(prefix, recursive, deadline):
            for entry in entries:
                stat = self._listed(entry, prefix, recursive)
                if stat is not None:
                    yield stat

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        keys.check_readable(key)
        self._check_change("delete")
        self._calls.delete(key, self._limits.budget(deadline))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """As the protocol says. No engine copies on a condition: with `if_absent` the bytes travel through
        this machine, so that the store itself decides; without it the store copies alone, up to 5 GiB."""
        keys.check_readable(source)
        self._check_change("copy", target)
        found = self._stat(source, self._limits.budget(deadline))
        if if_absent or not self._calls.can.copy or found.size > COPY_LIMIT:
            return super().copy(source, target, if_absent=if_absent, deadline=deadline)
        budget = self._limits.budget(deadline, found.size)
        with self._conflicts(target, budget):
            self._calls.copy(source, target, found.size, budget)
        return self._stat(target, budget)

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """As the protocol says; by the store itself where it can rename and no condition is given."""
        keys.check_readable(source)
        self._check_change("move", target)
        if source == target or if_absent or not self._calls.can.rename:
            return super().move(source, target, if_absent=if_absent, deadline=deadline)
        budget = self._limits.budget(deadline)
        self._stat(source, budget)
        with self._conflicts(target, budget):
            self._calls.rename(source, target, budget)
        return self._stat(target, budget)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        self._check_change("sweep")
        budget = self._limits.budget(deadline)
        if self._uploads is not None:
            return self._uploads.sweep(older_than_s, budget)
        return self._listings.sweep(older_than_s, budget) if self._calls.by_rename else 0

    def check(self) -> Check:
        """As the protocol says. A server found to ignore conditions on writes is a store for a single writer from then
        on: `info` says so, and what is there is looked at before each write."""
        found = super().check()
        if found.conditional is False:
            self._configured = replace(self._configured, conditions=False)
            self._take(replace(self._target, conditions=False))
        return found

    def _check_change(self, operation: str, key: str | None = None) -> None:
        if key is not None:
            keys.check_writable(key)
        self._begin(operation, key or "")
        if self._target.read_only or not self._calls.can.write:
            raise urls.read_only_error(self.name, operation)

    def _stat(self, key: str, budget: Budget) -> Stat:
        found = self._calls.stat(key, budget)
        if found.mode.is_dir():
            raise NotFound(f"{self.name}: stat {key}: there is no such object")
        return self._described(key, found)

    def _described(self, key: str, found: Metadata) -> Stat:
        modified = found.last_modified
        nanoseconds = None if modified is None else int(modified.timestamp()) * 10**9 + modified.microsecond * 1000
        version = _quoted(found.etag) or found.version
        size = found.content_length
        checksum = checksums.from_etag(found.etag, size) if self._target.scheme == "s3" else None
        return Stat(key, size, version or f"{nanoseconds}-{size}", nanoseconds, checksum)

    def _listed(self, entry: Entry, prefix: str, recursive: bool) -> Stat | None:
        """What a listing's entry says, or None where it is no object, or one that could not be asked for by
        that name."""
        if entry.metadata.mode.is_dir() or entry.path.endswith("/"):
            return None
        if self._calls.by_rename and entry.path.startswith(TEMPORARY):
            return None  # bytes on their way: no object yet
        reason = keys.why_not_readable(entry.path)
        if reason is not None:
            self._note_problem(entry.path, reason)
        elif is_wanted(entry.path, prefix, recursive):
            return self._described(entry.path, entry.metadata)
        return None

    # Changes
    # ----------------------------------------------------------------------------------------------------------

    def _write(self, key: str, data: bytes, if_absent: bool, if_version: str | None, budget: Budget) -> Stat:
        condition = self._condition(key, if_absent, if_version, budget)
        try:
            with self._conflicts(key, budget):
                self._calls.write(key, data, condition, budget)
        except MaybeOurs as lost:
            return self._settled(key, data, lost, budget)
        lost_race = Conflict(f"{self.name}: write {key}: written, and replaced by somebody else at once")
        return self._settled(key, data, lost_race if if_absent or if_version else None, budget)

    def _settled(self, key: str, data: bytes, lost: Conflict | None, budget: Budget) -> Stat:
        """What the store has under the key after `data` was written; raises `lost`, if given, when that is
        something else, and Conflict when there is nothing any more."""
        try:
            stat = self._stat(key, budget)
            if stat.checksum == checksums.Checksum.of(data).value():
                return replace(stat, verified=True)
            same = stat.size == len(data) and self._calls.read(key, 0, None, budget) == data
            if same and self._stat(key, budget).version == stat.version:
                return replace(stat, verified=True)
        except NotFound:
            raise Conflict(f"{self.name}: write {key}: written, and removed by somebody else at once") from None
        if lost is not None:
            raise lost
        return stat

    @contextmanager
    def _conflicts(self, key: str, budget: Budget) -> Iterator[None]:
        """Servers that keep objects as files fail in their own ways when an object stands where a directory must, or
        the other way round: that is a Conflict."""
        try:
            yield
        except (NotFound, Denied, ServerFailed):
            if self._is_blocked(key, budget):
                raise Conflict(f"{self.name}: {key}: another object is in the way of that name; use another") from None
            raise

    def _is_blocked(self, key: str, budget: Budget) -> bool:
        with suppress(StoreError):
            if any(self._is_object(str(each), budget) for each in list(PurePosixPath(key).parents)[:-1]):
                return True
            return next(iter(self._listings.pages(key + "/", True, budget.left())), None) is not None
        return False

    def _is_object(self, key: str, budget: Budget) -> bool:
        try:
            self._stat(key, budget)
        except NotFound:
            return False
        return True

    def _condition(self, key: str, if_absent: bool, if_version: str | None, budget: Budget) -> Condition:
        """The condition in opendal's words; where the engine has none, it is looked at before (single
        writer)."""
        condition: Condition = {}
        if self._calls.conditional:
            if if_absent:
                condition["if_not_exists"] = True
            if if_version is not None:
                condition["if_match"] = if_version
            return condition
        if if_absent or if_version is not None:
            self._compare_before(key, if_absent, if_version, budget)
        return condition

    def _compare_before(self, key: str, if_absent: bool, if_version: str | None, budget: Budget) -> None:
        try:
            present: str | None = self._stat(key, budget).version
        except NotFound:
            present = None
        if (if_absent and present is not None) or (if_version is not None and present != if_version):
            raise Conflict(f"{self.name}: write {key}: it is there already, or was changed meanwhile")

    def _upload_parts(
        self,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        if_absent: bool,
        if_version: str | None,
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> Stat:
        condition = self._condition(key, if_absent, if_version, budget)
        if self._uploads is not None:
            headers = {_HEADERS[name]: "*" if value is True else str(value) for name, value in condition.items()}
            with self._conflicts(key, budget):
                ours, lost = self._uploads.send(key, partial(self._piece, key, source), size, headers, progress, budget)
            return self._settled_parts(key, size, ours, lost, budget)
        checksum = checksums.Checksum(size)
        step = checksums.part_size(size)
        with self._conflicts(key, budget), self._calls.writer(key, step, condition, budget) as writer:
            for offset in range(0, size, step):
                piece = self._piece(key, source, offset, min(step, size - offset))
                writer.send(piece)
                checksum.update(piece)
                if progress is not None:
                    progress(offset + len(piece))
            lost = writer.commit()
        return self._settled_parts(key, size, checksum.value(), lost, budget)

    def _settled_parts(self, key: str, size: int, ours: tuple[str, str], lost: Conflict | None, budget: Budget) -> Stat:
        stat = self._stat(key, budget)
        if stat.checksum == ours:
            return replace(stat, verified=True)
        if lost is not None:
            raise lost
        if stat.size != size:
            raise Conflict(f"{self.name}: upload {key}: uploaded, and replaced by somebody else at once")
        return stat

    def _piece(self, key: str, source: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
        return take_piece(self.name, key, source, offset, length)


def _quoted(etag: str | None) -> str | None:
    """An ETag as conditions want it: some servers leave the quotes out of listings."""
    return etag if not etag or etag.endswith('"') else f'"{etag}"'


class Broker(BaseBroker):
    """Every remote engine that opendal has: `s3://bucket/prefix`, `gcs://`, `azblob://`,
    `webdav+https://host/path`, ..."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        read_limits(config)
        return remote_config.warnings(remote_config.target(config))

    def open(self, config: Mapping[str, Any]) -> RemoteStore:
        return RemoteStore(remote_config.target(config), read_limits(config))
