"""The items of one store: records read, changed on condition, and seen as transactions left them.

Used by `buckets.py` and the transactions. Blocks as long as the store does. Any thread may call anything.

A change reads the record, and publishes it again on condition that nobody else did meanwhile; who loses reads
again. A store without conditional writes has one writer. What a crash at each step leaves:

- bytes of a version that no record names: `sweep` removes them when they are old
- changes of a transaction that is not committed: nobody sees them; `sweep` aborts it when it is old
- changes of a committed transaction that are not in the versions yet: readers look the transaction up; the next
  writer, or `sweep`, puts them in their place
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from vfs import faults
from vfs.errors import Conflict, ManifestError, NotFound, StoreError, UsageError
from vfs.objects import format as form
from vfs.objects.format import Change, Record
from vfs.stores import Stat, Store

ATTEMPTS = 200  # lost races in a row: each one means that somebody else's change went through
LONGEST_PAUSE_S = 0.1
COMMITTED_KEPT = 1024  # transactions remembered as committed


@dataclass(frozen=True, slots=True)
class Loaded:
    """A record as it is in a store: `token` is the condition for replacing it, None where there is none.
    `present`: there is an object to be replaced. `behind`: it is from a backing store, which keeps it as it is."""

    record: Record
    present: bool = False
    token: str | None = None
    behind: bool = False


Make = Callable[[Record], Change | None]


class Shelf:
    """Buckets and items of one store. Raises UsageError for a store that cannot hold records."""

    def __init__(self, store: Store) -> None:
        if store.info().chooses_keys:
            raise UsageError(f"{store.name}: it chooses the names of what is put there itself; it can hold no items")
        self.store = store
        self.transactions_at = form.TRANSACTIONS
        self._committed: set[str] = set()
        self._lock = threading.Lock()  # over `_committed`

    # Buckets
    # ----------------------------------------------------------------------------------------------------------

    def has_bucket(self, bucket: str) -> bool:
        try:
            self.store.stat(form.bucket_key(bucket))
        except NotFound:
            return False
        return True

    def make_bucket(self, bucket: str) -> None:
        """Make it unless it is there already."""
        if self.has_bucket(bucket):
            return
        body = form.to_json({"bucket": bucket, "created_ns": time.time_ns()})
        with suppress(Conflict):  # somebody else made it
            self.store.write(form.bucket_key(bucket), body, if_absent=True)

    def bucket_names(self) -> Iterator[str]:
        for stat in self.store.list(form.BUCKETS, recursive=False):
            with suppress(NotFound):  # removed meanwhile
                yield form.parse_bucket(self.store.read(stat.key), stat.key)

    def drop_bucket(self, bucket: str) -> None:
        """Remove a bucket and all that is in it: first that it exists, then the rest."""
        self.store.delete(form.bucket_key(bucket))
        for stat in self.store.list(form.bucket_prefix(bucket)):
            self.store.delete(stat.key)

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def load(self, prefix: str) -> Loaded:
        """The record of the item whose objects have this prefix; an empty one when there is none. The version is
        asked before the bytes: a change between them makes a write fail, never win."""
        for _attempt in range(ATTEMPTS):
            try:
                stat = self.store.stat(prefix + form.ITEM)
            except NotFound:
                return Loaded(Record("", ""))
            with suppress(NotFound):
                record = self._parse(self.store.read(prefix + form.ITEM), prefix)
                return Loaded(record, True, stat.version)
        raise StoreError(f"{self.store.name}: {prefix}: says that the item is there and then gives nothing")

    def _parse(self, data: bytes, prefix: str) -> Record:
        try:
            record = form.parse(data)
        except ManifestError as error:
            raise ManifestError(f"{self.store.name}: {prefix}: {error}") from error
        if form.item_prefix(record.bucket, record.name) != prefix:
            raise ManifestError(f"{self.store.name}: {prefix}: the item record there is of another item")
        return record

    def record(self, prefix: str) -> Record:
        """The record as it is, in one call; an empty one where there is none."""
        try:
            return self._parse(self.store.read(prefix + form.ITEM), prefix)
        except NotFound:
            return Record("", "")

    def view(self, prefix: str, own: str = "") -> Record:
        """The item as a reader sees it: with what committed transactions and the own one did, without the rest."""
        while True:
            record = self.record(prefix)
            named = {change.transaction for change in record.pending} - {own}
            states = {transaction: self.state(transaction) for transaction in named}
            if None in states.values() and self.record(prefix) != record:
                continue  # the transaction may have ended, and been cleaned up, between the two looks
            seen = form.fold(record, lambda each, s=states: True if each == own else s[each])  # type: ignore[misc]
            return replace(seen, pending=())

    def prefixes(self, bucket: str) -> Iterator[str]:
        """Where the items of a bucket are, in no order; also of those that have no version any more."""
        for stat in self.objects(bucket):
            if stat.key.endswith(form.ITEM):
                yield stat.key.removesuffix(form.ITEM)

    def objects(self, bucket: str) -> Iterator[Stat]:
        """All objects of the items of a bucket."""
        return iter(self.store.list(form.bucket_prefix(bucket)))

    def objects_of(self, prefix: str) -> Iterator[Stat]:
        """The objects of one item, without those of items whose names go on from its name."""
        return iter(self.store.list(prefix + "/", recursive=False))

    # Changing
    # ----------------------------------------------------------------------------------------------------------

    def change(self, bucket: str, name: str, make: Make, own: str = "") -> Record:
        """Change an item: `make(record as seen)` says how, and may be asked again after a lost race; None leaves
        it. Gives the record as the own transaction sees it. Raises what `make` raises, and StoreError; after a
        temporary one the change may have happened or not."""
        prefix = form.item_prefix(bucket, name)
        for attempt in range(ATTEMPTS):
            loaded = self.load(prefix)
            before = replace(self._base(loaded), bucket=bucket, name=name)
            change = make(self._seen_by(before, own))
            if change is None:
                return self._seen_by(before, own)
            after = form.add(before, change)
            if self._publish(prefix, loaded, after):
                self.discard(prefix, form.ids(loaded.record) - form.ids(after))
                return self._seen_by(after, own)
            _pause(attempt)
        raise Conflict(f"{self.store.name}: {bucket}/{name} is being changed by others all the time; try again later")

    def _base(self, loaded: Loaded) -> Record:
        """What a change starts from."""
        return form.fold(loaded.record, self.state)

    @staticmethod
    def _seen_by(record: Record, own: str) -> Record:
        return replace(form.fold(record, lambda each: True if each == own else None), pending=())

    def settle(self, prefix: str) -> None:
        """Put the changes of committed transactions in their place, drop those of aborted ones."""
        self._rewrite(prefix, lambda record: form.fold(record, self.state))

    def drop(self, prefix: str, transaction: str) -> None:
        """Drop the changes of a transaction that is not committed and never will be."""
        self._rewrite(prefix, lambda record: form.fold(record, lambda each: False if each == transaction else None))

    def merge(self, prefix: str, other: Record) -> None:
        """Take in the versions of another store's record of this item; their bytes are here already."""
        self._rewrite(prefix, lambda record: form.union(other, form.fold(record, self.state)), make=True)

    def _rewrite(self, prefix: str, change: Callable[[Record], Record], make: bool = False) -> None:
        for attempt in range(ATTEMPTS):
            loaded = self.load(prefix)
            if not loaded.present and not make:
                return
            after = change(loaded.record)
            if after == loaded.record or self._publish(prefix, loaded, after):
                self.discard(prefix, form.ids(loaded.record) - form.ids(after))
                return
            _pause(attempt)
        raise Conflict(f"{self.store.name}: {prefix} is being changed by others all the time; try again later")

    def _publish(self, prefix: str, loaded: Loaded, record: Record) -> bool:
        """Whether the record replaced the one that was loaded. One that was sent twice counts once."""
        data = form.dump(record)
        faults.point("objects.record")
        try:
            self.store.write(prefix + form.ITEM, data, if_absent=not loaded.present, if_version=loaded.token)
        except Conflict:
            return self._arrived(prefix, data)
        except StoreError as error:
            if not error.temporary or not self._arrived(prefix, data):
                raise
        faults.point("objects.recorded")
        return True

    def _arrived(self, prefix: str, data: bytes) -> bool:
        try:
            return self.store.read(prefix + form.ITEM) == data
        except StoreError:
            return False

    def discard(self, prefix: str, ids: set[str]) -> None:
        """Remove the bytes of versions that no record names any more; what fails is left to `sweep`."""
        for each in ids:
            with suppress(StoreError):
                self.store.delete(prefix + form.DATA + each)
                self.store.delete(prefix + form.DIGESTS + each)

    # Transactions
    # ----------------------------------------------------------------------------------------------------------

    def state(self, transaction: str) -> bool | None:
        """True: committed. False: aborted. None: not decided (or so long ago that no record names it)."""
        with self._lock:
            if transaction in self._committed:
                return True
        try:
            body = form.parse_json(self.store.read(self.transactions_at + transaction), "a transaction")
        except NotFound:
            return None
        if body.get("state") == "committed":
            self._remember(transaction)
            return True
        return False

    def _remember(self, transaction: str) -> None:
        with self._lock:
            if len(self._committed) >= COMMITTED_KEPT:
                self._committed.clear()
            self._committed.add(transaction)

    def decide(self, transaction: str, committed: bool, notes: str, items: list[tuple[str, str]]) -> bool:
        """End a transaction, unless somebody did: whether it is committed now."""
        body = {"notes": notes, "items": items, "decided_ns": time.time_ns()}
        body["state"] = "committed" if committed else "aborted"
        try:
            self.store.write(self.transactions_at + transaction, form.to_json(body), if_absent=True)
        except Conflict:
            return self.state(transaction) is True
        except StoreError as error:
            state = self._state_after(transaction, error)
            if state is None:
                raise
            return state
        if committed:
            self._remember(transaction)
        return committed

    def _state_after(self, transaction: str, error: StoreError) -> bool | None:
        try:
            return self.state(transaction) if error.temporary else None
        except StoreError:
            return None

    def finish(self, transaction: str) -> None:
        """After a commit: put its changes in their place, then forget it. Nobody has to wait for it."""
        for bucket, name in form.parse_items(self.store.read(self.transactions_at + transaction)):
            self.settle(form.item_prefix(bucket, name))
            faults.point("objects.settled")
        self.store.delete(self.transactions_at + transaction)

    def transactions(self) -> Iterator[Stat]:
        """The transactions that were decided and are not forgotten yet."""
        return iter(self.store.list(self.transactions_at, recursive=False))

    def refuse_removing(self, prefix: str, ids: set[str], every: bool) -> None:
        """Raises Refused where these versions (`every`: all there are) are not this store's to remove."""


def _pause(attempt: int) -> None:
    """After a lost race: not all at once again."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.001 * 2 ** min(attempt, 10))))
