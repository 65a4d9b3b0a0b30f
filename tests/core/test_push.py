"""Pushing: the layout in the store, one commit point, crashes after each step, other hosts, files that change."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.core.doing import Worker, trace
from tests.core.making import (
    FILES,
    NESTED,
    OLD_NS,
    UUID,
    Broken,
    Hooked,
    Place,
    contents,
    everything,
    holes_below,
    hooked,
    noise,
    unit_of,
    write_record,
)
from vfs.core import data_key, manifest_key, plain_key
from vfs.errors import Conflict, Unreachable
from vfs.manifest import CHUNK, parse
from vfs.push import Outcome
from vfs.session import Session
from vfs.stores import Info, Stat, register
from vfs.stores.base import BaseBroker
from vfs.stores.memory import MemoryStore
from vfs.uploads import SMALL
from vfs.versions.kept import version_key

LARGE = SMALL + CHUNK + 3


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A project whose store is a memory store that can be looked into."""
    return Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    place.record()
    with place.session() as session:
        yield session


def push(session: Session, uuid: str = UUID) -> Outcome:
    outcome = session.pusher.push(unit_of(session, uuid))
    assert not outcome.failed, outcome.failed
    return outcome


def published(store: Hooked, uuid: str = UUID) -> dict[bytes, bytes]:
    """The record as another host finds it in the store: by path, read through the manifest's keys."""
    manifest = parse(store.raw(manifest_key(uuid)), uuid)
    found = {file.path: store.raw(file.key) for file in manifest.files if file.kind == "file"}
    for file in manifest.files:
        if file.kind == "file":
            assert blake3(found[file.path]).digest() == file.digest, file.path
    return found


# --- the layout ----------------------------------------------------------------------------------------------------


def test_first_content_is_plain_objects_and_one_manifest(session: Session, place: Place) -> None:
    outcome = push(session)
    store, here = hooked(session), contents(place.directory())
    assert outcome.clean
    assert store.names() == {plain_key(UUID, path) for path in here} | {manifest_key(UUID)}
    assert plain_key(UUID, b"caf\xe9 \xff.dat") == f"{UUID}/caf%E9%20%FF.dat"
    for path, content in here.items():  # also where two paths have the same content
        assert store.raw(plain_key(UUID, path)) == content
    assert published(store) == here


def test_the_file_store_is_a_directory_anybody_can_read(tmp_path: Path) -> None:
    place = Place(tmp_path / "host")
    place.record()
    with place.session() as session:
        push(session)
    assert (place.store / UUID / "weights.npy").read_bytes() == FILES[b"weights.npy"]
    assert (place.store / ".runfs" / UUID / "manifest.json").exists()


def test_the_manifest_is_written_last(session: Session) -> None:
    push(session)
    changes = [key for operation, key in hooked(session).done if operation in ("write", "upload")]
    assert changes[-1] == manifest_key(UUID)
    assert changes.count(manifest_key(UUID)) == 1


def test_the_manifest_says_everything(session: Session, place: Place) -> None:
    os.symlink("weights.npy", place.directory() / "latest")
    os.chmod(place.directory() / "metrics.json", 0o640)
    push(session)
    manifest = parse(hooked(session).raw(manifest_key(UUID)), UUID)
    files = manifest.by_path()
    assert files[b"latest"].target == b"weights.npy"
    assert (files[b"metrics.json"].mode, files[b"metrics.json"].mtime_ns) == (0o640, OLD_NS)
    assert files[b"notes/by step"].kind == "directory"
    assert [row["record_id"] for row in manifest.rows] == [UUID]


def test_later_content_goes_beside_and_nothing_is_overwritten(session: Session, place: Place) -> None:
    push(session)
    store = hooked(session)
    before = {key: store.raw(key) for key in store.names() if key != manifest_key(UUID)}
    (place.directory() / "metrics.json").write_bytes(b"later")
    (place.directory() / "new").write_bytes(b"first")
    outcome = push(session)
    assert (outcome.pushed[0].files, outcome.pushed[0].size) == (2, 10)
    added = store.names() - set(before) - {manifest_key(UUID)}
    assert added == {data_key(UUID, blake3(b"later").digest()), plain_key(UUID, b"new"), version_key(UUID, 1)}
    assert {key: store.raw(key) for key in before} == before
    assert published(store) == contents(place.directory())


