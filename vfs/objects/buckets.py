"""Objects: named items with versions and metadata, in buckets, on any store.

Public: used as a library, with no mount.

    objects = Objects(open_store("s3://lab/study?endpoint=https://s3.lab.example"))
    bucket = objects.bucket("models")
    bucket.put("resnet/weights.npz", Path("weights.npz"), {"epochs": 90})
    with bucket.get("resnet/weights.npz") as item:
        item.read(1024), item.metadata, item.version
    for found in bucket.find("resnet*", epochs=90):
        print(found.name, found.size)

Every call may block for the stores, each of their calls within that store's limits. Any thread may use one `Objects`;
any number of processes may write to one store that has conditional writes (`store.info().conditional_write`). On others
there must be one writer at a time: two that change one item at the same moment can lose one of the changes.

Names of buckets and items are text of 1 to 1024 characters, also with `/`, spaces and anything else but NUL; what has a
text form (a Path, UUID, Enum) is taken for its text. How all of it is kept is in `format.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

from vfs.errors import NotFound, Refused, StoreError, UsageError
from vfs.events import Events
from vfs.manifest import digest_of
from vfs.objects import format as form
from vfs.objects import listing
from vfs.objects import transaction as transactions
from vfs.objects.format import Change, Record, Version
from vfs.objects.item import Calculated, Item, Stats, Verified, stats_of
from vfs.objects.mounted import MountedShelf
from vfs.objects.offline import Waiting
from vfs.objects.places import Places, Seen, Settled
from vfs.objects.query import Listing, by_metadata, by_name, text_of
from vfs.objects.source import BUFFER, Given, Source, opened
from vfs.objects.transaction import ABANDONED_S, Transaction
from vfs.stores import Store, keys


class Objects:
    """Buckets of items in a store, or in several that have copies of the same ones.

    `stores`: the first is written to and says which versions there are; the others are read from, by health and
    nearness; those that calculate what is not there are asked last. `local`: a store on this machine that keeps what
    was read, and the changes that wait while the first store does not answer; without one, such changes fail.
    `events`: the hub that hears of puts (their progress in bytes), of items set and deleted (`ObjectSet.key` is
    `<bucket>/<name>`), and of transactions.

    Raises UsageError when no store is given that items can be kept in.
    """

    def __init__(
        self, stores: Store | Sequence[Store], *, local: Store | None = None, events: Events | None = None
    ) -> None:
        given = [stores] if isinstance(stores, Store) else list(stores)
        self._events = events or Events()
        self._places = Places(given, local, self._events)
        self._transactions = transactions.Transactions(self._places.home.shelf, self._events)

    # Buckets
    # ----------------------------------------------------------------------------------------------------------

    def buckets(self, filter: object = None) -> Listing[str]:
        """The names of the buckets, lazily, in no order. `filter`: as in `Bucket.find`. Raises UsageError,
        StoreError when no store answers."""
        is_meant = by_name(filter)
        return Listing(lambda it: (name for name in listing.buckets(self._places, it) if is_meant(name)))

    def bucket(self, name: object, *, create: bool = True) -> "Bucket":
        """The bucket with this name, made if there is none; without `create` that is NotFound instead.

        While the store does not answer, one that is known here is given, or a new one waits with what is put into
        it. Raises UsageError for a name that cannot be, StoreError.
        """
        text = form.check_name(text_of(name), "bucket")
        home, local = self._places.home, self._places.local
        try:
            with home.health.watched():
                self._find_or_make(text, create)
        except StoreError as error:
            if local is None or not error.temporary or not (create or local.shelf.has_bucket(text)):
                raise
            local.shelf.make_bucket(text)
        if local is not None:
            with suppress(StoreError):  # it is not known here, then, while the store is away
                local.shelf.make_bucket(text)
        return Bucket(self, text)

    def _find_or_make(self, name: str, create: bool) -> None:
        home = self._places.home.shelf
        if create and not home.store.info().read_only:
            home.make_bucket(name)
        elif not any(place.shelf.has_bucket(name) for place in (self._places.home, *self._places.others)):
            raise NotFound(f"{home.store.name}: there is no bucket {name!r}; {self._has('buckets', self.buckets())}")

    def remove(self, name: object, force: bool = False) -> None:
        """Remove a bucket for good: an empty one, or by `force` one with items, all their versions with it.

        Nobody else may be writing to it meanwhile: what they put could stay behind, out of sight. Raises NotFound,
        Refused for one that is not empty (or holds changes that wait), UsageError inside a transaction, StoreError.
        """
        text = form.check_name(text_of(name), "bucket")
        if self._transactions.current() is not None:
            raise UsageError("a bucket cannot be removed inside a transaction: remove its items there, then the bucket")
        home, local = self._places.home.shelf, self._places.local
        if not home.has_bucket(text):
            raise NotFound(f"{home.store.name}: there is no bucket {text!r}; {self._has('buckets', self.buckets())}")
        if not force and next(Bucket(self, text).keys(), None) is not None:
            raise Refused(f"bucket {text!r} is not empty: remove its items first, or force it")
        for each in list(self.pending()):
            if each.bucket == text and local is not None:
                local.done(each)
        home.drop_bucket(text)
        if local is not None:
            local.shelf.drop_bucket(text)

    @staticmethod
    def _has(what: str, names: Iterator[str]) -> str:
        some = sorted(name for name, _ in zip(names, range(5), strict=False))
        return f"there are the {what} {', '.join(map(repr, some))}" if some else f"there are no {what}"

    # Transactions, and what waits
    # ----------------------------------------------------------------------------------------------------------

    def transaction(self, notes: str = "") -> AbstractContextManager[Transaction]:
        """Group the changes that this thread makes in the block, over any items and buckets: all of them are visible
        to everybody at its end, or none is; the latter also when the block raises, or the process dies.

        Inside, its own changes are seen. They need the store: nothing waits here for it. Others may change the same
        items meanwhile: their versions stay, and whoever puts later has the higher number. It may take 12 hours.
        Events: TransactionBegan with `notes`, TransactionEnded, then those of its changes. Raises UsageError inside
        another one in this thread, and at the end Refused or StoreError when it could not be committed (after
        a temporary StoreError it may be: all of it, or nothing).
        """
        return self._transactions.begin(notes)

    def pending(self) -> list[Waiting]:
        """The changes that wait here for their store, oldest first."""
        return list(self._places.local.waiting()) if self._places.local is not None else []

    def settle(self) -> Settled:
        """Send what waits, oldest first; what was sent has its number from then on. Each change here does that first
        too. A change that the store refuses stays, and is in `problems`, until its bucket is removed."""
        return self._places.settle()

    def sweep(self, older_than_s: float = 86400.0, abandoned_s: float = ABANDONED_S) -> int:
        """Clean up after what was interrupted, anybody's: bytes of puts and removals that no item names and that are
        older than `older_than_s` seconds, committed transactions that were not put in their place, and transactions
        whose items were not changed for `abandoned_s` seconds (they are rolled back). Looks at every object of every
        bucket. The number of things removed. Raises StoreError."""
        return transactions.sweep(self._places.home.shelf, older_than_s, abandoned_s)


class Bucket:
    """Items under names. Made by `Objects.bucket`."""

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects = objects
        self._places = objects._places
        self._transactions = objects._transactions
        self.name = name

    def __repr__(self) -> str:
        return f"Bucket({self.name!r})"

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def get(self, name: object, version: int | None = None) -> Item:
        """An item to be read like an open binary file, with `metadata`, `version`, `size`, `created`, `digest`: the
        latest version, or this one. Its bytes are asked for as they are read, and checked; close it, best by `with`.

        From this machine, else from the stores by health and nearness, else, when no store has the item, calculated
        (version 0; put it to keep it). Raises NotFound, UsageError, WrongBytes, StoreError; those that have to do with
        the bytes also while it is read.
        """
        text = self._check(name)
        try:
            seen = self._look(text)
            chosen = self._choose(seen, text, version)
        except (NotFound, StoreError) as error:
            if version is None and (isinstance(error, NotFound) or error.temporary):
                calculated = self._calculated(text, "" if isinstance(error, NotFound) else str(error))
                if calculated is not None:
                    return calculated
            raise
        return Item(self._stats(seen, text, chosen), self._places.chunks(self.name, text, chosen))

    def stats(self, name: object, version: int | None = None) -> Stats:
        """What is known of an item: of the latest version, or of this one. Raises NotFound, UsageError, StoreError."""
        text = self._check(name)
        seen = self._look(text)
        return self._stats(seen, text, self._choose(seen, text, version))

    def versions(self, name: object) -> list[Stats]:
        """All versions of an item, oldest first. Raises NotFound, UsageError, StoreError."""
        text = self._check(name)
        seen = self._look(text)
        self._choose(seen, text, None)
        return [self._stats(seen, text, version) for version in seen.record.versions]

    def find(self, filter: object = None, /, **metadata: Any) -> Listing[Stats]:
        """The latest version of each item that is meant, lazily, in no order; each item as it is when it is reached.

        `filter` of names: text (a file pattern if it has `*`, `?` or `[` in it, else a part of the name), a compiled
        regular expression (found anywhere in the name), or anything with a text form, which is a part of the name.
        `metadata`: values to be equal, or compiled regular expressions to be found in a text. The listing's `stale` and
        `reason` tell whether a store could not be asked. Raises UsageError, StoreError when no store answers and
        there is no local one.
        """
        named, described = by_name(filter), by_metadata(metadata)
        own = self._own()

        def entries(it: Listing[Stats]) -> Iterator[Stats]:
            for found in listing.items(self._places, self.name, own, it):
                if named(found.name) and described(found.metadata):
                    yield found

        return Listing(entries)

    def keys(self, filter: object = None, /, **metadata: Any) -> Listing[str]:
        """The names of the items that `find` gives, in the same way."""
        found = self.find(filter, **metadata)

        def entries(it: Listing[str]) -> Iterator[str]:
            for stats in found:
                it.reason, it.problems = found.reason, found.problems
                yield stats.name
            it.reason, it.problems = found.reason, found.problems

        return Listing(entries)

    # Changing
    # ----------------------------------------------------------------------------------------------------------

    def put(
        self, name: object, source: Given, metadata: Mapping[str, Any] | None = None, buffer_size: int = BUFFER
    ) -> Stats:
        """Store an item: a new one, or the next version of the one there is, which keeps its earlier ones.

        `source`: bytes, a path, or a binary stream, read from where it stands in pieces of `buffer_size` bytes; one
        that cannot seek goes through a temporary file. `metadata`: text to JSON values, 256 KiB together; this
        version's own. Gives what `stats` would; with `waiting` when it is only on this machine yet. Raises UsageError,
        NotFound when the bucket was removed, OSError of a path, Full, Denied, StoreError.
        """
        text, checked = self._check(name), form.check_metadata(metadata)
        with opened(source, buffer_size) as given:
            return self._put(text, given, checked)

    def _put(self, name: str, source: Source, metadata: dict[str, Any]) -> Stats:
        own, hub = self._join(name)
        return self._named(self._places.put(self.name, name, source, metadata, own, hub), name)

    def copy(self, name: object, target: object, version: int | None = None, bucket: "Bucket | None" = None) -> Stats:
        """Put an item's latest version, or this one, with its metadata, under another name, in this bucket or another
        one of the same `Objects`; inside the store where it can. Raises what `get` and `put` do."""
        text, other = self._check(name), bucket or self
        into = self._check(target)
        chosen = self._choose(self._look(text), text, version)
        own, hub = other._join(into)
        seen = self._places.copy(self.name, text, chosen, other.name, into, own, hub)
        if seen is None:
            with self.get(text, chosen.number) as item:
                return other.put(into, item, item.metadata)
        return other._named(seen, into)

    def remove(self, name: object, version: int | None = None) -> None:
        """Remove an item with all its versions, or this version only. Numbers are not used again. In a transaction
        it is gone for others at the end. Raises NotFound, UsageError, Refused for what only a backing store has,
        StoreError."""
        text = self._check(name)
        home = self._places.home.shelf

        def make(record: Record) -> Change:
            chosen = self._choose(Seen(record), text, version)
            ids = {chosen.id} if version is not None else {each.id for each in record.versions}
            home.refuse_removing(form.item_prefix(self.name, text), ids, version is None)
            return Change("remove", own, ids=tuple(sorted(ids)))

        own, hub = self._join(text)
        self._places.change(self.name, text, make, own, hub)

    def update_metadata(self, name: object, metadata: Mapping[str, Any], version: int | None = None) -> Stats:
        """Merge into the metadata of an item's latest version, or of this one: names given replace those there are.
        Makes no new version. Raises NotFound, UsageError, StoreError."""
        return self._describe(self._check(name), metadata, version, merge=True)

    def set_metadata(self, name: object, metadata: Mapping[str, Any], version: int | None = None) -> Stats:
        """Replace the metadata of an item's latest version, or of this one. Makes no new version. Raises NotFound,
        UsageError, StoreError."""
        return self._describe(self._check(name), metadata, version, merge=False)

    def _describe(self, name: str, metadata: Mapping[str, Any], version: int | None, merge: bool) -> Stats:
        given = form.check_metadata(metadata)
        described: list[str] = []

        def make(record: Record) -> Change:
            chosen = self._choose(Seen(record), name, version)
            form.check_metadata({**(chosen.metadata if merge else {}), **given})
            described.append(chosen.id)
            return Change("metadata", own, ids=(chosen.id,), metadata=given, merge=merge)

        own, hub = self._join(name)
        seen = self._places.change(self.name, name, make, own, hub)
        return self._named(replace(seen, meant=described[-1]), name)

    def push(self, name: object) -> None:
        """On a `MountedStore`: move an item down into the backing store, all its versions, bytes first. Readers find it
        at every moment; one that was cut short is done again. Versions that the backing store got meanwhile stay, and
        ours get higher numbers. Raises UsageError on other stores and inside a transaction, NotFound, Refused,
        Conflict, WrongBytes, StoreError."""
        text = self._check(name)
        shelf = self._places.home.shelf
        if self._own():
            raise UsageError("push does not belong to a transaction: push when it has ended")
        if not isinstance(shelf, MountedShelf):
            raise UsageError(f"{shelf.store.name} is not mounted on another store: there is nothing to push to")
        shelf.push(self.name, text)

    # Inside
    # ----------------------------------------------------------------------------------------------------------

    def _check(self, name: object) -> str:
        return form.check_name(text_of(name), "item")

    def _own(self) -> str:
        current = self._transactions.current()
        return current.id if current else ""

    def _join(self, name: str) -> tuple[str, Events]:
        """The transaction that a change belongs to, and the hub for its events."""
        current = self._transactions.current()
        if current is None:
            return "", self._objects._events
        current.items[(self.name, name)] = None
        return current.id, current.hub

    def _look(self, name: str) -> Seen:
        return self._places.look(self.name, name, self._own())

    def _choose(self, seen: Seen, name: str, version: int | None) -> Version:
        """The version that is meant. Raises NotFound, UsageError."""
        found = seen.record.versions
        if version is not None and (type(version) is not int or version < 1):
            raise UsageError(f"version = {version!r}: versions are numbered from 1")
        if not found:
            raise NotFound(self._missing(name))
        if version is None:
            return found[-1]
        for each in found:
            if each.number == version:
                return each
        numbers = ", ".join(str(each.number) for each in found[-10:])
        raise NotFound(f"item {name!r} in bucket {self.name!r} has no version {version}; it has {numbers}")

    def _missing(self, name: str) -> str:
        with suppress(StoreError):
            if not self._places.home.shelf.has_bucket(self.name):
                return f"there is no bucket {self.name!r}; make it with bucket({self.name!r})"
        return f"there is no item {name!r} in bucket {self.name!r}; keys() lists what there is"

    def _named(self, seen: Seen, name: str) -> Stats:
        """What is known of the version that was changed."""
        return self._stats(seen, name, next(each for each in seen.record.versions if each.id == seen.meant))

    def _stats(self, seen: Seen, name: str, version: Version) -> Stats:
        return stats_of(self.name, name, version, seen.stale, version.id in seen.waiting)

    def _calculated(self, name: str, stale: str) -> Item | None:
        """The item as a store that calculates makes it, under the key `<bucket>/<name>`; None where none does."""
        key = keys.encode(f"{self.name}/{name}".encode())
        for store in self._places.calculating:
            with suppress(NotFound):
                size = store.stat(key).size
                content = digest_of(lambda offset, length, s=store: s.read(key, offset, length), size)  # type: ignore[misc]
                made = form.calculated(content)
                chunks = Verified(key, made, [Calculated(store, key)], digests=content.chunks)
                return Item(stats_of(self.name, name, made, stale), chunks)
        return None
