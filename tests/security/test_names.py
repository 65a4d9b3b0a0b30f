"""Names from stores, index rows and foreign directories are data: whatever they say, nothing outside is touched.

Each test has a directory `outside` with a secret, and compares all of it afterwards. Symlinks are planted before the
look, and between the look and the use by a thread that exchanges a directory with a link as fast as it can.
"""

import base64
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import FILES, UUID, Place, contents, noise, unit_of
from vfs import linux, shadow, wire
from vfs.copying import copy_tree
from vfs.errors import DamagedRecord, ManifestError, NotFound, RunfsError, StoreError, UsageError
from vfs.manifest import CHUNK, File, digest_of, parse
from vfs.records.retrieve import plain_manifest, retrieve
from vfs.scan import scan
from vfs.session import Session
from vfs.stores import open_store
from vfs.stores.protocol import Stat
from vfs.versions.reverting import Reverter

SECRET = b"the secret of somebody else"
Edit = Callable[[dict[str, Any]], None]


class Progress:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


@dataclass
class Outside:
    """A directory that nothing may touch."""

    path: Path

    def state(self) -> dict[str, tuple[int, int, int, bytes]]:
        found = {}
        for base, names, files in os.walk(self.path):
            for name in [base, *(os.path.join(base, each) for each in names + files)]:
                status = os.lstat(name)
                data = Path(name).read_bytes() if stat.S_ISREG(status.st_mode) else b""
                found[name] = (status.st_mode, status.st_uid, status.st_mtime_ns, data)
        return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    made = Outside(tmp_path / "outside")
    made.path.mkdir()
    (made.path / "secret").write_bytes(SECRET)
    (made.path / "secret").chmod(0o600)
    (made.path / "weights.npy").write_bytes(SECRET)
    (made.path / "by step").mkdir()
    (made.path / "by step" / "0.txt").write_bytes(SECRET)
    before = made.state()
    yield made
    assert made.state() == before, "something outside was changed"


@pytest.fixture
def pushed(tmp_path: Path) -> Place:
    """A host that pushed a record to the file store `lab`, which a second one is to read."""
    place = Place(tmp_path / "a")
    place.record()
    with place.session() as session:
        assert not session.pusher.push(unit_of(session)).failed
    return place


@pytest.fixture
def other(tmp_path: Path, pushed: Place) -> Place:
    """Another host: nothing of the first one's project is there."""
    pushed.project.rename(pushed.root / "gone")
    return Place(tmp_path / "b", {"lab": pushed.stores["lab"]})


def edit(place: Place, change: Edit) -> bytes:
    """Publish another manifest in the store, as its operator can, or another host with the same bucket."""
    path = place.store / ".runfs" / UUID / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    data = json.dumps(body).encode()
    path.write_bytes(data)
    return data


