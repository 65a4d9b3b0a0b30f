"""Earlier versions: what is kept at each publish, on several hosts and after crashes; restoring and pruning."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.core.doing import Worker, trace
from tests.core.making import (
    FILES,
    OBJECTS,
    OLD_NS,
    UUID,
    Hooked,
    Place,
    contents,
    everything,
    hooked,
    noise,
    unit_of,
)
from tests.servers import Seaweed
from vfs.core import data_key, manifest_key, plain_key
from vfs.errors import Conflict, NoReplica, NotFound, Refused, Unreachable, UsageError
from vfs.filesystem import Attributes, FileSystem, Needs
from vfs.manifest import CHUNK, dump, parse
from vfs.push import Outcome
from vfs.session import Session
from vfs.settings import VersionsSettings
from vfs.stores.base import BaseStore
from vfs.versions import history, past, pruning
from vfs.versions import kept as versions
from vfs.versions.kept import version_key
from vfs.versions.pruning import Rule

AT_ONCE = VersionsSettings(grace=0.0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"}, {"versions": AT_ONCE})


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    place.record()
    with place.session() as session:
        yield session


class Quiet:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        return None


def run(session: Session, command: str, **args: Any) -> dict[str, Any]:
    return session.run(command, args, Quiet())


def push(session: Session, uuid: str = UUID) -> Outcome:
    for _ in range(4):
        outcome = session.pusher.push(unit_of(session, uuid))
        assert not outcome.failed, outcome.failed
        if not outcome.unsettled:
            return outcome
    raise AssertionError("it never comes to rest")


def write(place: Place, name: str, content: bytes) -> None:
    (place.directory() / name).write_bytes(content)


def kept(store: Hooked) -> set[int]:
    prefix = version_key(UUID, 0).removesuffix("0.json")
    return {int(name.removeprefix(prefix)[:-5]) for name in store.names() if name.startswith(prefix)}


def version_in(store: Hooked, number: int) -> dict[bytes, bytes]:
    """A version as another host reads it: every byte checked against its digest."""
    manifest = parse(store.raw(version_key(UUID, number)), UUID)
    assert manifest.generation == number
    found = {file.path: store.raw(file.key) for file in manifest.files if file.kind == "file"}
    for file in manifest.files:
        assert file.kind != "file" or blake3(found[file.path]).digest() == file.digest
    return found


def age(store: Hooked, seconds: float) -> None:
    """Make every object look as if it were written so long ago: nobody waits for an hour."""
    present = OBJECTS[store.name].content
    for key, (data, stat) in present.items():
        present[key] = (data, replace(stat, modified_ns=time.time_ns() - int(seconds * 1e9)))


# --- what is kept --------------------------------------------------------------------------------------------------


def test_each_settled_push_keeps_the_one_before(session: Session, place: Place) -> None:
    states = []
    for number in range(4):
        write(place, "metrics.json", b"%d" % number)
        states.append(contents(place.directory()))
        push(session)
    store = hooked(session)
    assert kept(store) == {1, 2, 3}
    assert [version_in(store, number) for number in (1, 2, 3)] == states[:3]
    assert [row.number for row in session.core.journal.versions(UUID)] == [1, 2, 3]


def test_a_push_that_says_nothing_new_makes_no_version(session: Session, place: Place) -> None:
    push(session)
    os.utime(place.directory() / "metrics.json")
    os.utime(place.directory() / "metrics.json", ns=(0, os.stat(place.directory() / "empty").st_mtime_ns))
    push(session)
    push(session)
    assert kept(hooked(session)) == set()


def test_what_is_replaced_is_kept_before_it_is_replaced(session: Session, place: Place) -> None:
    """And a store that cannot keep it does not get another one."""
    push(session)
    store, before = hooked(session), hooked(session).raw(manifest_key(UUID))
    write(place, "metrics.json", b"later")

    def full(operation: str, key: str) -> None:
        if operation == "write" and "/versions/" in key:
            raise Unreachable("no route")

    store.hook = full
    assert session.pusher.push(unit_of(session)).failed
    assert store.raw(manifest_key(UUID)) == before
    store.hook = lambda _operation, _key: None
    push(session)
    assert store.raw(version_key(UUID, 1)) == before


def test_heartbeats_of_a_live_run_make_no_versions(place: Place) -> None:
    place.record(finished=False)
    heart = place.directory() / "heartbeat_at"
    with place.session() as session:
        for number in range(5):
            heart.write_text(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
            write(place, "log.txt", b"line\n" * (number + 1))
            assert session.evictor.live(unit_of(session)) == UUID
            push(session)
        store = hooked(session)
        assert kept(store) == set()
        assert parse(store.raw(manifest_key(UUID))).interim
        (place.directory() / "finished_at").write_text(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
        push(session)
        write(place, "metrics.json", b"afterwards")
        push(session)
        (number,) = kept(store)
        assert version_in(store, number)[b"log.txt"] == b"line\n" * 5


def test_what_heartbeats_leave_is_swept(place: Place) -> None:
    place.record(finished=False)
    with place.session() as session:
        for number in range(5):
            (place.directory() / "heartbeat_at").write_text(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
            write(place, "log.txt", noise(1000, number))
            push(session)
        logs = [key for key in hooked(session).names() if "/data/" in key or key.endswith("log.txt")]
        present = parse(hooked(session).raw(manifest_key(UUID))).by_path()[b"log.txt"].key
        assert present in logs
        assert len(logs) <= 2, "the last one, and that of the manifest that was replaced just now"


def test_an_interim_state_that_stood_for_long_is_kept(session: Session, place: Place) -> None:
    """A run that died: nobody says that it is over."""
    unit = unit_of(session)
    unit.writers = 1
    push(session)
    unit.writers = 0
    row = session.core.journal.home(UUID, "lab")
    assert row is not None
    manifest = parse(row.manifest)
    assert manifest.interim
    assert not versions.is_kept(manifest, time.time_ns())
    assert versions.is_kept(manifest, time.time_ns() + int(2 * versions.COALESCED_S * 1e9))


def test_the_end_of_writing_is_published_as_such(session: Session, place: Place) -> None:
    unit = unit_of(session)
    unit.writers = 1
    push(session)
    unit.writers = 0
    push(session)
    assert not parse(hooked(session).raw(manifest_key(UUID))).interim


def test_numbers_go_on_when_a_store_loses_its_manifest(session: Session, place: Place) -> None:
    for number in range(3):
        write(place, "metrics.json", b"%d" % number)
        push(session)
    store = hooked(session)
    store.drop(manifest_key(UUID))
    session.core.journal.forget_home(UUID, "lab")
    session.core.journal.forget_versions(UUID, "lab", [1, 2])  # and the journal knows nothing
    push(session)
    assert parse(store.raw(manifest_key(UUID))).generation == 3
    assert kept(store) == {1, 2}


def test_two_stores_number_the_same_state_alike(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "disk": f"hooked://{tmp_path}/disk"})
    place.record()

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    with place.session() as session:
        for number in range(4):
            write(place, "metrics.json", b"%d" % number)
            hooked(session, "disk").hook = away if number in (1, 2) else lambda _operation, _key: None
            outcome = session.pusher.push(unit_of(session))
            assert len(outcome.failed) == (number in (1, 2))
        lab, disk = hooked(session, "lab"), hooked(session, "disk")
        assert (kept(lab), kept(disk)) == ({1, 2, 3}, {1})
        assert parse(lab.raw(manifest_key(UUID))).generation == parse(disk.raw(manifest_key(UUID))).generation == 4
        assert version_in(lab, 1) == version_in(disk, 1)


# --- two hosts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Place, Place]:
    stores = {"lab": f"hooked://{tmp_path}"}
    places = [Place(tmp_path / name, stores, {"versions": AT_ONCE}) for name in ("one", "two")]
    for place in places:
        place.record()
    return places[0], places[1]


def test_a_number_belongs_to_one_manifest(hosts: tuple[Place, Place]) -> None:
    """Whoever publishes: every manifest that was ever the present one is kept under its own number."""
    published: dict[int, set[bytes]] = {}
    one, two = hosts
    with one.session() as first, two.session() as second:
        store = hooked(first)

        def look(operation: str, key: str) -> None:
            if manifest_key(UUID) in store.names():
                body = store.raw(manifest_key(UUID))
                published.setdefault(parse(body).generation, set()).add(body)

        for session in (first, second):
            hooked(session).hook = look
        for number in range(3):
            write(one, f"one-{number}", b"1")
            write(two, f"two-{number}", b"2")
            push(first)
            push(second)
        look("", "")
        assert all(len(bodies) == 1 for bodies in published.values())
        present = parse(store.raw(manifest_key(UUID))).generation
        assert kept(store) == set(published) - {present}
        for number in kept(store):
            assert {store.raw(version_key(UUID, number))} == published[number]


def test_the_same_change_on_two_hosts_is_one_version(hosts: tuple[Place, Place]) -> None:
    one, two = hosts
    with one.session() as first, two.session() as second:
        push(first)
        assert push(second)
        store = hooked(first)
        before = store.raw(manifest_key(UUID))
        changed = [place.directory() / "updated_at" for place in hosts]
        assert len({path.read_bytes() for path in changed}) == 1
        push(second)
        assert parse(store.raw(manifest_key(UUID))).generation <= parse(before).generation + 1


def test_a_store_without_conditions_keeps_what_it_finds(
    place: Place, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal was lost: what is there is not written over unseen."""
    info = Hooked.info
    monkeypatch.setattr(Hooked, "info", lambda self: replace(info(self), conditional_write=False))
    write(place, "before", b"1")
    push(session)
    store, before = hooked(session), hooked(session).raw(manifest_key(UUID))
    session.core.journal.forget_home(UUID, "lab")
    write(place, "after", b"2")
    push(session)
    assert store.raw(version_key(UUID, 1)) == before
    assert parse(store.raw(manifest_key(UUID))).generation > 1
    assert isinstance(store, BaseStore)


