"""Random operations on objects and on a plain dictionary: always the same, also after crashes at any operation."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.layers.test_objects import open_kind
from tests.layers.test_objects_transactions import leftovers, state
from vfs.errors import NotFound, Refused, StoreTimeout, Unreachable
from vfs.manifest import CHUNK
from vfs.objects import Bucket, Objects, prefix_of
from vfs.objects import format as form
from vfs.stores import Store
from vfs.stores.memory import MemoryStore
from vfs.stores.memory import Objects as Content
from vfs.stores.mounted import MountedStore

Model = dict[str, list[tuple[bytes, dict[str, Any]]]]

NAMES = st.sampled_from(["a", "a/b", "a/b/c", "ü ", "%item", "x" * 700])
CONTENTS = st.sampled_from([0, 1, 5, CHUNK, CHUNK + 7])  # bytes
METADATA = st.dictionaries(st.sampled_from(["n", "m"]), st.integers(0, 2), max_size=2)
WHICH = st.one_of(st.none(), st.integers(0, 3))
CHANGES = st.one_of(
    st.tuples(st.just("put"), NAMES, CONTENTS, METADATA),
    st.tuples(st.just("put"), NAMES, CONTENTS, METADATA),
    st.tuples(st.just("set"), NAMES, METADATA, WHICH),
    st.tuples(st.just("update"), NAMES, METADATA, WHICH),
    st.tuples(st.just("remove"), NAMES, WHICH),
    st.tuples(st.just("copy"), NAMES, NAMES, WHICH),
)


def content_of(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


class Missing(Exception):
    """What the model says where the real one raises NotFound."""


def expected(model: Model, change: tuple[Any, ...]) -> Model:
    """The model after a change."""
    what, name, *rest = change
    after = {each: list(versions) for each, versions in model.items()}
    if what == "put":
        after.setdefault(name, []).append((content_of(rest[0]), rest[1]))
        return after
    which = rest[-1]
    if name not in after or (which is not None and which >= len(after[name])):
        raise Missing
    place = -1 if which is None else which
    content, metadata = after[name][place]
    if what == "copy":
        after.setdefault(rest[0], []).append((content, metadata))
    elif what == "remove":
        after[name] = [] if which is None else [each for n, each in enumerate(after[name]) if n != which]
        after = {each: versions for each, versions in after.items() if versions}
    else:
        after[name][place] = (content, rest[0] if what == "set" else {**metadata, **rest[0]})
    return after


def do(bucket: Bucket, change: tuple[Any, ...]) -> None:
    """The same change, for real."""
    what, name, *rest = change
    if what == "put":
        bucket.put(name, content_of(rest[0]), rest[1])
        return
    which = rest[-1]
    numbers = [] if which is None else [stats.version for stats in bucket.versions(name)]
    version = None if which is None else (numbers[which] if which < len(numbers) else 10**6)
    if what == "copy":
        bucket.copy(name, rest[0], version)
    elif what == "remove":
        bucket.remove(name, version)
    elif what == "set":
        bucket.set_metadata(name, rest[0], version)
    else:
        bucket.update_metadata(name, rest[0], version)


class Failing:
    """Makes a store fail from its n-th operation on, for good or once."""

    def __init__(self, number: int, for_good: bool) -> None:
        self.calls = itertools.count(1)
        self.number, self.for_good = number, for_good

    def __call__(self, operation: str, key: str) -> None:
        now = next(self.calls)
        if now == self.number or (self.for_good and now > self.number):
            raise (Unreachable if self.for_good else StoreTimeout)("as the test wants it")


class Broken:
    """Any store, with a call ahead of each operation."""

    def __init__(self, store: Store, before: Failing) -> None:
        self._store, self._before = store, before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("stat", "read", "write", "upload", "list", "delete", "copy"):
            return found

        def call(*arguments: Any, **more: Any) -> Any:
            self._before(name, "")
            return found(*arguments, **more)

        return call


class Machine(RuleBasedStateMachine):
    """`make(before)` gives a store on the same content each time. `removes`: what may be removed is known."""

    removes = True

    def make(self, before: Any = None) -> Store:
        return MemoryStore("lab", objects=self.content, before=before)

    def __init__(self) -> None:
        super().__init__()
        self.content = Content()
        self.model: Model = {}

    def allowed(self, *changes: tuple[Any, ...]) -> bool:
        return self.removes or all(change[0] != "remove" for change in changes)

    @initialize()
    def open(self) -> None:
        self.reopen()

    @rule()
    def reopen(self) -> None:
        self.objects = Objects(self.make())
        self.bucket = self.objects.bucket("b")

    @rule(change=CHANGES)
    def change(self, change: tuple[Any, ...]) -> None:
        if not self.allowed(change):
            return
        try:
            self.model = expected(self.model, change)
        except Missing:
            with pytest.raises(NotFound):
                do(self.bucket, change)
        else:
            do(self.bucket, change)

    @rule(changes=st.lists(CHANGES, max_size=4), commit=st.booleans())
    def transaction(self, changes: list[tuple[Any, ...]], commit: bool) -> None:
        inside = self.model
        if not self.allowed(*changes):
            return
        try:
            with self.objects.transaction():
                for change in changes:
                    inside = expected(inside, change)
                    do(self.bucket, change)
                    assert state(self.objects) == inside
                    assert state(Objects(self.make())) == self.model
                if not commit:
                    raise Missing
                self.model = inside
        except Missing:
            pass

    @rule(
        changes=st.lists(CHANGES, min_size=1, max_size=3),
        together=st.booleans(),
        number=st.integers(1, 40),
        for_good=st.booleans(),
        swept=st.booleans(),
    )
    def crash(self, changes: list[tuple[Any, ...]], together: bool, number: int, for_good: bool, swept: bool) -> None:
        """Whatever the store fails at: the change is there, or it is not; and if it was said to be done, it is."""
        if not together:
            changes = changes[:1]
        if not self.allowed(*changes):
            return
        try:
            after = self.model
            for change in changes:
                after = expected(after, change)
        except Missing:
            return
        broken = Objects(self.make(Failing(number, for_good)))
        try:
            if together:
                with broken.transaction():
                    for change in changes:
                        do(Bucket(broken, "b"), change)
            else:
                do(Bucket(broken, "b"), changes[0])
            told = True
        except (Unreachable, StoreTimeout):
            told = False
        self.reopen()
        seen = state(self.objects)
        assert seen == after or (seen == self.model and not told)
        self.model = seen
        if swept:
            self.sweep(True)

    @rule(abandoned=st.booleans())
    def clean_up(self, abandoned: bool) -> None:
        self.sweep(abandoned)

    def sweep(self, abandoned: bool) -> None:
        self.objects.sweep(older_than_s=0, **({"abandoned_s": 0} if abandoned else {}))
        if abandoned and self.removes:
            store = self.make()
            assert [left for left in leftovers(store) if not left.startswith(form.TRANSACTIONS)] == []
            kept = sum("%data" in stat.key for stat in store.list())
            assert kept == sum(map(len, self.model.values()))

    @precondition(lambda self: self.model)
    @rule(n=st.integers(0, 2))
    def find(self, n: int) -> None:
        wanted = {name for name, versions in self.model.items() if versions[-1][1].get("n") == n}
        assert set(self.bucket.keys(n=n)) == wanted
        assert {stats.name for stats in self.bucket.find("a*")} == {name for name in self.model if name[0] == "a"}

    @invariant()
    def is_the_same(self) -> None:
        if hasattr(self, "objects"):
            assert state(self.objects) == self.model
            for name in self.model:
                numbers = [stats.version for stats in self.bucket.versions(name)]
                assert numbers == sorted(set(numbers))


class MountedMachine(Machine):
    """The same on a mounted store, whose items are pushed down now and then, also with a crash in between."""

    removes = False  # what is behind is not to be removed: that is refused, and has its own tests

    def __init__(self) -> None:
        super().__init__()
        self.behind = Content()
        Objects(MemoryStore(objects=self.behind)).bucket("b")

    def make(self, before: Any = None) -> Store:
        front, backing = (MemoryStore("lab", objects=each, before=before) for each in (self.content, self.behind))
        return MountedStore(front, prefix_of("b"), backing)

    @rule(name=NAMES, number=st.one_of(st.none(), st.integers(1, 60)), for_good=st.booleans())
    def push(self, name: str, number: int | None, for_good: bool) -> None:
        objects = Objects(self.make(Failing(number, for_good) if number else None))
        try:
            Bucket(objects, "b").push(name)
        except NotFound:
            assert name not in self.model
        except Refused:
            pass  # a transaction that was cut short is in the way, until it is swept
        except (Unreachable, StoreTimeout):
            assert number
        else:
            behind = Objects(MemoryStore(objects=self.behind))
            assert state(behind)[name] == self.model[name]


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def run(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=QUIET, database=None
        ),
    )


def test_on_memory() -> None:
    run(Machine, 80, 20)


def test_on_a_mounted_store() -> None:
    run(MountedMachine, 30, 20)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_on_real_stores(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A few examples; each with a place of its own."""
    stores: list[Store] = []
    numbers = itertools.count()

    class Real(Machine):
        def __init__(self) -> None:
            super().__init__()
            directory = tmp_path / str(next(numbers))
            directory.mkdir()
            self.real = open_kind(request, kind, directory)
            stores.append(self.real)

        def make(self, before: Any = None) -> Store:
            return self.real if before is None else Broken(self.real, before)

    run(Real, 3, 8)
    for store in stores:
        store.disconnect()