def file_of(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(file for file in body["files"] if file["path"] == name)
    return found


def reindexed(session: Session) -> dict[str, Any]:
    return session.run("reindex", {"stores": True}, Progress())


@contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Meanwhile these two names are exchanged, again and again."""
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            with suppress(FileNotFoundError):
                linux.exchange(os.fsencode(one), os.fsencode(other))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- manifests -----------------------------------------------------------------------------------------------------

BAD_PATHS: list[Any] = [
    "../escaped",
    "/etc/escaped",
    "notes/../../escaped",
    "notes/./x",
    "notes//x",
    "notes/",
    "",
    ".",
    "..",
    "a\0b",
    "x" * 256,
    {"base64": base64.b64encode(b"../escaped").decode()},
    {"base64": base64.b64encode(b"a\0b").decode()},
    "metrics.json/below-a-file",
]


@pytest.mark.parametrize("name", BAD_PATHS, ids=lambda name: str(name)[:30])
def test_a_manifest_with_a_path_that_leads_out(pushed: Place, other: Place, outside: Outside, name: Any) -> None:
    data = edit(
        pushed, lambda body: file_of(body, "metrics.json" if "below" not in str(name) else "empty").update(path=name)
    )
    with pytest.raises(ManifestError):
        parse(data, UUID)
    with other.session() as session:
        done = reindexed(session)
        assert done["exit"] == 1
        assert done["damaged"][0]["path"].endswith("manifest.json")
    assert not list(other.root.rglob("escaped"))
    assert not Path("/etc/escaped").exists()


def test_a_manifest_that_goes_through_its_own_link(pushed: Place, other: Place, outside: Outside) -> None:
    """A link out, and a file below it."""

    def change(body: dict[str, Any]) -> None:
        notes = file_of(body, "notes")
        notes.update(kind="symlink", target=str(outside.path))

    edit(pushed, change)
    with other.session() as session:
        assert reindexed(session)["exit"] == 1


def test_a_link_out_stays_a_link_and_is_never_followed(pushed: Place, other: Place, outside: Outside) -> None:
    """A link may say what it likes: it is the reader's own kernel that follows it, with the reader's rights."""
    added = {"path": "out", "kind": "symlink", "mode": 0o777, "mtime_ns": 0, "target": str(outside.path / "secret")}
    edit(pushed, lambda body: body["files"].append(added) or body["files"].sort(key=lambda file: str(file["path"])))
    with other.session() as session:
        assert reindexed(session)["exit"] == 0
        unit = unit_of(session)
        session.evictor.hydrate(unit)
        session.evictor.restore(unit)
        link = other.directory() / "out"
        assert os.readlink(link) == str(outside.path / "secret")
        found = session.pusher.scan(unit)
        (seen,) = [file for file in found.files if file.path == b"out"]
        assert (seen.kind, seen.digest) == ("symlink", b"")
        session.evictor.evict(unit)
    assert not any(SECRET in data for data in contents(pushed.store).values())


KEYS = ["../outside/secret", "/etc/passwd", "a/../../outside/secret", ".runfs/../outside/secret", ".", "x\u0000y", " x"]


@pytest.mark.parametrize("key", KEYS)
def test_an_objects_name_that_leads_out_of_the_store(pushed: Place, other: Place, outside: Outside, key: str) -> None:
    """The bytes it would give are not the digest's anyway; but it is not even asked for."""
    digest = digest_of(lambda offset, length: SECRET[offset : offset + length], len(SECRET)).digest.hex()

    def change(body: dict[str, Any]) -> None:
        file_of(body, "notes/model.bin").update(key=key, digest=digest, size=len(SECRET))

    edit(pushed, change)
    with other.session() as session:
        if reindexed(session)["exit"] == 0:
            with pytest.raises(RunfsError):
                session.evictor.hydrate(unit_of(session))
            assert not any(SECRET in data for data in contents(unit_of(session).base).values())
    store = open_store(pushed.stores["lab"], "lab", {})
    for call in (store.stat, store.read, store.delete, store.local_path):
        with pytest.raises((UsageError, NotFound)):
            call(key)  # type: ignore[operator]
    with pytest.raises(UsageError):
        store.write(key, b"x")
    store.disconnect()


def test_a_manifest_that_marks_holes_as_bytes(pushed: Place, other: Place) -> None:
    """The attribute by which the cache knows what is here came from the store: zeros were shown as the file's bytes."""
    whole = b"RFC1" + bytes(32) + (len(FILES[b"weights.npy"])).to_bytes(8, "little") + b"\0" + bytes(4) + b"\x03\0\0\0"

    def change(body: dict[str, Any]) -> None:
        hostile = {"user.runfs.content": base64.b64encode(whole).decode(), "user.mine": base64.b64encode(b"1").decode()}
        file_of(body, "weights.npy").update(attributes=hostile)

    edit(pushed, change)
    with other.session() as session:
        assert reindexed(session)["exit"] == 0
        unit = unit_of(session)
        session.evictor.hydrate(unit)
        assert contents(unit.base)[b"weights.npy"] == FILES[b"weights.npy"]
        assert os.getxattr(unit.base + b"/weights.npy", "user.mine") == b"1"


def test_no_set_id_bits_and_no_devices_from_a_store(pushed: Place, other: Place) -> None:
    """A daemon of root's would make programs that run with root's rights, from what a store says."""

    def change(body: dict[str, Any]) -> None:
        file_of(body, "metrics.json").update(mode=0o6755)
        file_of(body, "weights.npy").update(mode=0o4711)
        body["files"].append({"path": "zz", "kind": "other", "mode": 0o6666, "mtime_ns": 0, "rdev": 0x0103})

    edit(pushed, change)
    with other.session() as session:
        assert reindexed(session)["exit"] == 0
        unit = unit_of(session)
        for stage in (unit.base, None):
            if stage is None:
                session.evictor.restore(unit)
                stage = os.fsencode(other.directory())
            for name, mode in ((b"metrics.json", 0o755), (b"weights.npy", 0o711)):
                assert stat.S_IMODE(os.lstat(stage + b"/" + name).st_mode) == mode
            assert stat.S_ISFIFO(os.lstat(stage + b"/zz").st_mode)


def test_set_id_bits_of_a_local_file_outlive_an_eviction(tmp_path: Path) -> None:
    """They are this machine's own word."""
    place = Place(tmp_path / "a")
    place.record()
    (place.directory() / "weights.npy").chmod(0o4755)
    with place.session() as session:
        unit = unit_of(session)
        session.evictor.evict(unit)
        assert stat.S_IMODE(os.lstat(unit.base + b"/weights.npy").st_mode) == 0o4755
        session.evictor.restore(unit)
        assert stat.S_IMODE((place.directory() / "weights.npy").stat().st_mode) == 0o4755


def test_what_another_host_merges_in_has_no_set_id_bits(pushed: Place, other: Place) -> None:
    with other.session() as session:
        assert reindexed(session)["exit"] == 0
        session.evictor.restore(unit_of(session))
    edit(pushed, lambda body: (file_of(body, "metrics.json").update(mode=0o6755), body.update(generation=7)))
    with other.session() as session:
        unit = unit_of(session)
        (other.directory() / "empty").write_bytes(b"changed")
        session.core.units.mark_dirty(unit, "test")
        assert not session.pusher.push(unit).failed
        assert stat.S_IMODE((other.directory() / "metrics.json").stat().st_mode) == 0o755


def test_a_version_gives_no_set_id_bits(pushed: Place) -> None:
    edit(pushed, lambda body: file_of(body, "weights.npy").update(mode=0o4755))
    wanted = parse((pushed.store / ".runfs" / UUID / "manifest.json").read_bytes())
    (pushed.directory() / "weights.npy").write_bytes(b"other")
    with pushed.session() as session:
        unit = unit_of(session)
        reverter = Reverter(session.core, session.pusher, session.hydrator)
        reverter.apply(unit, reverter.plan(unit, wanted))
        made = pushed.directory() / "weights.npy"
        assert (made.read_bytes(), stat.S_IMODE(made.stat().st_mode)) == (FILES[b"weights.npy"], 0o755)
        made.chmod(0o4755)
        planned = reverter.plan(unit, wanted)
        assert planned.count == 0, "and takes none"


@pytest.mark.parametrize("place", ["/etc", "/", "/root/.ssh", "file:///etc", "../../etc", "project/../../outside"])
def test_a_row_that_names_a_place_outside(pushed: Place, other: Place, outside: Outside, place: str) -> None:
    def change(body: dict[str, Any]) -> None:
        for row in body["rows"]:
            row.update(storage_uri=place, local_uri=f"file://{outside.path}")

    edit(pushed, change)
    with other.session() as session:
        assert reindexed(session)["exit"] == 0
        directory = Path(os.fsdecode(unit_of(session).directory))
        assert directory.is_relative_to(other.project)


@pytest.mark.parametrize("uuid", ["..", ".", "../../outside", "a/b", "", "x" * 65, ".runfs", "a\0b"])
def test_index_rows_with_uuids_that_are_paths(tmp_path: Path, outside: Outside, uuid: str) -> None:
    place = Place(tmp_path / "a")
    place.record()
    import sqlite3

    with sqlite3.connect(place.index) as db:
        db.execute('UPDATE "index" SET record_id = ?, storage_uri = ?', (uuid, f"file://{outside.path}"))
    db.close()
    with place.session() as session:
        assert session.core.index.get(uuid) is None
        for command in ("push", "evict", "hydrate", "pin", "verify"):
            with suppress(RunfsError):
                session.run(command, {"uuids": [uuid]}, Progress())


# --- listings of records without a manifest --------------------------------------------------------------------------

LISTED = [
    "a/../../escaped",
    "../escaped",
    "/abs",
    "a//b",
    "a/",
    "a/.",
    "%2E%2E/escaped",
    "x/%2E%2E/%2E%2E/escaped",
    "a%00b",
]


@pytest.mark.parametrize("name", LISTED)
def test_a_hostile_listing(tmp_path: Path, outside: Outside, name: str) -> None:
    """`%2E%2E` decodes to `..`: what is checked is the name as it will be made."""
    kept = wire.Plain(open_store(f"file://{tmp_path}/store", "lab", {}))
    found = [Stat(f"{UUID}/{name}", 4, None, None, None), Stat(f"{UUID}/id.json", 2, None, None, None)]
    with pytest.raises(DamagedRecord):
        plain_manifest(kept, UUID, found)


# --- the file store --------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made = tmp_path / "store"
    opened = open_store(f"file://{made}", "lab", {})
    opened.write("u/d/known", b"known")
    opened.disconnect()
    return made


def test_links_in_a_file_store_lead_nowhere(store: Path, outside: Outside) -> None:
    (store / "u" / "link").symlink_to(outside.path)
    (store / "u" / "file").symlink_to(outside.path / "secret")
    (store / "v").symlink_to(outside.path)
    opened = open_store(f"file://{store}", "lab", {})
    for key in ("u/link/secret", "u/file", "v/secret"):
        with pytest.raises(StoreError):
            opened.read(key)
        opened.delete(key)
        opened.write(key, b"ours")
        assert opened.read(key) == b"ours"
    assert {stat.key for stat in opened.list()} == {"u/d/known", "u/link/secret", "u/file", "v/secret"}
    opened.disconnect()


def test_a_hard_link_in_a_file_store_is_replaced_not_written_into(store: Path, outside: Outside) -> None:
    os.link(outside.path / "secret", store / "u" / "hard")
    before = outside.state()
    opened = open_store(f"file://{store}", "lab", {})
    opened.write("u/hard", b"ours")
    opened.delete("u/hard")
    opened.disconnect()
    assert outside.state() == before


def test_links_planted_while_a_file_store_works(store: Path, outside: Outside) -> None:
    link = store / "u" / "other"
    link.symlink_to(outside.path)
    (store / "u" / "d" / "secret").write_bytes(b"inside")
    opened = open_store(f"file://{store}", "lab", {})
    calls: list[Callable[[], object]] = [
        lambda: opened.read("u/d/secret"),
        lambda: opened.write("u/d/new", b"x" * 100),
        lambda: opened.delete("u/d/weights.npy"),
        lambda: opened.copy("u/d/secret", "u/d/copied"),
        lambda: list(opened.list("u/")),
    ]
    with exchanging(store / "u" / "d", link):
        for _round in range(60):
            for call in calls:
                with suppress(StoreError):
                    assert call() != SECRET
    opened.disconnect()
    assert not any(SECRET in data for data in contents(store / ".runfs.alt").values())


# --- working directories, shadows, copies ----------------------------------------------------------------------------


def test_a_scan_never_leaves_the_record(tmp_path: Path, outside: Outside) -> None:
    root = tmp_path / "record"
    (root / "d").mkdir(parents=True)
    (root / "d" / "secret").write_bytes(b"inside")
    (root / "link").symlink_to(outside.path)
    wrong = digest_of(lambda offset, length: SECRET[offset : offset + length], len(SECRET)).digest
    with exchanging(root / "d", root / "link"):
        for _round in range(80):
            with suppress(OSError, DamagedRecord):
                found = scan(os.fsencode(root), {}, content=lambda _digest: None)
                assert wrong not in found.contents


def test_what_is_made_in_a_shadow_never_goes_through_a_link(tmp_path: Path, outside: Outside) -> None:
    root = tmp_path / "shadow"
    (root / "d").mkdir(parents=True)
    (root / "link").symlink_to(outside.path)
    inside = b"d/secret"
    with exchanging(root / "d", root / "link"):
        for number in range(300):
            for file in (
                File(b"d", "directory", 0o777, 0),
                File(b"d/n%d" % number, "file", 0o666, 0),
                File(b"d/l%d" % number, "symlink", 0o777, 0, target=b"x"),
                File(b"d/by step", "directory", 0o777, 0),
                File(b"d/p%d" % number, "other", 0o666, 0),
            ):
                with suppress(OSError):
                    fd = shadow.add_file(os.fsencode(root), file)
                    if fd is not None:
                        os.close(fd)
            with suppress(OSError):
                shadow.settle_directories(os.fsencode(root), [File(b"d/by step", "directory", 0o777, 1)])
    assert inside


def test_a_link_in_place_of_a_directory_stops_restore_of_a_version(pushed: Place, outside: Outside) -> None:
    wanted = parse((pushed.store / ".runfs" / UUID / "manifest.json").read_bytes())
    with pushed.session() as session:
        unit = unit_of(session)
        reverter = Reverter(session.core, session.pusher, session.hydrator)
        (pushed.directory() / "notes" / "model.bin").unlink()
        (pushed.directory() / "notes" / "by step" / "0.txt").write_bytes(b"other")
        planned = reverter.plan(unit, wanted)
        shutil.rmtree(pushed.directory() / "notes")
        (pushed.directory() / "notes").symlink_to(outside.path)
        with pytest.raises((RunfsError, OSError)):
            reverter.apply(unit, planned)
    assert not (outside.path / "model.bin").exists()


@pytest.mark.parametrize("planted", ["notes", "notes/by step", "weights.npy"])
def test_a_link_in_a_directory_that_a_record_is_pulled_into(
    pushed: Place, tmp_path: Path, outside: Outside, planted: str
) -> None:
    kept = wire.Plain(open_store(pushed.stores["lab"], "lab", {}))
    manifest = parse((pushed.store / ".runfs" / UUID / "manifest.json").read_bytes())
    target = tmp_path / "pulled"
    retrieve(kept, manifest, target)
    there = target / planted
    shutil.rmtree(there) if there.is_dir() else there.unlink()
    there.symlink_to(outside.path / planted.rpartition("/")[2] if planted != "notes" else outside.path)
    with pytest.raises((RunfsError, OSError)):
        retrieve(kept, manifest, target)
    kept.opened.disconnect()


class TestImport:
    """Of a directory that belongs to somebody else, by root: what he may not read, or run as root, must not result."""

    @pytest.fixture
    def theirs(self, tmp_path: Path, outside: Outside) -> Path:
        made = Place(tmp_path / "theirs")
        made.record(files={b"a.bin": b"a", b"d/secret": b"inside"})
        return made.directory()

    def test_set_id_bits_stay_behind(self, theirs: Path, tmp_path: Path) -> None:
        """The copy is root's: with the bit, whoever made the record would be root."""
        (theirs / "a.bin").chmod(0o6777)
        place = Place(tmp_path / "mine")
        with place.session() as session:
            done = session.run("import", {"source": str(theirs)}, Progress())
            assert done["imported"] == [UUID]
            (made,) = (place.project / "storage").rglob("a.bin")
            assert stat.S_IMODE(made.stat().st_mode) == 0o777

    def test_times_links_and_fifos_come_along(self, theirs: Path, tmp_path: Path, outside: Outside) -> None:
        (theirs / "d" / "link").symlink_to(outside.path / "secret")
        os.mkfifo(theirs / "d" / "pipe")
        os.setxattr(theirs / "a.bin", "user.note", b"n")
        os.utime(theirs / "d", ns=(5, 6))
        copy_tree(os.fsencode(theirs), os.fsencode(tmp_path / "copy"))
        made = tmp_path / "copy"
        assert contents(made) == contents(theirs)
        assert os.readlink(made / "d" / "link") == str(outside.path / "secret")
        assert stat.S_ISFIFO((made / "d" / "pipe").lstat().st_mode)
        assert (made / "d").stat().st_mtime_ns == 6
        assert (made / "a.bin").stat().st_mtime_ns == (theirs / "a.bin").stat().st_mtime_ns
        assert os.getxattr(made / "a.bin", "user.note") == b"n"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
    def test_devices_are_refused(self, theirs: Path, tmp_path: Path) -> None:
        os.mknod(theirs / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        with Place(tmp_path / "mine").session() as session:
            done = session.run("import", {"source": str(theirs)}, Progress())
            assert "device" in done["failed"][0]["reason"]

    def test_a_forged_placeholder_is_refused(self, theirs: Path, tmp_path: Path) -> None:
        os.setxattr(theirs / "a.bin", "user.runfs.content", b"RFC1" + bytes(32) + bytes(8) + b"\0")
        with Place(tmp_path / "mine").session() as session:
            done = session.run("import", {"source": str(theirs)}, Progress())
            assert "user.runfs.content" in done["failed"][0]["reason"]

    def test_links_planted_while_it_copies(self, theirs: Path, tmp_path: Path, outside: Outside) -> None:
        (theirs / "link").symlink_to(outside.path)
        (theirs / "file").symlink_to(outside.path / "secret")
        with exchanging(theirs / "d", theirs / "link"), exchanging(theirs / "a.bin", theirs / "file"):
            for number in range(80):
                made = tmp_path / f"copy{number}"
                with suppress(OSError, DamagedRecord):
                    copy_tree(os.fsencode(theirs), os.fsencode(made))
                for base, _names, files in os.walk(made):
                    for name in files:
                        path = Path(base, name)
                        assert path.is_symlink() or path.read_bytes() != SECRET


def test_a_forged_placeholder_in_a_working_directory_is_not_believed(tmp_path: Path) -> None:
    """Its word let a file count as proven that was nowhere: its bytes were dropped for another content's."""
    place = Place(tmp_path / "a")
    mine = noise(CHUNK, 9)
    place.record(files={b"weights.npy": FILES[b"weights.npy"], b"mine.bin": mine})
    with place.session() as session:
        unit = unit_of(session)
        known = {file.path: file for file in session.pusher.scan(unit).files}
        wanted = known[b"weights.npy"]
        forged = b"RFC1" + wanted.digest + wanted.size.to_bytes(8, "little") + b"\0"
        os.setxattr(place.directory() / "mine.bin", "user.runfs.content", forged)
        with pytest.raises(DamagedRecord, match="setfattr -x"):
            session.pusher.push(unit)
        with pytest.raises(RunfsError):
            session.evictor.evict(unit)
        assert (place.directory() / "mine.bin").read_bytes() == mine
        os.removexattr(place.directory() / "mine.bin", "user.runfs.content")
        session.evictor.evict(unit)
        session.evictor.hydrate(unit)
        assert contents(unit.base)[b"mine.bin"] == mine
