"""Records on stores with no mount and no index: machinable's storage verbs, and what a store may do to them."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.making import FILES, NESTED, UUID, Hooked, contents, noise, write_record
from tests.servers import Seaweed
from vfs.errors import (
    DamagedRecord,
    Full,
    ManifestError,
    NoReplica,
    Refused,
    StoreError,
    Unreachable,
    UsageError,
)
from vfs.manifest import CHUNK, Manifest, parse
from vfs.records import Records, fetch
from vfs.stores import Store, open_store
from vfs.stores.memory import MemoryStore, Objects
from vfs.wire import data_key, manifest_key, plain_key

OTHER = "recordBBBB02"


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = open_kind(request, request.param, tmp_path)
    yield opened
    opened.disconnect()


def open_kind(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Store:
    if kind == "s3":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        prefix = "t-" + os.urandom(6).hex()
        url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
        return open_store({"url": url, **seaweed.options()})
    return open_store(f"file://{tmp_path}/store" if kind == "file" else f"memory://{os.urandom(6).hex()}", "lab")


@pytest.fixture
def memory() -> Store:
    return open_store(f"memory://{os.urandom(6).hex()}", "lab")


def make(root: Path, uuid: str = UUID, *, nested: bool = True) -> Path:
    """A record with one nested in it, and odd things beside its files."""
    directory = root / "storage" / "i" / uuid
    write_record(directory, uuid, FILES)
    if nested:
        write_record(directory / "x" / "run1", NESTED, {b"output.log": b"said\n"}, parent=uuid)
    (directory / "notes" / "tool").symlink_to("../metrics.json")
    os.link(directory / "metrics.json", directory / "metrics.again")
    (directory / "metrics.json").chmod(0o640)
    return directory


def relate(directory: Path, own: str, *others: str) -> None:
    (directory / "related").mkdir(exist_ok=True)
    edges = [{"uuid": own, "related_uuid": other, "name": "Interface.Interface.using"} for other in others]
    (directory / "related" / "metadata.jsonl").write_text("".join(json.dumps(edge) + "\n" for edge in edges))


def published(store: Store, uuid: str = UUID) -> Manifest:
    return parse(store.read(manifest_key(uuid)), uuid)


def look(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a copy of a record must share with it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            marker = path.name == ".machinable"
            found[name] = (
                path.read_bytes(),
                *(() if marker else (status.st_mode, status.st_mtime_ns)),
                status.st_nlink,
            )
        else:
            found[name] = ("directory",)
    return found


class TestInAndOut:
    def test_a_record_comes_back_as_it_was(self, store: Store, tmp_path: Path) -> None:
        records, directory = Records(store), make(tmp_path)
        assert not records.contains(UUID)
        assert not records.retrieve(UUID, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        done = records.commit(directory)
        assert done.uuid == UUID
        assert done.stores[store.name][0] > len(FILES)
        assert records.contains(UUID)
        assert records.retrieve(UUID, tmp_path / "back")
        assert look(tmp_path / "back") == look(directory)
        assert set(os.listdir(tmp_path)) - {"store"} == {"back", "storage"}

    def test_the_form_is_that_of_the_design(self, memory: Store, tmp_path: Path) -> None:
        """First contents are plain objects, later ones go under their digest, nothing is overwritten."""
        records, directory = Records(memory), make(tmp_path)
        records.commit(directory)
        before = {stat.key: memory.read(stat.key) for stat in memory.list("")}
        for path, content in FILES.items():
            assert before[plain_key(UUID, path)] == content
        (directory / "metrics.json").write_bytes(b"later")
        (directory / "metrics.again").unlink()
        records.update(directory)
        after = {stat.key: memory.read(stat.key) for stat in memory.list("")}
        assert {key: after[key] for key in before if key != manifest_key(UUID)} == {
            key: body for key, body in before.items() if key != manifest_key(UUID)
        }
        digest = published(memory).by_path()[b"metrics.json"].digest
        assert after[data_key(UUID, digest)] == b"later"

    def test_committing_again_uploads_nothing(self, memory: Store, tmp_path: Path) -> None:
        records, directory = Records(memory), make(tmp_path)
        records.commit(directory)
        before = memory.read(manifest_key(UUID))
        assert records.commit(directory).stores == {memory.name: (0, 0)}
        assert memory.read(manifest_key(UUID)) == before

    def test_a_nested_record_is_committed_with_its_root(self, store: Store, tmp_path: Path) -> None:
        records, directory = Records(store), make(tmp_path)
        assert records.commit(directory / "x" / "run1").uuid == UUID
        assert records.contains(NESTED)
        assert records.contains(NESTED, UUID)
        assert records.retrieve(NESTED, tmp_path / "run")
        assert look(tmp_path / "run") == look(directory / "x" / "run1")
        assert not records.contains("executionC01")

    def test_what_only_the_store_has_stays(self, memory: Store, tmp_path: Path) -> None:
        """Another host's execution is not in our directory: committing ours removes nothing."""
        records, directory = Records(memory), make(tmp_path)
        records.commit(directory)
        other = make(tmp_path / "other", nested=False)
        (other / "metrics.json").write_bytes(b"ours")
        records.commit(other)
        assert records.contains(NESTED)
        records.retrieve(UUID, tmp_path / "back")
        assert (tmp_path / "back" / "metrics.json").read_bytes() == b"ours"
        assert (tmp_path / "back" / "x" / "run1" / "output.log").read_bytes() == b"said\n"

    def test_two_who_commit_at_once_lose_nothing(self, store: Store, tmp_path: Path) -> None:
        one, two = make(tmp_path / "1"), make(tmp_path / "2")
        (one / "from one").write_bytes(b"1")
        (two / "from two").write_bytes(b"2")
        errors: list[BaseException] = []

        def commit(directory: Path) -> None:
            try:
                Records(store).commit(directory)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=commit, args=(directory,)) for directory in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        Records(store).retrieve(UUID, tmp_path / "back")
        assert (tmp_path / "back" / "from one").read_bytes() == b"1"
        assert (tmp_path / "back" / "from two").read_bytes() == b"2"

    def test_push_and_pull(self, memory: Store, tmp_path: Path) -> None:
        records, directory = Records(memory), make(tmp_path)
        assert records.push(directory, UUID) == records.home_uri(UUID) == f"{memory.url}/{UUID}"
        with pytest.raises(DamagedRecord, match="holds recordAAAA01, not recordBBBB02"):
            records.push(directory, OTHER)
        assert records.pull(UUID, tmp_path / "back") == tmp_path / "back"
        assert records.pull(OTHER, tmp_path / "other") is None
        assert records.ensure_materialized(UUID, tmp_path / "back") == tmp_path / "back"
        assert records.root() == memory.url
        assert records.id == memory.name

    def test_home_uri_of_a_url_with_options(self) -> None:
        store = MemoryStore()
        store.url = "s3://lab/study?endpoint=https://s3.lab.example"
        assert Records(store).home_uri(UUID) == f"s3://lab/study/{UUID}?endpoint=https://s3.lab.example"


