"""Items on a store that is mounted on another: what a write brings up first, and pushing an item down.

Used by `buckets.py` for a `MountedStore`. Blocks as its two stores do. The front's record of an item, once there is
one with a version, stands for the item; the backing store's shows through until then, and again when the front's has
no version left. It stays, without versions, after a push or a removal: a store has no conditional delete.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from vfs.errors import Conflict, NotFound, Refused
from vfs.objects import format as form
from vfs.objects.format import Record
from vfs.objects.shelf import ATTEMPTS, Loaded, Shelf
from vfs.stores import Store
from vfs.stores.carrying import carry
from vfs.stores.mounted import MountedStore


class MountedShelf(Shelf):
    """The items of a mounted store."""

    def __init__(self, store: MountedStore) -> None:
        super().__init__(store)
        self._mounted = store
        self._backing = Shelf(store.backing)
        if not self.transactions_at.startswith(store.prefix):
            self.transactions_at = store.prefix + "%transactions/"

    def load(self, prefix: str) -> Loaded:
        front = self._front(prefix)
        if front.record.versions or front.record.pending:
            return front
        behind = self._backing.load(prefix)
        token = front.token if front.present else behind.token
        return Loaded(behind.record, front.present or behind.present, token, behind=True)

    def record(self, prefix: str) -> Record:
        key = prefix + form.ITEM
        if key.startswith(self._mounted.prefix):
            with suppress(NotFound):
                front = self._parse(self._mounted.front.read(key.removeprefix(self._mounted.prefix)), prefix)
                if front.versions or front.pending:
                    return front
        return self._backing.record(prefix)

    def view(self, prefix: str, own: str = "") -> Record:
        """As a reader sees it; where the front is left with no version, the backing store's shows through."""
        seen = super().view(prefix, own)
        return seen if seen.versions else self._backing.view(prefix)

    def _front(self, prefix: str) -> Loaded:
        """The front's own record; an empty one where it has none."""
        key = prefix + form.ITEM
        if not key.startswith(self._mounted.prefix):
            return Loaded(Record("", ""))
        inner = key.removeprefix(self._mounted.prefix)
        with suppress(NotFound):
            stat = self._mounted.front.stat(inner)
            return Loaded(self._parse(self._mounted.front.read(inner), prefix), True, stat.version)
        return Loaded(Record("", ""))

    def state(self, transaction: str) -> bool | None:
        state = super().state(transaction)
        return self._backing.state(transaction) if state is None else state

    def _base(self, loaded: Loaded) -> Record:
        """Transactions under way in the backing store stay there: what they do comes together in a push."""
        record = super()._base(loaded)
        return replace(record, pending=()) if loaded.behind else record

    def _publish(self, prefix: str, loaded: Loaded, record: Record) -> bool:
        """Bring up the bytes that the record names, then publish it in the front."""
        if loaded.behind:
            for each in form.ids(loaded.record) & form.ids(record):
                for key in _objects(self._backing.store, prefix, each):
                    self._mounted.copy_up(key)
        return super()._publish(prefix, loaded, record)

    def settle(self, prefix: str) -> None:
        if self._front(prefix).record.pending:
            super().settle(prefix)

    def refuse_removing(self, prefix: str, ids: set[str], every: bool) -> None:
        front = {version.id for version in self._front(prefix).record.versions}
        behind = {version.id for version in self._backing.view(prefix).versions}
        if not ids & front or (not every and ids & behind):
            raise Refused(f"{self._backing.store.name} has it, and is not changed from here: remove it there")

    def push(self, bucket: str, name: str) -> None:
        """Move an item down: bytes first, the record last, then the front lets go of it. A push that was cut short
        is done again. Raises NotFound, Refused while a transaction changes it, Conflict, WrongBytes, StoreError."""
        prefix = form.item_prefix(bucket, name)
        for _attempt in range(ATTEMPTS):
            super().settle(prefix)
            front = self._front(prefix)
            if front.record.pending:
                raise Refused(f"{bucket}/{name}: a transaction is changing it; push it when that has ended")
            if not front.record.versions:
                if not self._backing.view(prefix).versions:
                    raise NotFound(f"{self.store.name}: push: there is no item {bucket}/{name}")
                return
            self._push_record(prefix, front.record)
            emptied = replace(front.record, versions=())
            if super()._publish(prefix, front, emptied):
                self.discard(prefix, form.ids(front.record))
                return
        raise Conflict(f"{self.store.name}: {bucket}/{name} is being changed by others all the time; try again later")

    def _push_record(self, prefix: str, record: Record) -> None:
        mounted = self._mounted
        there = form.ids(self._backing.record(prefix))
        for each in form.ids(record) - there:
            for key in _objects(self.store, prefix, each):
                with suppress(Conflict):  # an earlier try brought it
                    carry(mounted.front, key.removeprefix(mounted.prefix), mounted.backing, key, if_absent=True)
        self._backing.make_bucket(record.bucket)
        self._backing.merge(prefix, record)


def _objects(store: Store, prefix: str, version: str) -> Iterator[str]:
    """The keys of a version's objects."""
    yield prefix + form.DATA + version
    with suppress(NotFound):
        yield store.stat(prefix + form.DIGESTS + version).key