def test_a_second_push_moves_nothing(session: Session) -> None:
    push(session)
    store = hooked(session)
    store.done.clear()
    outcome = push(session)
    assert outcome.clean
    assert [operation for operation, _key in store.done if operation in ("write", "upload")] == []


def test_a_rename_moves_no_bytes(session: Session, place: Place) -> None:
    push(session)
    os.rename(place.directory() / "weights.npy", place.directory() / "renamed.npy")
    assert push(session).pushed[0].size == 0
    assert published(hooked(session)) == contents(place.directory())


def test_a_path_that_comes_back_with_other_content(session: Session, place: Place) -> None:
    """Its plain name was freed in the manifest, but the object is still there."""
    path = place.directory() / "metrics.json"
    push(session)
    path.unlink()
    push(session)
    path.write_bytes(b"reborn")
    push(session)
    store = hooked(session)
    assert store.raw(plain_key(UUID, b"metrics.json")) == FILES[b"metrics.json"]
    assert published(store)[b"metrics.json"] == b"reborn"


def test_a_nested_record_goes_with_its_root(place: Place) -> None:
    root = place.record()
    write_record(root / "executions" / NESTED, NESTED, {b"out.bin": noise(10)}, parent=UUID)
    place.ingest(root / "executions" / NESTED)
    with place.session() as session:
        push(session)
        manifest = parse(hooked(session).raw(manifest_key(UUID)), UUID)
    assert {row["record_id"] for row in manifest.rows} == {UUID, NESTED}
    assert b"executions/" + NESTED.encode() + b"/out.bin" in manifest.by_path()


def test_empty_sparse_and_large_files(place: Place) -> None:
    root = place.record(files={b"empty": b"", b"large": noise(LARGE)})
    with open(root / "sparse", "wb") as file:
        file.truncate(3 * CHUNK)
        file.seek(CHUNK)
        file.write(b"x")
    with place.session() as session:
        push(session)
        store = hooked(session)
        assert published(store) == contents(root)
        assert ("upload", plain_key(UUID, b"large")) in store.done, "a large file is streamed"


def test_five_thousand_files(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})
    files = {b"d%d/f%04d" % (n % 7, n): b"%d" % n for n in range(5000)}
    place.record(files=files)
    with place.session() as session:
        began = time.monotonic()
        push(session)
        first = time.monotonic() - began
        store = hooked(session)
        there = published(store)
        assert {path: there[path] for path in files} == files
        evicted = session.evictor.evict(unit_of(session))
        assert evicted.files >= 5000
        began = time.monotonic()
        push(session)
        assert time.monotonic() - began < max(first, 1.0)
        assert files.items() <= contents(unit_of(session).base).items()


# --- what goes wrong in the store ----------------------------------------------------------------------------------


def test_a_store_that_is_away_leaves_the_unit_dirty(session: Session) -> None:
    unit = unit_of(session)
    session.core.units.mark_dirty(unit, "test")

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    outcome = session.pusher.push(unit)
    assert [(name, type(error)) for name, error in outcome.failed] == [("lab", Unreachable)]
    assert not outcome.clean
    assert [row.uuid for row in session.core.journal.dirty()] == [UUID]
    hooked(session).hook = lambda _operation, _key: None
    assert push(session).clean
    assert session.core.journal.dirty() == []


def test_one_store_away_does_not_hold_the_other(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "disk": f"hooked://{tmp_path}/disk"})
    place.record()

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    with place.session() as session:
        hooked(session, "lab").hook = away
        outcome = session.pusher.push(unit_of(session))
        assert [name for name, _error in outcome.failed] == ["lab"]
        assert published(hooked(session, "disk")) == contents(place.directory())


