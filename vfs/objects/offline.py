"""What is kept of objects on this machine: what was read, and the changes that wait for their store.

Used by `buckets.py`, on a store that is always there (a directory, or memory for trials). Blocks on that store. In it,
beside records and bytes under the names they have everywhere:

    <bucket>/<name>/%chunk-<id>-<number>   one MiB of a version that was read
    %queue/<time>-<random>                 {"format": 1, "bucket", "name", "change": change}: a change that waits

A put that waits has its bytes here under `%data-<id>`. A change is sent again until the store has it: sending one
twice changes nothing, because a version keeps its id.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from vfs.errors import Conflict, ManifestError, NotFound, StoreError, UsageError
from vfs.objects import format as form
from vfs.objects.format import Change, Record
from vfs.objects.shelf import Shelf
from vfs.stores import Store
from vfs.stores.carrying import carry

log = logging.getLogger(__name__)

QUEUE = form.ROOT + "%queue/"
CHUNK = "/%chunk-"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A change that waits for its store: a "put", "metadata" or "remove" of an item. `since_ns` since the epoch."""

    bucket: str
    name: str
    what: str
    since_ns: int
    key: str
    change: Change


class Kept:
    """The chunks of one version that are here; for `item.Verified`."""

    def __init__(self, store: Store, prefix: str, version: str) -> None:
        self._store = store
        self._chunks = f"{prefix}{CHUNK}{version}-"
        self._digests = f"{prefix}{form.DIGESTS}{version}"

    def find(self, number: int) -> bytes | None:
        try:
            return self._store.read(f"{self._chunks}{number}")
        except StoreError:
            return None

    def keep(self, number: int, data: bytes) -> None:
        self._write(f"{self._chunks}{number}", data)

    def keep_digests(self, data: bytes) -> None:
        try:
            if self._store.read(self._digests) == data:
                return
        except StoreError:
            pass
        self._write(self._digests, data)

    def _write(self, key: str, data: bytes) -> None:
        try:
            self._store.write(key, data)
        except StoreError as error:
            log.warning("%s: what was read is not kept here: %s", self._store.name, error)


class Local:
    """The local store of an `Objects`. Raises UsageError for one that cannot be written."""

    def __init__(self, store: Store) -> None:
        if store.info().read_only:
            raise UsageError(f"{store.name}: the local store is read-only; give one that keeps what is read")
        self.store = store
        self.shelf = Shelf(store)

    # What was read
    # ----------------------------------------------------------------------------------------------------------

    def remember(self, bucket: str, name: str, record: Record) -> None:
        """Keep an item's record as its store gave it; let go of the bytes of versions it has no more. It may fail."""
        prefix = form.item_prefix(bucket, name)
        with suppress(StoreError, ManifestError):
            before = self.shelf.load(prefix)
            if before.record == record or not (before.present or record.versions):
                return
            self.shelf.make_bucket(bucket)
            self.store.write(prefix + form.ITEM, form.dump(replace(record, bucket=bucket, name=name)))
            self._forget(prefix, form.ids(before.record) - form.ids(record))

    def _forget(self, prefix: str, ids: set[str]) -> None:
        if ids:
            for stat in list(self.shelf.objects_of(prefix)):
                if any(each in stat.key.rpartition("/")[2] for each in ids):
                    self.store.delete(stat.key)

    def record(self, bucket: str, name: str) -> Record:
        """The record as it was when it was last read; an empty one when it never was."""
        return self.shelf.record(form.item_prefix(bucket, name))

    def kept(self, prefix: str, version: str) -> Kept:
        return Kept(self.store, prefix, version)

    # What waits
    # ----------------------------------------------------------------------------------------------------------

    def add(self, bucket: str, name: str, change: Change) -> None:
        """Remember a change until `done`. Raises StoreError when this machine cannot keep it."""
        body = {"bucket": bucket, "name": name, "change": form.dump_change(change)}
        self.store.write(f"{QUEUE}{time.time_ns():020d}-{form.new_id()}", form.to_json(body), if_absent=True)

    def waiting(self) -> Iterator[Waiting]:
        """The changes that wait, oldest first."""
        for key in sorted(stat.key for stat in self.store.list(QUEUE, recursive=False)):
            with suppress(NotFound):  # sent meanwhile by another process
                yield self._parse(key, self.store.read(key))

    def _parse(self, key: str, data: bytes) -> Waiting:
        try:
            body = form.parse_json(data, f"{self.store.name}: {key}")
            change = form.parse_change(body["change"])
            since = int(key.removeprefix(QUEUE).split("-")[0])
            return Waiting(str(body["bucket"]), str(body["name"]), change.kind, since, key, change)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                f"{self.store.name}: {key}: not a change that waits ({error}); what it was is lost: delete that object"
            ) from error

    def of(self, bucket: str, name: str) -> list[Change]:
        """The changes of one item that wait, oldest first."""
        return [each.change for each in self.waiting() if (each.bucket, each.name) == (bucket, name)]

    def done(self, waiting: Waiting) -> None:
        self.store.delete(waiting.key)

    def send(self, waiting: Waiting, home: Shelf) -> Record:
        """Do a change that waits in its store. Raises StoreError, WrongBytes."""
        home.make_bucket(waiting.bucket)
        prefix = form.item_prefix(waiting.bucket, waiting.name)
        version = waiting.change.version
        if version is not None:
            for kind in (form.DATA, form.DIGESTS) if version.chunks else (form.DATA,):
                with suppress(Conflict):  # an earlier try brought it
                    carry(
                        self.store, prefix + kind + version.id, home.store, prefix + kind + version.id, if_absent=True
                    )
        record = home.change(waiting.bucket, waiting.name, lambda record: waiting.change)
        self.done(waiting)
        return record


def overlaid(record: Record, changes: list[Change]) -> Record:
    """The record with changes that wait done to it; the numbers of versions among them are what they will be, if
    nobody else puts one first."""
    for change in changes:
        record = form.add(record, change)
    return record