class TestWhatIsThere:
    def test_walk_and_search(self, store: Store, tmp_path: Path) -> None:
        records = Records(store)
        for uuid in (UUID, OTHER):
            records.commit(make(tmp_path, uuid, nested=uuid == UUID))
        assert {each.uuid for each in records.walk()} == {UUID, OTHER}
        assert set(records.search("i", "p")) == {UUID, OTHER, NESTED}
        assert records.search("i", "q") == []
        assert records.damaged == []

    def test_records_of_another_tool(self, store: Store, tmp_path: Path) -> None:
        """Plain objects and no manifest: listed, found by their keys, retrieved, and given a manifest by a commit."""
        directory = make(tmp_path, nested=False)
        (directory / "notes" / "tool").unlink()
        for path in directory.rglob("*"):
            if path.is_file() and path.name != ".machinable":
                store.write(plain_key(UUID, os.fsencode(path.relative_to(directory))), path.read_bytes())
        records = Records(store)
        (entry,) = records.walk()
        assert (entry.uuid, entry.plain) == (UUID, True)
        assert records.search("i") == [UUID]
        assert records.contains(UUID)
        assert records.retrieve(UUID, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(directory)
        before = {stat.key for stat in store.list("")}
        records.commit(tmp_path / "back")
        added = {stat.key for stat in store.list("")} - before
        assert added <= {manifest_key(UUID), plain_key(UUID, b".machinable")}, "what was there is adopted"
        assert published(store).by_path()[b"weights.npy"].key == plain_key(UUID, b"weights.npy")

    def test_delete_touches_no_other_record(self, store: Store, tmp_path: Path) -> None:
        records = Records(store)
        longer = UUID + "x"  # the other's name begins with this one's
        for uuid in (UUID, longer):
            records.commit(make(tmp_path, uuid, nested=uuid == UUID))
        left = {stat.key for stat in store.list("") if longer in stat.key}
        with pytest.raises(Refused, match=f"nested in {UUID}"):
            records.delete(NESTED)
        assert records.delete(UUID)
        assert not records.delete(UUID)
        assert {stat.key for stat in store.list("")} == left
        assert not records.contains(UUID)

    def test_a_delete_that_was_interrupted_shows_no_half_record(self, memory: Store, tmp_path: Path) -> None:
        hooked = Hooked("lab", Objects())
        records = Records(hooked)
        records.commit(make(tmp_path))
        deleted: list[str] = []

        def stop(operation: str, key: str) -> None:
            if operation == "delete":
                deleted.append(key)
                if len(deleted) == 3:
                    raise Unreachable("gone")

        hooked.hook = stop
        with pytest.raises(Unreachable):
            records.delete(UUID)
        hooked.hook = lambda _operation, _key: None
        assert list(records.walk()) == []
        assert not records.contains(UUID)
        assert records.delete(UUID)
        assert list(hooked.list("")) == []


class TestRelations:
    @pytest.fixture
    def three(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """One uses two, two uses three, three uses one."""
        uuids = (UUID, OTHER, "recordCCCC03")
        made = [make(tmp_path, uuid, nested=False) for uuid in uuids]
        for number, directory in enumerate(made):
            relate(directory, uuids[number], uuids[(number + 1) % 3])
        return made[0], made[1], made[2]

    @pytest.mark.parametrize(("depth", "names"), [(0, "A"), (1, "AB"), (2, "ABC")])
    def test_upload_and_download(
        self, memory: Store, tmp_path: Path, three: tuple[Path, Path, Path], depth: int, names: str
    ) -> None:
        records = Records(memory)
        done = records.upload(three[0], depth)
        assert [uuid[6] for uuid in done.done] == list(names)
        assert done.failed == {}
        assert {entry.uuid[6] for entry in records.walk()} == set(names)
        records.upload(three[0], 2)
        back = records.download(UUID, tmp_path / "back", depth)
        assert [uuid[6] for uuid in back.done] == list(names)
        assert back.directories == [tmp_path / "back" / uuid for uuid in back.done]
        assert {path.name[6] for path in (tmp_path / "back").iterdir()} == set(names)

    def test_one_that_is_nowhere_is_named(self, memory: Store, tmp_path: Path) -> None:
        records, directory = Records(memory), make(tmp_path)
        relate(directory, UUID, OTHER)
        assert records.upload(directory).failed == {OTHER: "it is related, but not on this machine"}
        done = records.download(UUID, tmp_path / "back")
        assert done.done == [UUID]
        assert "is in none of lab" in done.failed[OTHER]


class TestDirectoriesThatAreThere:
    def test_an_empty_one_is_filled(self, memory: Store, tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(memory).commit(directory)
        (tmp_path / "back").mkdir()
        assert Records(memory).retrieve(UUID, tmp_path / "back")
        assert look(tmp_path / "back") == look(directory)

    def test_what_is_missing_is_added_and_the_rest_left(self, memory: Store, tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(memory).commit(directory)
        (directory / "weights.npy").unlink()
        (directory / "x" / "run1" / ".machinable").unlink()
        (directory / "mine").write_bytes(b"mine")
        assert Records(memory).retrieve(UUID, directory)
        assert (directory / "weights.npy").read_bytes() == FILES[b"weights.npy"]
        assert (directory / "x" / "run1" / ".machinable").is_file()
        assert (directory / "mine").read_bytes() == b"mine"

    def test_two_who_retrieve_at_once(self, tmp_path: Path) -> None:
        """The second finds the directory made by the first when it comes to give its own the name."""
        hooked = Hooked("lab", Objects())
        directory = make(tmp_path)
        Records(hooked).commit(directory)
        raced: list[str] = []

        def race(operation: str, key: str) -> None:
            if operation == "read" and key == plain_key(UUID, b"weights.npy") and not raced:
                raced.append(key)
                Records(hooked).retrieve(UUID, tmp_path / "back")

        hooked.hook = race
        assert Records(hooked).retrieve(UUID, tmp_path / "back")
        assert raced
        assert look(tmp_path / "back") == look(directory)
        assert sorted(os.listdir(tmp_path)) == ["back", "storage"]

    def test_a_changed_file_is_never_overwritten(self, memory: Store, tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(memory).commit(directory)
        (directory / "weights.npy").unlink()
        (directory / "notes" / "model.bin").write_bytes(noise(100_000, 9))
        with pytest.raises(Refused, match=r"'notes/model.bin' is not what the store holds, and was left alone"):
            Records(memory).retrieve(UUID, directory)
        assert not (directory / "weights.npy").exists(), "nothing was changed"

    def test_something_else_is_refused(self, memory: Store, tmp_path: Path) -> None:
        Records(memory).commit(make(tmp_path))
        (tmp_path / "back").mkdir()
        (tmp_path / "back" / "thesis.tex").write_text("years")
        with pytest.raises(Refused, match="holds something that is no record"):
            Records(memory).retrieve(UUID, tmp_path / "back")
        (tmp_path / "file").write_text("x")
        with pytest.raises(Refused, match="it is no directory"):
            Records(memory).retrieve(UUID, tmp_path / "file")

    def test_the_link_of_an_evicted_record(self, memory: Store, tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(memory).commit(directory)
        link = directory.parent / "evicted"
        link.symlink_to(f"../../.runfs/{OTHER}")
        with pytest.raises(Refused, match="the link of the evicted record"):
            Records(memory).retrieve(UUID, link)
        with pytest.raises(Refused, match="pushed by its mount"):
            Records(memory).commit(link)

    def test_no_space(self, memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Records(memory).commit(make(tmp_path))
        room = os.statvfs(tmp_path)
        full = os.statvfs_result((*room[:4], 0, *room[5:]))
        monkeypatch.setattr(os, "statvfs", lambda _path: full)
        with pytest.raises(Full, match="no space in"):
            Records(memory).retrieve(UUID, tmp_path / "back")
        assert not (tmp_path / "back").exists()


class TestSeveralStores:
    @pytest.fixture
    def two(self) -> tuple[Hooked, Hooked]:
        return Hooked("one", Objects()), Hooked("two", Objects())

    def test_whichever_has_it_gives_it(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(two[1]).commit(directory)
        assert Records(two).fetch(UUID, tmp_path / "back") == "two"
        assert fetch(two, UUID, tmp_path / "again")
        assert not fetch(two, OTHER, tmp_path / "none")

    def test_wrong_bytes_are_never_shown(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(two).commit(directory)
        bad = FILES[b"weights.npy"][: CHUNK + 5] + b"x" + FILES[b"weights.npy"][CHUNK + 6 :]
        two[0].put(plain_key(UUID, b"weights.npy"), bad)
        assert Records(two).fetch(UUID, tmp_path / "back") == "two"
        assert look(tmp_path / "back") == look(directory)
        with pytest.raises(NoReplica, match=r"one: .*weights.npy.* does not hold the right bytes"):
            Records(two[0]).retrieve(UUID, tmp_path / "none")
        assert sorted(os.listdir(tmp_path)) == ["back", "storage"], "nothing of it stays"

    def test_a_truncated_object(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        Records(two[0]).commit(make(tmp_path))
        two[0].put(plain_key(UUID, b"weights.npy"), FILES[b"weights.npy"][:-1])
        with pytest.raises(NoReplica, match=r"gave .* bytes from"):
            Records(two[0]).retrieve(UUID, tmp_path / "none")

    def test_a_damaged_manifest(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        directory = make(tmp_path)
        Records(two).commit(directory)
        two[0].put(manifest_key(UUID), b'{"format": 1, "uuid"')
        assert Records(two).fetch(UUID, tmp_path / "back") == "two"
        with pytest.raises(NoReplica, match="one: the manifest is not JSON"):
            Records(two[0]).retrieve(UUID, tmp_path / "none")
        with pytest.raises(ManifestError, match="the manifest is not JSON"):
            Records(two[0]).commit(directory)
        records = Records(two[0])
        assert list(records.walk()) == []
        ((key, reason),) = records.damaged
        assert key == manifest_key(UUID)
        assert "not JSON" in reason

    def test_a_manifest_that_leads_outside(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        Records(two[0]).commit(make(tmp_path))
        body = json.loads(two[0].read(manifest_key(UUID)))
        body["files"][0]["path"] = "../outside"
        two[0].put(manifest_key(UUID), json.dumps(body).encode())
        with pytest.raises(NoReplica, match="not a plain relative path"):
            Records(two[0]).retrieve(UUID, tmp_path / "back")
        assert not (tmp_path / "outside").exists()

    def test_a_listing_that_leads_outside(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        header = {"uuid": UUID, "identity_key": "i", "predicate_key": "p", "kind": "Interface"}
        two[0].put(f"{UUID}/id.json", json.dumps(header).encode())
        two[0].put(f"{UUID}/%2E%2E/outside", b"x")
        with pytest.raises(NoReplica, match="is no name for a file; remove or rename that object"):
            Records(two[0]).retrieve(UUID, tmp_path / "back")
        two[0].delete(f"{UUID}/%2E%2E/outside")
        two[0].put(f"{UUID}/id.json/below", b"x")
        with pytest.raises(NoReplica, match="a file and a directory at once"):
            Records(two[0]).retrieve(UUID, tmp_path / "back")

    def test_one_store_down_does_not_stop_the_other(self, two: tuple[Hooked, Hooked], tmp_path: Path) -> None:
        def down(_operation: str, _key: str) -> None:
            raise Unreachable("no route")

        two[0].hook = down
        directory = make(tmp_path)
        with pytest.raises(Unreachable, match=f"{UUID} is not committed to one: no route"):
            Records(two).commit(directory)
        assert Records(two[1]).contains(UUID)
        assert Records(two).contains(UUID)
        with pytest.raises(StoreError, match="could not ask one"):
            Records(two).contains(OTHER)
        assert Records(two).retrieve(UUID, tmp_path / "back")

    def test_no_store_and_no_uuid(self, memory: Store, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="no store is configured"):
            Records([]).contains(UUID)
        for bad in ("../x", "", "a/b", "a" * 65):
            with pytest.raises(UsageError, match="is no uuid"):
                Records(memory).contains(bad)
            with pytest.raises(UsageError, match="is no uuid"):
                Records(memory).delete(bad)
        with pytest.raises(DamagedRecord, match=r"has no id.json"):
            Records(memory).commit(tmp_path)

    def test_a_race_that_is_lost_is_merged(self, tmp_path: Path) -> None:
        hooked = Hooked("lab", Objects())
        directory = make(tmp_path / "1")
        Records(hooked).commit(directory)
        theirs = make(tmp_path / "2")
        (theirs / "new").write_bytes(b"theirs")
        (directory / "mine").write_bytes(b"ours")
        raced: list[str] = []

        def race(operation: str, key: str) -> None:
            if (operation, key) == ("write", manifest_key(UUID)) and not raced:
                raced.append(key)
                Records(hooked).commit(theirs)

        hooked.hook = race
        Records(hooked).commit(directory)
        hooked.hook = lambda _operation, _key: None
        paths = published(hooked).by_path()
        assert {b"new", b"mine"} <= paths.keys()
        assert raced

    def test_an_object_that_is_swept_while_it_is_adopted(self, tmp_path: Path) -> None:
        """It lay there unnamed, another host's sweep takes it just before our manifest names it."""
        hooked = Hooked("lab", Objects())
        directory = make(tmp_path)
        Records(hooked).commit(directory)
        (directory / "new").write_bytes(b"found there")
        hooked.put(plain_key(UUID, b"new"), b"found there")
        swept: list[str] = []

        def sweep(operation: str, key: str) -> None:
            if (operation, key) == ("write", manifest_key(UUID)) and not swept:
                swept.append(key)
                hooked.drop(plain_key(UUID, b"new"))

        hooked.hook = sweep
        Records(hooked).commit(directory)
        assert swept
        assert Records(hooked).retrieve(UUID, tmp_path / "back")
        assert (tmp_path / "back" / "new").read_bytes() == b"found there"
