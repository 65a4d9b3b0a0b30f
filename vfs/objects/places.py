"""Where the items of an `Objects` are: the store they are written to, others that have copies, and this machine.

Used by `buckets.py` and its listings. Blocks for the stores. Which store is asked for what:

- Which versions an item has says the first store (the home): the others only where it has no record of the item, or
  cannot be asked; then what was kept here counts too, and the answer is marked as stale, with the reason.
- The bytes of a version never change, so they come from wherever they are: this machine, then the stores by health
  and nearness.
- A home that failed less than 30 s ago is not asked again for what is here anyway: nobody waits for it each time.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vfs.errors import ManifestError, NotFound, RunfsError, StoreError, UsageError, WrongBytes
from vfs.events import Events, ObjectDeleted, ObjectSet
from vfs.objects import format as form
from vfs.objects.format import Change, Record, Version
from vfs.objects.item import Place, Verified
from vfs.objects.mounted import MountedShelf
from vfs.objects.offline import Local, Waiting, overlaid
from vfs.objects.shelf import Make, Shelf
from vfs.objects.source import Digesting, Source
from vfs.stores import Store
from vfs.stores.health import Health
from vfs.stores.mounted import MountedStore


@dataclass(frozen=True, slots=True)
class Seen:
    """An item as it can be seen now. `stale`: why it may be different by now. `waiting`: the ids of versions that
    are only here yet. `meant`: the id of the version that a change made."""

    record: Record
    stale: str = ""
    waiting: frozenset[str] = frozenset()
    meant: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the changes that waited: how many were `sent`, how many are `left`; `problems` says why."""

    sent: int
    left: int
    problems: tuple[str, ...]