def changes_of(place: Place) -> int:
    """How many operations a first push takes."""
    place.record()
    with place.session() as session:
        push(session)
        return len(hooked(session).done)


def end_after(number: int) -> Callable[[str, str], None]:
    """A hook that lets so many operations be, and none after them."""
    calls, guard = itertools.count(), threading.Lock()

    def end(operation: str, key: str) -> None:
        with guard:
            if next(calls) >= number:
                raise Broken(f"ended before {operation} {key}")

    return end


def test_a_process_that_ends_after_any_store_operation(tmp_path: Path) -> None:
    """A second session on the same state finishes; what was uploaded is adopted, nothing is written twice."""
    total = changes_of(Place(tmp_path / "count", {"lab": f"hooked://{tmp_path}/count"}))
    assert total > 10
    for number in range(total):
        place = Place(tmp_path / str(number), {"lab": f"hooked://{tmp_path}/{number}"})
        place.record()
        with place.session() as session:
            hooked(session).hook = end_after(number)
            with pytest.raises(Broken):
                session.pusher.push(unit_of(session))
        with place.session() as session:
            store = hooked(session)
            assert push(session).clean
            here = contents(place.directory())
            assert published(store) == here
            allowed = {plain_key(UUID, path) for path in here} | {manifest_key(UUID)}
            assert store.names() <= allowed, "what was uploaded before is adopted, not uploaded again elsewhere"


def test_killed_at_every_point_of_a_push(tmp_path: Path) -> None:
    first = Place(tmp_path / "first")
    first.record()
    points = trace(first.settings(), "push", UUID, tmp_path)
    assert {"push.scanned", "push.uploaded", "push.recorded", "push.published", "push.read"} <= set(points)
    for point in [*dict.fromkeys(points), "push.uploaded#5"]:
        place = Place(tmp_path / point.replace("#", "-"))
        place.record()
        assert Worker(place.settings(), [("push", UUID)], tmp_path, f"{point}=kill").killed()
        with place.session() as session:
            assert push(session).clean
            manifest = parse((place.store / ".runfs" / UUID / "manifest.json").read_bytes(), UUID)
            assert [f.path for f in manifest.files if f.kind == "file"] == sorted(contents(place.directory()))
            assert not list((place.store / ".runfs" / UUID).glob("data/*"))
            session.evictor.evict(unit_of(session))
            assert everything(session, unit_of(session)).items() >= FILES.items()


def test_killed_before_a_publish_is_recorded_and_changed_since(tmp_path: Path) -> None:
    """What is in the store then is our own: no second names for it, and what was removed since stays removed."""
    for first in (True, False):
        for point in ("push.published", "push.read"):
            place = Place(tmp_path / f"{point}-{first}")
            directory = place.record()
            if not first:
                assert Worker(place.settings(), [("push", UUID)], tmp_path).said() == [""]
                (directory / "later").write_bytes(b"one")
                (directory / "gone").write_bytes(b"soon")
            assert Worker(place.settings(), [("push", UUID)], tmp_path, f"{point}=kill").killed()
            (directory / "later").write_bytes(b"another")
            (directory / "metrics.json").write_bytes(b"changed since")
            (directory / "gone").unlink(missing_ok=True)
            (directory / "notes" / "model.bin").unlink()
            here = contents(directory)
            with place.session() as session:
                assert push(session).clean
                assert contents(directory) == here
                manifest = parse((place.store / ".runfs" / UUID / "manifest.json").read_bytes(), UUID)
                assert {file.path for file in manifest.files if file.kind == "file"} == set(here)
                assert session.core.journal.note(f"publishing {UUID} lab") is None


class Choosing(MemoryStore):
    """Gives objects keys of its own; those below `.runfs/` too, if its name begins with "all"."""

    def info(self) -> Info:
        return replace(super().info(), chooses_keys=True)

    def _put(self, key: str, data: bytes, if_absent: bool, if_version: str | None) -> Stat:
        if not key.startswith(".runfs/") or self.name.startswith("all"):
            key = f"chosen/{blake3(data).hexdigest()}"
        return super()._put(key, data, if_absent, if_version)