# --- crashes -------------------------------------------------------------------------------------------------------


def test_killed_at_every_point_of_a_later_push(tmp_path: Path) -> None:
    """No state that was ever published is lost, and none has two numbers or more than one body."""
    points: list[str] = []
    for number in range(20):
        place = Place(tmp_path / str(number), over={"versions": VersionsSettings()})
        place.record()
        with place.session() as session:
            push(session)
        first = contents(place.directory())
        write(place, "metrics.json", b"second")
        write(place, "more", noise(100_000))
        second = contents(place.directory())
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "push", UUID, tmp_path))]
            assert {"push.kept", "push.published", "push.read"} <= set(points)
            continue
        if number > len(points):
            break
        assert Worker(place.settings(), [("push", UUID)], tmp_path, f"{points[number - 1]}=kill").killed()
        with place.session() as session:
            assert push(session).clean
            write(place, "metrics.json", b"third")
            push(session)
            learned = history.learn(session.core, session.core.home("lab"), UUID)
            assert learned is not None
            found = []
            for manifest in learned.all():
                found.append(
                    {file.path: (place.store / file.key).read_bytes() for file in manifest.files if file.kind == "file"}
                )
            assert found == [first, second, contents(place.directory())], points[number - 1]
            assert not learned.damaged
    assert len(points) > 5


