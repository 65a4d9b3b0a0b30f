"""Several stores that hold copies of the same objects, as one: a read comes from the first that has the object.

Used through `FirstStore([near, far])` where it does not matter which store a copy comes from: the contents of records,
whose names or digests say what they are. Blocks as its stores do.

- What is under a key is taken to be the same in every store that has it. Where that is not so (an object was
  replaced in one of them only), a read may give either, and a second range of it the other.
- Order: if it can be written to, the first store given, so that one reads what one wrote. Then by health (a store
  whose last call failed less than 30 seconds ago is asked last), then by nearness (the time that the quickest of its
  last calls took, in steps of a factor of four), then as given; stores that calculate come last of all.
- A store that fails is passed over and noted in `problems`. NotFound is raised only when every store answered that
  it has none; where some could not be asked, that is Unreachable, and says which. Listings leave out what only
  unreachable stores have, say so in `problems`, and fail when no store answers.
- An explicit `deadline` is for the call, shared among the stores that are still to be asked; without one each store
  has its own.
- Changes go to the first store given, as if it were mounted on the others (`mounted.py`): conditions count for all
  of them, and deleting or moving what others hold too is refused or leaves theirs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from vfs.errors import NotFound, StoreError, Unreachable
from vfs.stores import keys
from vfs.stores.base import PROBLEMS_KEPT, BaseStore
from vfs.stores.health import Health
from vfs.stores.limits import Limits
from vfs.stores.merging import merge
from vfs.stores.mounted import MountedStore
from vfs.stores.probing import check_store
from vfs.stores.protocol import Arrived, Check, Info, Stat, Store
from vfs.stores.urls import read_only_error

T = TypeVar("T")
SMALL = 64 * 1024  # bytes up to which a read says how near a store is, rather than how fast


class FirstStore(BaseStore):
    """`stores` as one. They belong to it: `disconnect` disconnects them. `read_only`: only reads; then the order of the
    stores as given matters least. Without a store everything is NotFound, and it is read-only."""

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        name: str | None = None,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(
            name or "first of " + ", ".join(store.name for store in stores),
            "first of " + ", ".join(store.url for store in stores),
            read_only=read_only or not stores or stores[0].info().read_only,
            limits=limits,
        )
        self.stores = tuple(stores)
        self.health = tuple(Health() for _ in stores)
        kinds = {store.info().checksum for store in stores}
        self._checksum = kinds.pop() if len(kinds) == 1 else None  # of all of them, or of none
        self._written: MountedStore | None = None
        if not self._read_only:
            others = ", ".join(store.name for store in stores[1:])
            rest = FirstStore(stores[1:], name=others, read_only=True, limits=limits)
            rest.health = self.health[1:]
            self._written = MountedStore(stores[0], "", rest, name=self.name, limits=limits)

    def info(self) -> Info:
        infos = [store.info() for store in self.stores]
        first = self._written.info() if self._written else Info(broker="first")
        return Info(
            broker="first",
            ranges=all(info.ranges for info in infos),
            lists=all(info.lists for info in infos),
            atomic_replace=first.atomic_replace,
            conditional_write=first.conditional_write,
            checksum=self._checksum,
            read_only=self._read_only,
            max_object=first.max_object,
            chooses_keys=first.chooses_keys,
            resumes=first.resumes,
            exact_versions=all(info.exact_versions for info in infos),
            sweeps=first.sweeps,
            calculates=any(info.calculates for info in infos),
        )

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        super().connect(credentials)
        for store in self.stores:
            store.connect()

    def disconnect(self) -> None:
        super().disconnect()
        for store in self.stores:
            store.disconnect()

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        """What interrupted uploads left in the first store, which is the one written to."""
        return self._changing("sweep").sweep(older_than_s, deadline=deadline)

    def check(self) -> Check:
        """Try them as a whole; a store that was passed over on the way is a problem."""
        found = check_store(self)
        found.problems += [
            health.error for health in self.health if health.error and health.error not in found.problems
        ]
        return found

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._shown(self._ask("stat", key, lambda store, left: store.stat(key, deadline=left), deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)

        def read(store: Store, left: float | None) -> bytes:
            return store.read(key, start, length, deadline=left)

        return self._ask("read", key, read, deadline, measured=length is not None and length <= SMALL)

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

        def read(store: Store, left: float | None) -> int:
            return store.read_into(key, buffer, start, arrived=arrived, deadline=left)

        return self._ask("read", key, read, deadline, measured=len(buffer) <= SMALL)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        return self._merged(prefix, recursive, deadline)

    def local_path(self, key: str) -> Path | None:
        self._begin("local_path", keys.check_readable(key))

        def path(store: Store, _: float | None) -> Path:
            found = store.local_path(key)
            if found is None:
                raise NotFound(f"{store.name}: {key} is no file of this machine")
            return found

        try:
            return self._ask("local_path", key, path, None, measured=False)
        except NotFound:
            return None

    # Changes
    # ----------------------------------------------------------------------------------------------------------

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
        stat = self._changing("upload", keys.check_writable(key)).upload(
            key,
            source,
            size,
            if_absent=if_absent,
            if_version=if_version,
            progress=progress,
            deadline=deadline,
        )
        return self._shown(stat)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        written = self._changing("copy", keys.check_writable(target))
        return self._shown(written.copy(source, target, if_absent=if_absent, deadline=deadline))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        written = self._changing("move", keys.check_writable(target))
        return self._shown(written.move(source, target, if_absent=if_absent, deadline=deadline))

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._changing("delete", keys.check_readable(key)).delete(key, deadline=deadline)

    # Which store
    # ----------------------------------------------------------------------------------------------------------

    def _changing(self, operation: str, key: str = "") -> MountedStore:
        self._begin(operation, key, changes=True)
        if self._written is None:
            raise read_only_error(self.name, operation)
        return self._written

    def _order(self) -> Sequence[tuple[Store, Health]]:
        """The stores in the order to ask them."""

        def rank(numbered: tuple[int, tuple[Store, Health]]) -> tuple[object, ...]:
            number, (store, health) = numbered
            return (store.info().calculates, not (number == 0 and self._written), *health.rank, number)

        return [pair for _, pair in sorted(enumerate(zip(self.stores, self.health, strict=True)), key=rank)]

    def _ask(
        self,
        what: str,
        key: str,
        call: Callable[[Store, float | None], T],
        deadline: float | None,
        *,
        measured: bool = True,
    ) -> T:
        """The answer of the first store that has one. Raises NotFound, Unreachable."""
        order = self._order()
        budget = None if deadline is None else self._limits.budget(deadline)
        failed: list[str] = []
        for number, (store, health) in enumerate(order):
            share = None if budget is None else budget.left() / (len(order) - number)
            try:
                with health.watched(measured=measured):
                    return call(store, share)
            except NotFound:
                continue
            except StoreError as error:
                failed.append(self._pass_over(store, error))
        if failed:
            raise Unreachable(f"{self.name}: {what} {key}: no store that answers has it; {'; '.join(failed)}")
        raise NotFound(f"{self.name}: there is no {key}")

    def _merged(self, prefix: str, recursive: bool, deadline: float | None) -> Iterator[Stat]:
        order = self._order()
        failed: list[str] = []

        def listing(store: Store, health: Health) -> Iterator[Stat]:
            try:
                with health.watched(measured=False):
                    yield from store.list(prefix, recursive=recursive, deadline=deadline)
            except StoreError as error:
                failed.append(self._pass_over(store, error))

        def has(number: int, key: str) -> bool:
            try:
                order[number][0].stat(key, deadline=deadline)
            except StoreError:  # what could not be listed either gave nothing twice
                return False
            return True

        yield from map(self._shown, merge([listing(*pair) for pair in order], has))
        if failed and len(failed) == len(order):
            raise Unreachable(f"{self.name}: list {prefix}: no store answers; {'; '.join(failed)}")

    def _pass_over(self, store: Store, error: StoreError) -> str:
        """Note a store that could not be asked: the last reason for each."""
        head = f"{store.name} was passed over: "
        others = [sentence for sentence in self.problems if not sentence.startswith(head)]
        self.problems[:] = [*others[: PROBLEMS_KEPT - 1], f"{head}{error}"]
        return str(error)

    def _shown(self, stat: Stat) -> Stat:
        """Without a checksum where `info` promises none."""
        return stat if self._checksum else replace(stat, checksum=None)