class ChoosingBroker(BaseBroker):
    def validate(self, config: Mapping[str, Any]) -> list[str]:
        return []

    def open(self, config: Mapping[str, Any]) -> Choosing:
        return Choosing(str(config["name"]))


register("choosing", ChoosingBroker())


def test_the_keys_that_a_store_chose_are_kept(tmp_path: Path) -> None:
    files = {**FILES, b"again.npy": FILES[b"weights.npy"], b"large": noise(LARGE, 5)}
    place = Place(tmp_path / "host", {"lab": "choosing://lab"})
    place.record(files=files)
    before = contents(place.directory())
    with place.session() as session:
        push(session)
        store = session.core.home("lab").store()
        manifest = parse(store.read(manifest_key(UUID)), UUID)
        named = {file.key for file in manifest.files if file.kind == "file"}
        assert {stat.key for stat in store.list("chosen/")} == named
        assert len(named) == len({file.digest for file in manifest.files if file.kind == "file"})
        session.evictor.evict(unit_of(session))
        assert everything(session, unit_of(session)) == before


def test_a_store_that_moves_the_manifest_too_is_no_home(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"all": "choosing://all"})
    place.record()
    with place.session() as session:
        outcome = session.pusher.push(unit_of(session))
        ((name, error),) = outcome.failed
        assert (name, outcome.clean) == ("all", False)
        assert "it can be no home of records" in str(error)


def test_an_object_of_somebody_else_under_the_plain_name(session: Session, place: Place) -> None:
    store = hooked(session)
    store.put(plain_key(UUID, b"metrics.json"), b"not ours")
    store.put(plain_key(UUID, b"weights.npy"), FILES[b"weights.npy"][:-1])
    push(session)
    assert store.raw(plain_key(UUID, b"metrics.json")) == b"not ours"
    assert published(store) == contents(place.directory())
    assert data_key(UUID, blake3(FILES[b"weights.npy"]).digest()) in store.names()


def test_uploaded_already_by_another_tool_is_adopted(session: Session, place: Place) -> None:
    store = hooked(session)
    for path, content in contents(place.directory()).items():
        store.put(plain_key(UUID, path), content)
    push(session)
    assert not any("/data/" in key for key in store.names())
    assert published(store) == contents(place.directory())


def test_wrong_bytes_under_a_digest_are_replaced(session: Session, place: Place) -> None:
    """Nothing can refer to them rightly, and without them the record could never be pushed."""
    store = hooked(session)
    store.put(plain_key(UUID, b"metrics.json"), b"not ours")
    store.put(data_key(UUID, blake3(FILES[b"metrics.json"]).digest()), b"torn")
    push(session)
    assert published(store) == contents(place.directory())


# --- another host --------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Place, Place]:
    """The same record on two hosts with one store, pushed by neither."""
    stores = {"lab": f"hooked://{tmp_path}"}
    one, two = Place(tmp_path / "one", stores), Place(tmp_path / "two", stores)
    for host in (one, two):
        host.record()
    return one, two


def settled(session: Session) -> None:
    """Push until there is nothing more to push."""
    for _ in range(4):
        if push(session).clean:
            return
    raise AssertionError("it never comes to rest")


def test_a_lost_race_to_publish_keeps_both(hosts: tuple[Place, Place]) -> None:
    one, two = hosts
    with one.session() as first, two.session() as second:
        settled(first)
        settled(second)
        (one.directory() / "from one").write_bytes(b"1")
        (two.directory() / "from two").write_bytes(b"2")
        (one.directory() / "metrics.json").write_bytes(b"ours")
        (two.directory() / "metrics.json").write_bytes(b"theirs")
        settled(first)
        settled(second)
        (one.directory() / "more").write_bytes(b"m")  # a host looks at the store when it has something to say
        settled(first)
        (two.directory() / "more still").write_bytes(b"m")
        settled(second)
        (one.directory() / "the end").write_bytes(b"m")
        (two.directory() / "the end").write_bytes(b"m")
        settled(first)
        settled(second)
        found = published(hooked(first))
        here, there = contents(one.directory()), contents(two.directory())
    assert here.items() <= there.items()
    assert there == found
    assert (found[b"from one"], found[b"from two"]) == (b"1", b"2")
    assert {content for path, content in found.items() if path.startswith(b"metrics.json")} == {b"ours", b"theirs"}
    assert holes_below(one.directory()) == holes_below(two.directory()) == []