# --- looking at them -----------------------------------------------------------------------------------------------


def test_the_list(session: Session, place: Place) -> None:
    push(session)
    write(place, "metrics.json", b"12345")
    session.pusher.push(unit_of(session), notes="better metrics")
    (record,) = run(session, "versions", uuids=[UUID])["records"]
    new, old = record["versions"]
    assert (new["number"], new["present"], new["notes"], new["changed_bytes"]) == (2, True, "better metrics", 5)
    assert (old["number"], old["present"], old["notes"], old["store"]) == (1, False, "", "lab")
    assert old["changed_bytes"] == old["bytes"]
    assert abs(new["at"] - time.time()) < 60


def test_the_list_without_a_store(session: Session, place: Place) -> None:
    push(session)
    write(place, "metrics.json", b"12345")
    push(session)

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    result = run(session, "versions", uuids=[UUID])
    (record,) = result["records"]
    assert result["exit"] == 1
    assert [each["number"] for each in record["versions"]] == [2, 1]
    assert record["failed"][0]["store"] == "lab"


def test_a_host_learns_versions_of_another(hosts: tuple[Place, Place]) -> None:
    one, two = hosts
    with one.session() as first, two.session() as second:
        for number in range(3):
            write(one, "weights.npy", noise(CHUNK + number, number))
            push(first)
        assert history.known_numbers(second.core, UUID) == {}
        run(second, "versions", uuids=[UUID])
        assert set(history.known_numbers(second.core, UUID)) == {1, 2}
        manifest, _home = history.manifest_of(second.core, UUID, 1)
        digest = manifest.by_path()[b"weights.npy"].digest
        assert second.core.content(digest) is not None
        assert second.core.journal.replicas(digest)


def test_a_lying_version_harms_nobody(session: Session, place: Place) -> None:
    for number in range(3):
        write(place, "metrics.json", b"%d" % number)
        push(session)
    store = hooked(session)
    store.put(version_key(UUID, 1), dump(replace(parse(store.raw(version_key(UUID, 1))), generation=7)))
    store.put(version_key(UUID, 2), b"{not json")
    store.put(version_key(UUID, 0).replace("/0.", "/00."), b"x")
    store.put(version_key(UUID, 0).replace("/0.", "/../0.").replace("/../", "/a/"), b"x")
    session.core.journal.forget_versions(UUID, "lab", [1, 2])
    (record,) = run(session, "versions", uuids=[UUID])["records"]
    assert [(each["number"], bool(each.get("error"))) for each in record["versions"]] == [
        (3, False),
        (2, True),
        (1, True),
    ]
    before = store.names()
    result = run(session, "versions prune", uuids=[UUID], keep=0)
    assert result["objects"] == 0, "what a damaged version needs is not known"
    assert {name for name in before if "/data/" in name} <= store.names()


def test_what_another_host_changed_is_merged_when_an_eviction_finds_out(hosts: tuple[Place, Place]) -> None:
    """A record that nobody changes here has nothing to push; the refusal says what helps, and it does."""
    one, two = hosts
    with one.session() as first, two.session() as second:
        push(first)
        push(second)
        push(first)
        write(two, "from two", b"2")
        push(second)
        with pytest.raises(Refused, match=f"runfs push {UUID} merges it"):
            first.evictor.evict(unit_of(first))
        push(first)
        first.evictor.evict(unit_of(first))
        assert everything(first, unit_of(first))[b"from two"] == b"2"


