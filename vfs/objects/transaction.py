"""Transactions over items: what is collected, how it is committed, and what `sweep` does with those cut short.

Used by `buckets.py`. Blocks for the store that is written to. A transaction's changes are in the items' records,
under its id; one object, written if absent, says how it ended and so commits all of them at once. Whoever would
abort one that seems abandoned writes the same object: exactly one of the two wins.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from vfs import faults
from vfs.errors import ManifestError, NotFound, Refused, StoreError, UsageError
from vfs.events import Events
from vfs.objects import format as form
from vfs.objects.shelf import Shelf
from vfs.stores import Stat

LIMIT_S = 12 * 3600.0  # longest life of a transaction; `sweep` aborts those of twice the age
ABANDONED_S = 2 * LIMIT_S


def _now() -> float:
    """Seconds that also count while this machine sleeps: a transaction that slept for days must not commit."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class Transaction:
    """A transaction under way: its `id`, its author's `notes`, and the items changed so far (bucket, name)."""

    id: str
    notes: str
    hub: Events
    items: dict[tuple[str, str], None] = field(default_factory=dict)
    began: float = field(default_factory=_now)


class Transactions:
    """The transactions of one store: at most one under way in each thread."""

    def __init__(self, shelf: Shelf, events: Events) -> None:
        self._shelf = shelf
        self._events = events
        self._here = threading.local()

    def current(self) -> Transaction | None:
        """The transaction of this thread."""
        found: Transaction | None = getattr(self._here, "transaction", None)
        return found

    @contextmanager
    def begin(self, notes: str) -> Iterator[Transaction]:
        """Collect the changes of the block and commit them at its end; roll them back when it raises."""
        if self.current() is not None:
            raise UsageError("a transaction is under way in this thread already: end that one first")
        number = form.new_id()
        with self._events.transaction(number, notes) as hub:
            transaction = Transaction(number, notes, hub)
            self._here.transaction = transaction
            try:
                yield transaction
            except BaseException:
                self._roll_back(transaction)
                raise
            finally:
                self._here.transaction = None
            self._commit(transaction)
        self._finish(transaction)

    def _commit(self, transaction: Transaction) -> None:
        """Raises Refused when it took too long, StoreError when the store says no or does not answer: then it may be
        committed or not, and readers see all of it or none."""
        if not transaction.items:
            return
        faults.point("objects.commit")
        if _now() - transaction.began > LIMIT_S:
            self._roll_back(transaction)
            raise Refused(f"the transaction took longer than {LIMIT_S / 3600:g} h and was rolled back; do it in parts")
        try:
            committed = self._shelf.decide(transaction.id, True, transaction.notes, list(transaction.items))
        except StoreError as error:
            if not error.temporary:
                self._roll_back(transaction)
            raise
        if not committed:
            self._roll_back(transaction)
            raise Refused("the transaction was taken for abandoned and rolled back by `sweep`; do it again")
        faults.point("objects.committed")

    def _roll_back(self, transaction: Transaction) -> None:
        """Take its changes out of the records; nobody sees them anyway, and what fails is left to `sweep`."""
        for bucket, name in transaction.items:
            with suppress(StoreError, ManifestError):
                self._shelf.drop(form.item_prefix(bucket, name), transaction.id)

    def _finish(self, transaction: Transaction) -> None:
        """Put its changes in their place; what fails is done by the next writer, or by `sweep`."""
        if transaction.items:
            with suppress(StoreError, ManifestError):
                self._shelf.finish(transaction.id)


def sweep(shelf: Shelf, older_than_s: float, abandoned_s: float) -> int:
    """Finish what was committed, abort transactions whose items nobody changed for `abandoned_s` seconds, remove bytes
    that no record names and that are older than `older_than_s` seconds. The number of things removed."""
    before_ns = time.time_ns() - int(older_than_s * 1e9)
    abandoned_ns = time.time_ns() - int(abandoned_s * 1e9)
    decided = list(shelf.transactions())
    swept = sum(_finished(shelf, stat) for stat in decided)
    for bucket in list(shelf.bucket_names()):
        for prefix in shelf.prefixes(bucket):
            _abort_abandoned(shelf, prefix, abandoned_ns)
        swept += sum(_unnamed_removed(shelf, stat, before_ns) for stat in shelf.objects(bucket))
    for stat in decided:  # what they aborted is out of the records by now
        swept += _forgotten(shelf, stat, abandoned_ns)
    return swept


def _finished(shelf: Shelf, stat: Stat) -> bool:
    transaction = stat.key.removeprefix(shelf.transactions_at)
    if shelf.state(transaction) is not True:
        return False
    with suppress(NotFound):  # its own process was faster
        shelf.finish(transaction)
    return True


def _abort_abandoned(shelf: Shelf, prefix: str, before_ns: int) -> None:
    loaded = shelf.load(prefix)
    if not loaded.record.pending or loaded.behind:
        return
    with suppress(NotFound):
        modified = shelf.store.stat(prefix + form.ITEM).modified_ns
        if modified is not None and modified < before_ns:
            for transaction in {change.transaction for change in loaded.record.pending}:
                shelf.decide(transaction, False, "abandoned", [])
    shelf.settle(prefix)


def _unnamed_removed(shelf: Shelf, stat: Stat, before_ns: int) -> bool:
    """Remove the bytes of a version that no record names: what an interrupted put, or removal, left."""
    prefix, _, name = stat.key.rpartition("/")
    kind = next((kind for kind in (form.DATA, form.DIGESTS) if ("/" + name).startswith(kind)), None)
    if kind is None or stat.modified_ns is None or stat.modified_ns >= before_ns:
        return False
    if ("/" + name).removeprefix(kind) in form.ids(shelf.record(prefix)):
        return False
    with suppress(StoreError):
        shelf.store.delete(stat.key)
        return True
    return False


def _forgotten(shelf: Shelf, stat: Stat, before_ns: int) -> bool:
    """Remove what says that a transaction was aborted, long after it could still try to commit."""
    if stat.modified_ns is None or stat.modified_ns >= before_ns:
        return False
    if shelf.state(stat.key.removeprefix(shelf.transactions_at)) is not False:
        return False
    shelf.store.delete(stat.key)
    return True