def test_a_race_in_the_moment_of_publishing(hosts: tuple[Place, Place]) -> None:
    """The other host publishes between our last look and our write."""
    one, two = hosts
    (one.directory() / "from one").write_bytes(b"1")
    (two.directory() / "from two").write_bytes(b"2")
    with one.session() as first, two.session() as second:
        store = hooked(first)
        raced: list[bool] = []

        def race(operation: str, key: str) -> None:
            if (operation, key) == ("write", manifest_key(UUID)) and not raced:
                raced.append(True)
                push(second)

        store.hook = race
        push(first)
        store.hook = lambda _operation, _key: None
        assert raced
        found = published(store)
        assert (found[b"from one"], found[b"from two"]) == (b"1", b"2")
        assert contents(one.directory()) == found
        settled(second)
        (two.directory() / "more").write_bytes(b"m")  # a host looks at the store when it has something to say
        settled(second)
        assert contents(two.directory()) == published(store) == {**found, b"more": b"m"}


def test_a_host_that_publishes_again_and_again_does_not_hang_us(session: Session, place: Place) -> None:
    push(session)
    store = hooked(session)
    (place.directory() / "new").write_bytes(b"n")

    def meddle(operation: str, key: str) -> None:
        if (operation, key) == ("write", manifest_key(UUID)):
            store.put(key, store.raw(key))

    store.hook = meddle
    outcome = session.pusher.push(unit_of(session))
    assert [type(error) for _name, error in outcome.failed] == [Conflict]
    store.hook = lambda _operation, _key: None
    assert push(session).clean


def test_what_they_changed_is_whole_before_it_has_a_name_here(hosts: tuple[Place, Place]) -> None:
    """A working directory never holds a hole, also while their bytes are on their way, also when they never come."""
    one, two = hosts
    with one.session() as first, two.session() as second:
        settled(first)
        settled(second)
        (one.directory() / "weights.npy").write_bytes(noise(3 * CHUNK, 9))
        settled(first)
        seen: list[dict[bytes, bytes]] = []

        def look(operation: str, key: str) -> None:
            if operation == "read" and key != manifest_key(UUID):
                seen.append(contents(two.directory()))
                assert holes_below(two.directory()) == []

        (two.directory() / "mine").write_bytes(b"m")
        before = contents(two.directory())
        second_store = hooked(second)
        second_store.hook = look
        push(second)
        assert before in seen
        assert contents(two.directory())[b"weights.npy"] == noise(3 * CHUNK, 9)
        settled(second)

        (one.directory() / "weights.npy").write_bytes(noise(3 * CHUNK, 10))
        settled(first)
        (two.directory() / "mine").write_bytes(b"more")

        def away(operation: str, key: str) -> None:
            if operation == "read" and key != manifest_key(UUID):
                raise Unreachable("no route")

        second_store.hook = away
        assert second.pusher.push(unit_of(second)).failed
        assert contents(two.directory())[b"weights.npy"] == noise(3 * CHUNK, 9)
        assert holes_below(two.directory()) == []
        assert sorted(os.listdir(two.directory().parent)) == [UUID]