# --- restoring -----------------------------------------------------------------------------------------------------


def tree(directory: str | bytes | Path) -> dict[bytes, tuple[Any, ...]]:
    """Everything that a restore must bring back."""
    found: dict[bytes, tuple[Any, ...]] = {}
    root = os.fsencode(directory)
    for top, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(top, name)
            status = os.lstat(path)
            what: object = status.st_nlink if not os.path.isdir(path) else None
            if os.path.islink(path):
                what = os.readlink(path)
            elif os.path.isfile(path):
                what = (status.st_nlink, Path(os.fsdecode(path)).read_bytes())
            found[os.path.relpath(path, root)] = (oct(status.st_mode), status.st_mtime_ns, what)
    return found


def mess_up(directory: Path) -> None:
    """Every kind of change."""
    (directory / "metrics.json").write_bytes(b"changed")
    (directory / "weights.npy").unlink()
    (directory / "weights.npy").mkdir()
    (directory / "weights.npy" / "inside").write_bytes(b"i")
    os.rename(directory / "notes", directory / "moved")
    (directory / "added").write_bytes(b"a")
    os.symlink("added", directory / "new link")
    os.chmod(directory / "empty", 0o600)
    os.utime(directory / "empty", ns=(5, 7))
    (directory / "linked").unlink()
    (directory / "linked").write_bytes(b"no longer a link")
    (directory / "a link").unlink()
    os.symlink("elsewhere", directory / "a link")


def embellish(directory: Path) -> None:
    os.link(directory / "metrics.json", directory / "linked")
    os.symlink("weights.npy", directory / "a link")
    os.chmod(directory / "metrics.json", 0o640)
    if "user.mark" not in os.listxattr(directory / "empty"):
        os.setxattr(directory / "empty", "user.mark", b"1")
    (directory / "hollow").mkdir(mode=0o750)


@pytest.mark.parametrize("evicted", [False, True])
def test_restoring_brings_everything_back(place: Place, evicted: bool) -> None:
    directory = place.record()
    embellish(directory)
    first = tree(directory)
    with place.session() as session:
        push(session)
        mess_up(directory)
        os.setxattr(directory / "empty", "user.mark", b"2")
        second = tree(directory)
        push(session)
        unit = unit_of(session)
        if evicted:
            session.evictor.evict(unit)
        result = run(session, "versions restore", uuid=UUID, number=1)
        assert result["exit"] == 0, result
        if evicted:
            session.evictor.hydrate(unit)
        assert tree(unit.base) == first
        assert os.getxattr(os.path.join(os.fsdecode(unit.base), "empty"), "user.mark") == b"1"
        assert parse(hooked(session).raw(manifest_key(UUID))).notes == "version 1 again"
        again = run(session, "versions restore", uuid=UUID, number=2)
        assert again["exit"] == 0
        if evicted:
            session.evictor.restore(unit)
        assert tree(directory) == second
        assert not list(directory.parent.glob(".runfs*"))


def test_restoring_some_paths(session: Session, place: Place) -> None:
    push(session)
    before = tree(place.directory())
    mess = place.directory()
    (mess / "metrics.json").write_bytes(b"changed")
    (mess / "empty").write_bytes(b"changed")
    (mess / "notes" / "model.bin").unlink()
    (mess / "notes" / "by step" / "0.txt").unlink()
    (mess / "notes" / "by step").rmdir()
    result = run(session, "versions restore", uuid=UUID, number=1, paths=["metrics.json", "notes/by step"])
    assert result["exit"] == 0
    after = tree(mess)
    assert after[b"metrics.json"] == before[b"metrics.json"]
    assert after[b"notes/by step/0.txt"] == before[b"notes/by step/0.txt"]
    assert after[b"empty"] != before[b"empty"]
    assert b"notes/model.bin" not in after
    with pytest.raises(UsageError, match="neither"):
        run(session, "versions restore", uuid=UUID, number=1, paths=["nothing of this name"])


def test_what_is_there_is_pushed_before_it_is_replaced(session: Session, place: Place) -> None:
    push(session)
    write(place, "metrics.json", b"never pushed")

    def away(operation: str, key: str) -> None:
        if operation in ("write", "upload"):
            raise Unreachable("no route")

    hooked(session).hook = away
    with pytest.raises(Refused, match="would be lost"):
        run(session, "versions restore", uuid=UUID, number=1)
    assert (place.directory() / "metrics.json").read_bytes() == b"never pushed"
    hooked(session).hook = lambda _operation, _key: None
    run(session, "versions restore", uuid=UUID, number=1)
    assert (place.directory() / "metrics.json").read_bytes() == FILES[b"metrics.json"]
    assert version_in(hooked(session), 2)[b"metrics.json"] == b"never pushed"