class Watched:
    """A store's items, and how the store has been doing."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.name = store.name
        self.shelf = MountedShelf(store) if isinstance(store, MountedStore) else Shelf(store)
        self.health = Health()

    def view(self, prefix: str, own: str = "") -> Record:
        with self.health.watched():
            return self.shelf.view(prefix, own)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self.health.watched(measured=False):
            return self.store.read(key, start, length)


class Places:
    """All the places of an `Objects`. Raises UsageError when there is no store among `stores` that keeps anything."""

    def __init__(self, stores: Sequence[Store], local: Store | None, events: Events) -> None:
        kept = [Watched(store) for store in stores if not store.info().calculates]
        if not kept:
            raise UsageError("give a store that keeps what is put there (one that calculates only gives)")
        self.home, *self.others = kept
        self.calculating = [store for store in stores if store.info().calculates]
        self.local = Local(local) if local is not None else None
        self.events = events
        self._settling = threading.Lock()

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def look(self, bucket: str, name: str, own: str = "") -> Seen:
        """The item; without versions where there is none. Raises StoreError when nobody who may have it answers."""
        prefix = form.item_prefix(bucket, name)
        changes = self.local.of(bucket, name) if self.local else []
        record, stale = self._record(prefix, bucket, name, own, known=bool(changes))
        waiting = frozenset(change.version.id for change in changes if change.version)
        return Seen(replace(overlaid(record, changes), bucket=bucket, name=name), stale, waiting)

    def _record(self, prefix: str, bucket: str, name: str, own: str, known: bool) -> tuple[Record, str]:
        """The record that counts, and why it may not be the latest. `known`: there is something of it here anyway."""
        failed: list[RunfsError] = []
        found: list[Record] = []
        for place in self._asked_for_records():
            try:
                record = place.view(prefix, own)
            except (StoreError, ManifestError) as error:
                failed.append(error)
                continue
            if record.name and not failed and not self._resting():
                if not own:
                    self.remember(bucket, name, record)
                return record, ""
            if record.name:
                found.append(record)
        return self._without_home(bucket, name, found, failed, known)

    def _without_home(
        self, bucket: str, name: str, found: list[Record], failed: list[RunfsError], known: bool
    ) -> tuple[Record, str]:
        resting = self._resting()
        if not failed and not resting:
            self.remember(bucket, name, Record(bucket, name))
            return Record("", ""), ""
        kept = self.local.record(bucket, name) if self.local else Record("", "")
        best = max((record for record in [kept, *found] if record.name), key=lambda each: each.next, default=None)
        if best is None and not known and not failed:  # nothing of it is here: ask after all
            return self.home.view(form.item_prefix(bucket, name)), ""
        if best is None and not known:
            raise failed[0]
        return best or Record("", ""), resting or str(failed[0])

    def _asked_for_records(self) -> list[Watched]:
        others = sorted(self.others, key=lambda place: place.health.rank)
        return others if self._resting() else [self.home, *others]

    def _resting(self) -> str:
        """Why the home is not asked now; "" when it is."""
        health = self.home.health
        return health.error or "" if self.local is not None and not health.healthy else ""

    def remember(self, bucket: str, name: str, record: Record) -> None:
        if self.local is not None:
            self.local.remember(bucket, name, record)

    def chunks(self, bucket: str, name: str, version: Version) -> Verified:
        """The bytes of a version: from this machine, then from the stores by health and nearness."""
        prefix = form.item_prefix(bucket, name)
        places: list[Place] = [*sorted([self.home, *self.others], key=lambda place: place.health.rank)]
        if self.local is None:
            return Verified(prefix, version, places)
        local = self.local
        return Verified(prefix, version, [local.store, *places], local.kept(prefix, version.id))

    # Changing
    # ----------------------------------------------------------------------------------------------------------

    def put(self, bucket: str, name: str, source: Source, metadata: dict[str, object], own: str, hub: Events) -> Seen:
        """Store the bytes, then name them in the item's record: here, where they wait, if the home does not answer."""
        made = Version(0, form.new_id(), source.size, time.time_ns(), "", "", metadata)
        if not self._must_wait(bucket, name, own):
            try:
                return replace(self._put_home(bucket, name, source, made, own, hub), meant=made.id)
            except StoreError as error:
                if not error.temporary or own or self.local is None:
                    raise
        assert self.local is not None
        self._must_know(bucket)
        version = self._upload(self.local.store, bucket, name, source, made, hub)
        self.local.add(bucket, name, Change("put", version=version))
        return replace(self.look(bucket, name), meant=made.id)

    def _put_home(self, bucket: str, name: str, source: Source, made: Version, own: str, hub: Events) -> Seen:
        home, prefix = self.home, form.item_prefix(bucket, name)
        naming = False
        try:
            with home.health.watched(measured=False):
                version = self._upload(home.store, bucket, name, source, made, hub)
                naming = True
                return self.change_home(bucket, name, self._put_in(bucket, version, own), own, hub)
        except BaseException as error:
            if not naming or (isinstance(error, StoreError) and not error.temporary):
                home.shelf.discard(prefix, {made.id})  # else it may be named there by now
            raise

    def _put_in(self, bucket: str, version: Version, own: str) -> Make:
        def make(record: Record) -> Change:
            if record.next == 1 and not self.home.shelf.has_bucket(bucket):
                raise NotFound(f"{self.home.name}: there is no bucket {bucket!r}; make it with bucket({bucket!r})")
            return Change("put", own, version)

        return make

    def _upload(self, store: Store, bucket: str, name: str, source: Source, made: Version, hub: Events) -> Version:
        """Store the bytes of a version under its id; the version with its digests."""
        prefix = form.item_prefix(bucket, name)
        digesting = Digesting(source)
        with hub.progress("put", f"{bucket}/{name}", source.size, store=store.name) as step:
            stat = store.upload(prefix + form.DATA + made.id, digesting.read, source.size, progress=step)
        if stat.size != source.size:
            raise WrongBytes(f"{store.name} took {stat.size} of {source.size} bytes of {bucket}/{name}: do not use it")
        content = digesting.content()
        chunks = ""
        if content.count > 1:
            store.write(prefix + form.DIGESTS + made.id, content.chunks)
            chunks = form.digest(content.chunks)
        return replace(made, digest=content.digest.hex(), chunks=chunks)

    def copy(
        self, bucket: str, name: str, version: Version, target_bucket: str, target: str, own: str, hub: Events
    ) -> Seen | None:
        """Copy a version inside the home; None where that cannot be, and its bytes have to go through here."""
        if self._must_wait(target_bucket, target, own):
            return None
        source, into = form.item_prefix(bucket, name), form.item_prefix(target_bucket, target)
        made = replace(version, id=form.new_id(), created_ns=time.time_ns())
        try:
            for kind in (form.DATA, form.DIGESTS) if version.chunks else (form.DATA,):
                self.home.store.copy(source + kind + version.id, into + kind + made.id)
            make = self._put_in(target_bucket, made, own)
            with self.home.health.watched(measured=False):
                return replace(self.change_home(target_bucket, target, make, own, hub), meant=made.id)
        except StoreError as error:
            if not error.temporary:
                self.home.shelf.discard(into, {made.id})
                if not isinstance(error, NotFound):
                    raise
            elif self.local is None or own:
                raise
            return None

    def change(self, bucket: str, name: str, make: Make, own: str, hub: Events) -> Seen:
        """Change an item's record: in the home; here, where it waits, if that does not answer."""
        if not self._must_wait(bucket, name, own):
            try:
                with self.home.health.watched(measured=False):
                    return self.change_home(bucket, name, make, own, hub)
            except StoreError as error:
                if not error.temporary or own or self.local is None:
                    raise
        assert self.local is not None
        change = make(self.look(bucket, name).record)
        if change is not None:
            self.local.add(bucket, name, change)
        return self.look(bucket, name)

    def change_home(self, bucket: str, name: str, make: Make, own: str, hub: Events) -> Seen:
        done: list[Change | None] = []

        def remembering(record: Record) -> Change | None:
            done.append(make(record))
            return done[-1]

        record = self.home.shelf.change(bucket, name, remembering, own)
        if not own:
            self.remember(bucket, name, record)
        self.tell(bucket, name, done[-1], hub)
        return Seen(record)

    def tell(self, bucket: str, name: str, change: Change | None, hub: Events) -> None:
        if change is not None:
            key = f"{bucket}/{name}"
            event = ObjectDeleted if change.kind == "remove" else ObjectSet
            hub.publish(event(self.home.name, key))

    # Offline
    # ----------------------------------------------------------------------------------------------------------

    def _must_wait(self, bucket: str, name: str, own: str) -> bool:
        """Whether a change is to wait here: the home is away, or earlier ones of the item wait still."""
        if self.local is None or own:
            return False
        if self._resting():
            return True
        if next(self.local.waiting(), None) is None:
            return False
        self.settle()
        return bool(self._resting() or self.local.of(bucket, name))

    def _must_know(self, bucket: str) -> None:
        """Raises NotFound for a bucket that was not here when the home answered last."""
        if self.local is not None and not self.local.shelf.has_bucket(bucket):
            raise NotFound(
                f"there was no bucket {bucket!r} when {self.home.name} answered last; try again when it does"
            )

    def settle(self) -> Settled:
        """Send what waits, oldest first. A change that fails holds back the later ones of its item only."""
        sent, problems, blocked = 0, [], set()
        with self._settling:
            waiting = list(self.local.waiting()) if self.local else []
            for each in waiting:
                if (each.bucket, each.name) in blocked:
                    continue
                try:
                    self._send(each)
                    sent += 1
                except RunfsError as error:
                    problems.append(f"{each.bucket}/{each.name}: {each.what}: {error}")
                    blocked.add((each.bucket, each.name))
                    if isinstance(error, StoreError) and error.temporary:
                        break
        return Settled(sent, len(waiting) - sent, tuple(problems))

    def _send(self, waiting: Waiting) -> None:
        assert self.local is not None
        with self.home.health.watched(measured=False):
            record = self.local.send(waiting, self.home.shelf)
        self.remember(waiting.bucket, waiting.name, record)
        self.tell(waiting.bucket, waiting.name, waiting.change, self.events)