def test_what_is_written_here_while_theirs_arrives_is_kept(hosts: tuple[Place, Place]) -> None:
    one, two = hosts
    with one.session() as first, two.session() as second:
        settled(first)
        settled(second)
        (one.directory() / "weights.npy").write_bytes(b"theirs, large enough")
        settled(first)
        (two.directory() / "mine").write_bytes(b"m")

        def write(operation: str, key: str) -> None:
            if operation == "read" and "/data/" in key:
                (two.directory() / "weights.npy").write_bytes(b"written meanwhile")

        hooked(second).hook = write
        push(second)
        hooked(second).hook = lambda _operation, _key: None
        settled(second)
        found = published(hooked(second))
    assert found[b"weights.npy"] == b"written meanwhile"
    assert b"theirs, large enough" in found.values()


def test_a_file_that_is_open_for_writing_is_not_replaced(hosts: tuple[Place, Place]) -> None:
    one, two = hosts
    with one.session() as first, two.session() as second:
        settled(first)
        settled(second)
        (one.directory() / "metrics.json").write_bytes(b"theirs")
        settled(first)
        with open(two.directory() / "metrics.json", "ab") as log:
            (two.directory() / "mine").write_bytes(b"m")
            push(second)
            log.write(b" and on")
        settled(second)
        found = published(hooked(second))
    assert found[b"metrics.json"] == FILES[b"metrics.json"] + b" and on"
    assert b"theirs" in found.values()


def test_their_manifest_does_not_override_where_our_bytes_are(hosts: tuple[Place, Place]) -> None:
    """A manifest is hearsay: what we uploaded and proved is better known."""
    one, two = hosts
    with one.session() as first, two.session() as second:
        settled(first)
        settled(second)
        digest = blake3(FILES[b"weights.npy"]).digest()
        before = second.core.journal.replicas_of(UUID, "lab")[digest]
        (one.directory() / "new").write_bytes(b"n")
        settled(first)
        (two.directory() / "mine").write_bytes(b"m")
        settled(second)
        assert second.core.journal.replicas_of(UUID, "lab")[digest] == before


# --- files that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [(b"metrics.json", 13), (b"large", LARGE)])
def test_a_file_that_changes_between_digest_and_upload(tmp_path: Path, name: bytes, size: int) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})
    root = place.record(files={b"a": b"a", name: noise(size)})
    with place.session() as session:
        store, path = hooked(session), root / os.fsdecode(name)
        changed: list[bool] = []

        def change(operation: str, key: str) -> None:
            if operation in ("write", "upload") and not changed and (key == plain_key(UUID, name)):
                changed.append(True)
                with open(path, "r+b") as file:
                    file.write(b"CHANGED")

        store.hook = change
        outcome = session.pusher.push(unit_of(session))
        assert not outcome.failed
        assert changed
        if size > SMALL:
            assert outcome.unsettled
            assert not outcome.clean
            assert manifest_key(UUID) not in store.names()
        push(session)
        settled(session)
        assert published(store) == contents(root)


def test_a_change_during_the_push_leaves_it_dirty(session: Session, place: Place) -> None:
    unit = unit_of(session)
    session.core.units.mark_dirty(unit, "first")
    hooked(session).hook = lambda _operation, _key: unit.note_change()
    assert not push(session).clean
    hooked(session).hook = lambda _operation, _key: None
    assert [row.uuid for row in session.core.journal.dirty()] == [UUID]
    assert push(session).clean


# --- evicted records -----------------------------------------------------------------------------------------------


def test_a_store_that_is_added_later_gets_what_is_evicted(tmp_path: Path) -> None:
    first = {"lab": f"hooked://{tmp_path}/lab"}
    place = Place(tmp_path / "host", first)
    place.record()
    with place.session() as session:
        session.evictor.evict(unit_of(session))
    more = Place(tmp_path / "host", {**first, "disk": f"hooked://{tmp_path}/disk"})
    with more.session() as session:
        push(session)
        assert published(hooked(session, "disk")).items() >= FILES.items()


def test_a_receipt_for_each_push(session: Session) -> None:
    push(session)
    (receipt,) = session.core.journal.receipts(UUID)
    assert (receipt["what"], receipt["store"]) == ("push", "lab")
    row = session.core.journal.home(UUID, "lab")
    assert row is not None
    assert receipt["digest"] == blake3(row.manifest).hexdigest()