def test_restoring_says_first_what_it_would_do(session: Session, place: Place) -> None:
    push(session)
    write(place, "metrics.json", b"changed")
    write(place, "added", b"a")
    before = tree(place.directory())
    result = run(session, "versions restore", uuid=UUID, number=1, dry_run=True)
    assert (result["removed"], result["made"]) == (["added"], ["metrics.json"])
    assert tree(place.directory()) == before
    assert kept(hooked(session)) == set()


def test_restoring_refuses(session: Session, place: Place) -> None:
    push(session)
    write(place, "metrics.json", b"changed")
    with pytest.raises(UsageError, match="no version 9"):
        run(session, "versions restore", uuid=UUID, number=9)
    with (place.directory() / "metrics.json").open("ab"), pytest.raises(Refused, match=r"open for writing in|being"):
        run(session, "versions restore", uuid=UUID, number=1)
    unit = unit_of(session)
    unit.writers = 1
    with pytest.raises(Refused, match="open for writing"):
        run(session, "versions restore", uuid=UUID, number=1)
    unit.writers = 0
    (place.directory() / "finished_at").unlink()
    (place.directory() / "heartbeat_at").write_text(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    with pytest.raises(Refused, match="live"):
        run(session, "versions restore", uuid=UUID, number=1)
    assert (place.directory() / "metrics.json").read_bytes() == b"changed"


def test_bytes_that_do_not_come_leave_the_record_as_it_is(session: Session, place: Place) -> None:
    push(session)
    mess_up_some = place.directory()
    (mess_up_some / "weights.npy").write_bytes(b"changed")
    (mess_up_some / "metrics.json").unlink()
    push(session)
    before = tree(place.directory())

    def away(operation: str, key: str) -> None:
        if operation == "read" and key == plain_key(UUID, b"weights.npy"):
            raise Unreachable("no route")

    hooked(session).hook = away
    with pytest.raises(Exception, match="no route"):
        run(session, "versions restore", uuid=UUID, number=1)
    assert tree(place.directory()) == before
    assert not list(place.directory().parent.glob(".runfs*"))


def test_killed_at_every_point_of_a_restore(tmp_path: Path) -> None:
    """The state before is a version, and doing it again does the rest."""
    points: list[str] = []
    for number in range(40):
        place = Place(tmp_path / str(number))
        directory = place.record()
        first = tree(directory)
        with place.session() as session:
            push(session)
            mess = place.directory()
            (mess / "metrics.json").write_bytes(b"changed")
            (mess / "weights.npy").unlink()
            (mess / "added").write_bytes(b"a")
            os.utime(mess / "empty", ns=(5, 7))
        second = contents(directory)
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "versions restore", UUID, tmp_path))]
            points = [point for point in points if point.startswith(("revert", "hydrate"))]
            assert {"revert.prepared", "revert.removed", "revert.made", "revert.touched", "revert.synced"} <= set(
                points
            )
            continue
        if number > len(points):
            break
        fault = f"{points[number - 1]}=kill"
        assert Worker(place.settings(), [("versions restore", UUID)], tmp_path, fault).killed()
        with place.session() as session:
            run(session, "versions restore", uuid=UUID, number=1)
            assert tree(directory) == first, fault
            run(session, "versions restore", uuid=UUID, number=2)
            assert contents(directory) == second, fault


# --- pruning -------------------------------------------------------------------------------------------------------


def plain_name(path: bytes) -> bytes:
    return plain_key(UUID, path).removeprefix(f"{UUID}/").encode()


def states_of(session: Session, place: Place, count: int) -> list[dict[bytes, bytes]]:
    """Push so many states; weights.npy has as many bytes in each."""
    states = []
    for number in range(count):
        write(place, "weights.npy", noise(100_000, number))
        write(place, f"only in {number}", noise(10, 100 + number))
        if number:
            (place.directory() / f"only in {number - 1}").unlink()
        states.append(contents(place.directory()))
        push(session)
    return states


def test_pruning_removes_what_nobody_needs_and_nothing_else(session: Session, place: Place) -> None:
    states = states_of(session, place, 5)
    store = hooked(session)
    store.put(plain_key(UUID, b"somebody elses"), b"not ours")
    dry = run(session, "versions prune", uuids=[UUID], keep=2, dry_run=True)
    assert kept(store) == {1, 2, 3, 4}
    result = run(session, "versions prune", uuids=[UUID], keep=2)
    assert (dry["versions"], dry["objects"], dry["bytes"]) == (2, result["objects"], result["bytes"])
    assert result["exit"] == 0
    assert result["objects"] == 4, "weights.npy and one file of each of two versions"
    assert kept(store) == {3, 4}
    assert [version_in(store, number) for number in (3, 4)] == states[2:4]
    assert store.raw(plain_key(UUID, b"somebody elses")) == b"not ours"
    assert plain_key(UUID, b"weights.npy") not in store.names(), "its plain name held a state that is gone"
    manifest = parse(store.raw(manifest_key(UUID)))
    assert {file.path: store.raw(file.key) for file in manifest.files if file.kind == "file"} == states[4]
    session.evictor.evict(unit_of(session))
    assert everything(session, unit_of(session)) == states[4]


def test_no_proof_counts_on_what_was_removed(session: Session, place: Place) -> None:
    """Content that comes back is uploaded again, and an eviction then has it."""
    states = states_of(session, place, 3)
    run(session, "versions prune", uuids=[UUID], keep=0)
    for path, content in states[0].items():
        (place.directory() / os.fsdecode(path)).write_bytes(content)
    push(session)
    session.evictor.evict(unit_of(session))
    assert everything(session, unit_of(session)).items() >= states[0].items()
    digest = blake3(states[1][b"weights.npy"]).digest()
    assert session.core.journal.replicas(digest) == []


def test_pruning_by_age(session: Session, place: Place) -> None:
    states_of(session, place, 4)
    assert run(session, "versions prune", uuids=[UUID], older_than=3600.0)["versions"] == 0
    assert run(session, "versions prune", uuids=[UUID], older_than=0.0, keep=1)["versions"] == 2
    assert kept(hooked(session)) == {3}


def test_nothing_newer_than_the_grace_goes(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"}, {"versions": VersionsSettings(grace=3600)})
    place.record()
    with place.session() as session:
        states_of(session, place, 3)
        store, before = hooked(session), hooked(session).names()
        orphan = data_key(UUID, bytes(32))
        store.put(orphan, b"of a push that failed")
        result = run(session, "versions prune", uuids=[UUID], keep=0)
        assert (result["versions"], result["objects"]) == (2, 0)
        assert before - store.names() == {version_key(UUID, 1), version_key(UUID, 2)}
        age(store, 7200)
        session.core.journal.forget_versions(UUID, "lab", [])
        assert run(session, "versions prune", uuids=[UUID], keep=0)["objects"] == 5
        assert orphan not in store.names()


def test_the_rule_bounds_what_is_kept(tmp_path: Path) -> None:
    over = {"versions": VersionsSettings(keep=3, grace=0)}
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"}, over)
    place.record()
    with place.session() as session:
        states = states_of(session, place, 8)
        store = hooked(session)
        assert kept(store) == {5, 6, 7}
        assert [version_in(store, number) for number in (5, 6, 7)] == states[4:7]
        assert len([name for name in store.names() if len(store.raw(name)) == 100_000]) == 4 + 1, "and model.bin"


def test_pruning_refuses_what_is_dirty(session: Session, place: Place) -> None:
    states_of(session, place, 3)
    session.core.units.mark_dirty(unit_of(session), "test")
    result = run(session, "versions prune", uuids=[UUID], keep=0)
    assert result["exit"] == 1
    assert "not pushed yet" in result["failed"][0]["reason"]
    assert kept(hooked(session)) == {1, 2}


@pytest.mark.parametrize("moment", ["write", "read", "stat", "delete"])
def test_a_push_of_another_host_at_any_moment_of_the_sweep(hosts: tuple[Place, Place], moment: str) -> None:
    """It takes a content for its own that is just being swept: its manifest never names what is not there for good."""
    one, two = hosts
    again = noise(100_000, 1)
    with one.session() as first, two.session() as second:
        states_of(first, one, 4)
        settle(second)
        store, swept = hooked(first), data_key(UUID, blake3(again).digest())
        assert swept in store.names()
        write(two, "weights.npy", again)
        outcomes: list[Outcome] = []

        def race(operation: str, key: str) -> None:
            if outcomes or operation != moment:
                return
            if key == swept or "/sweeping/" in key or (operation == "read" and key == manifest_key(UUID)):
                outcomes.append(second.pusher.push(unit_of(second)))

        home = first.core.home("lab")
        planned = pruning.plan(first.core, home, UUID, Rule(0))
        assert swept in planned.objects
        planned = replace(planned, objects={swept: planned.objects[swept], **planned.objects})  # it is the first to go
        store.hook = race
        pruning.prune(first.core, home, planned)
        store.hook = lambda _operation, _key: None
        assert len(outcomes) == 1
        published = parse(store.raw(manifest_key(UUID)))
        if published.by_path()[b"weights.npy"].key not in store.names():
            assert outcomes[0].unsettled, "the push has found out, so it is not taken for done"
        settle(second)
        manifest = parse(store.raw(manifest_key(UUID)))
        assert manifest.by_path()[b"weights.npy"].digest == blake3(again).digest()
        for file in manifest.files:
            if file.kind == "file":
                assert blake3(store.raw(file.key)).digest() == file.digest, file.path


def settle(session: Session) -> None:
    """Push until nothing is left to push."""
    for _ in range(5):
        if push(session).clean:
            return
    raise AssertionError("it never comes to rest")


def test_what_is_old_is_written_again_before_a_manifest_names_it(tmp_path: Path) -> None:
    """So that the sweep of another host, which goes by age, leaves it."""
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"}, {"versions": VersionsSettings(grace=3600)})
    place.record()
    with place.session() as session:
        states = states_of(session, place, 3)
        store = hooked(session)
        age(store, 7200)
        key = data_key(UUID, blake3(states[1][b"weights.npy"]).digest())
        write(place, "weights.npy", states[1][b"weights.npy"])
        push(session)
        assert parse(store.raw(manifest_key(UUID))).by_path()[b"weights.npy"].key == key
        modified = store.stat(key).modified_ns
        assert modified is not None
        assert time.time_ns() - modified < 60e9


def test_killed_at_every_point_of_a_prune(tmp_path: Path) -> None:
    points: list[str] = []
    for number in range(10):
        place = Place(tmp_path / str(number), over={"versions": AT_ONCE})
        place.record()
        with place.session() as session:
            states = states_of(session, place, 3)
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "prune", UUID, tmp_path))]
            assert set(points) == {"prune.version", "prune.forgotten", "prune.removed"}
            points += ["prune.removed#2", "prune.version#2"]
            continue
        if number > len(points):
            break
        assert Worker(place.settings(), [("prune", UUID)], tmp_path, f"{points[number - 1]}=kill").killed()
        with place.session() as session:
            assert run(session, "versions prune", uuids=[UUID], keep=0)["exit"] == 0
            manifest = parse((place.store / manifest_key(UUID)).read_bytes())
            there = [path for path in (place.store / ".runfs" / UUID).rglob("*") if path.is_file()]
            needed = {file.key for file in manifest.files if file.key.startswith(".runfs/")} | {manifest_key(UUID)}
            left = {str(path.relative_to(place.store)) for path in there if path.parent.name != "sweeping"}
            assert left == needed, "but for an announcement, which expires"
            assert contents(place.store / UUID).keys() <= {plain_name(path) for path in states[2]}
            session.evictor.evict(unit_of(session))
            assert everything(session, unit_of(session)) == states[2]


def test_a_store_that_lost_its_manifest_is_not_swept(session: Session, place: Place) -> None:
    states_of(session, place, 3)
    store = hooked(session)
    store.drop(manifest_key(UUID))
    before = store.names()
    result = run(session, "versions prune", uuids=[UUID], keep=0)
    assert result["exit"] == 1
    assert store.names() == before


def test_long_histories_do_not_fill_the_journal(
    session: Session, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfs.versions.journal._MANIFESTS_MOST", 2500)
    states_of(session, place, 6)
    rows = session.core.journal.versions(UUID)
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert 0 < sum(row.here for row in rows) < 5
    assert rows[-1].here
    manifest, _home = history.manifest_of(session.core, UUID, 1)
    assert manifest.generation == 1
    with pytest.raises((NotFound, UsageError, Conflict)):
        history.manifest_of(session.core, UUID, 77)


# --- in the tree ---------------------------------------------------------------------------------------------------


def look_up(files: FileSystem, *names: bytes) -> Attributes:
    found = files.getattr(1)
    for name in names:
        found = files.lookup(found.ino, name)
    return found


def names_in(files: FileSystem, ino: int) -> set[bytes]:
    return {name for name, _attributes, _position in files.readdir(files.opendir(ino), 0)}


def test_looking_asks_no_store(session: Session, place: Place) -> None:
    embellish(place.directory())
    push(session)
    mess_up(place.directory())
    push(session)
    files, store = FileSystem(session.core), hooked(session)
    store.done.clear()
    top = look_up(files, b".versions")
    assert names_in(files, top.ino) == {UUID.encode()}
    assert b".versions" not in names_in(files, 1)
    record = look_up(files, b".versions", UUID.encode())
    assert names_in(files, record.ino) == {b"1", b"2"}
    first = look_up(files, b".versions", UUID.encode(), b"1")
    assert names_in(files, first.ino) == set(os.listdir(os.fsencode(place.directory()))) - {
        b"added", b"new link", b"moved"
    } | {b"notes"}  # fmt: skip
    weights = look_up(files, b".versions", UUID.encode(), b"1", b"weights.npy")
    assert (weights.size, weights.mtime_ns) == (len(FILES[b"weights.npy"]), OLD_NS)
    assert weights == look_up(files, b".versions", UUID.encode(), b"1", b"weights.npy")
    link = look_up(files, b".versions", UUID.encode(), b"1", b"a link")
    assert files.readlink(link.ino) == b"weights.npy"
    empty = look_up(files, b".versions", UUID.encode(), b"1", b"empty")
    assert (files.getxattr(empty.ino, b"user.mark"), files.listxattr(empty.ino)) == (b"1", [b"user.mark"])
    handle = files.open(weights.ino, os.O_RDONLY)
    with pytest.raises(Needs):
        files.read(handle, 0, 10)
    assert store.done == [], "nothing was asked until now"
    files.release(handle)


def test_what_was_read_is_given_back(session: Session, place: Place) -> None:
    for number in range(4):
        write(place, "weights.npy", noise(CHUNK, number))
        push(session)
    files = FileSystem(session.core)
    room = place.settings().cache_place / ".versions"
    for number in (1, 2, 3):
        file = look_up(files, b".versions", UUID.encode(), b"%d" % number, b"weights.npy")
        handle = files.open(file.ino, os.O_RDONLY)
        session.hydrator.complete(handle.fd, UUID, b"weights.npy")
        assert files.read(handle, 0, CHUNK) == noise(CHUNK, number - 1)
        files.release(handle)
        session.core.settle()
        os.utime(room / blake3(noise(CHUNK, number - 1)).hexdigest(), ns=(number, number))
    files.past.trim(CHUNK + CHUNK // 2)
    (left,) = room.iterdir()
    assert left.name == blake3(noise(CHUNK, 2)).hexdigest()
    file = look_up(files, b".versions", UUID.encode(), b"1", b"weights.npy")
    handle = files.open(file.ino, os.O_RDONLY)
    session.hydrator.complete(handle.fd, UUID, b"weights.npy")
    assert files.read(handle, 0, CHUNK) == noise(CHUNK, 0)
    files.release(handle)
    past.trim_all(session.core)
    assert list(room.iterdir()) == []


def test_a_pruned_version_is_gone_from_the_tree(session: Session, place: Place) -> None:
    states_of(session, place, 3)
    files = FileSystem(session.core)
    before = look_up(files, b".versions", UUID.encode(), b"1", b"weights.npy")
    run(session, "versions prune", uuids=[UUID], keep=1)
    with pytest.raises(FileNotFoundError):
        look_up(files, b".versions", UUID.encode(), b"1")
    handle = files.open(before.ino, os.O_RDONLY)
    with pytest.raises(NoReplica):
        session.hydrator.complete(handle.fd, UUID, b"weights.npy")
    files.release(handle)
    assert names_in(files, look_up(files, b".versions", UUID.encode()).ino) == {b"2", b"3"}


def test_a_placeholder_that_is_not_what_it_should_be_is_made_again(session: Session, place: Place) -> None:
    push(session)
    files = FileSystem(session.core)
    room = place.settings().cache_place / ".versions"
    room.mkdir(parents=True)
    (room / blake3(FILES[b"weights.npy"]).hexdigest()).write_bytes(b"")
    file = look_up(files, b".versions", UUID.encode(), b"1", b"weights.npy")
    handle = files.open(file.ino, os.O_RDONLY)
    session.hydrator.complete(handle.fd, UUID, b"weights.npy")
    assert files.read(handle, 0, 100) == FILES[b"weights.npy"][:100]
    files.release(handle)


# --- a real S3 server ----------------------------------------------------------------------------------------------


def test_versions_in_s3(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push, list, restore, prune and evict, as a person would; nothing is left that nobody needs."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    url = f"s3://{seaweed.bucket}/{tmp_path.name}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    place = Place(tmp_path / "host", {"lab": url}, {"versions": AT_ONCE})
    place.record()
    with place.session() as session:
        states = states_of(session, place, 4)
        store = session.core.home("lab").store()
        assert sorted(versions.numbers(session.core.home("lab"), UUID)) == [1, 2, 3]
        session.core.journal.forget_versions(UUID, "lab", [1, 2, 3])
        (record,) = run(session, "versions", uuids=[UUID])["records"]
        assert [each["number"] for each in record["versions"]] == [4, 3, 2, 1]
        assert run(session, "versions restore", uuid=UUID, number=2)["exit"] == 0
        assert contents(place.directory()) == states[1]
        time.sleep(1.1)  # its clock tells whole seconds
        assert run(session, "versions prune", uuids=[UUID], keep=1)["versions"] == 3
        present = parse(store.read(manifest_key(UUID)))
        (kept_one,) = versions.numbers(session.core.home("lab"), UUID)
        earlier = versions.read(session.core.home("lab"), UUID, kept_one)
        needed = {file.key for file in (*present.files, *earlier.files) if file.key}
        there = {stat.key for stat in store.list(f".runfs/{UUID}/data/")}
        assert there == {key for key in needed if "/data/" in key}
        assert run(session, "transaction", what="begin", uuid=UUID)["exit"] == 0
        write(place, "weights.npy", b"no")
        assert run(session, "transaction", what="rollback", uuid=UUID)["exit"] == 0
        assert contents(place.directory()) == states[1]
        push(session)
        session.evictor.evict(unit_of(session))
        assert everything(session, unit_of(session)) == states[1]
