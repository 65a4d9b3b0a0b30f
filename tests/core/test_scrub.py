"""The scrub: damage of every kind, here and in stores, found, mended from what is right, or kept apart; told, resumed,
limited. On a directory and on S3."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opendal
import pytest

from tests.core.making import FILES, UUID, Place, contents, everything, hooked, noise, unit_of, until
from tests.servers import Seaweed
from vfs import cache
from vfs.core import data_key, manifest_key, plain_key
from vfs.errors import RunfsError
from vfs.manifest import CHUNK, dump, parse
from vfs.session import Session
from vfs.trust.checking import Pace, Stopped, Verdict, Word
from vfs.trust.mending import Plan, plan

OTHER = "recordBBBB02"


class Nobody:
    def __init__(self) -> None:
        self.cancelled = False
        self.told: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any], /) -> None:
        self.told.append(event)


def verify(session: Session, **args: Any) -> dict[str, Any]:
    return session.run("verify", {"deep": True, **args}, Nobody())


def push(session: Session, uuid: str = UUID) -> None:
    for _ in range(3):
        outcome = session.pusher.push(unit_of(session, uuid))
        assert not outcome.failed, outcome.failed
        if outcome.clean:
            return
    raise AssertionError("it never comes to rest")


class Objects:
    """What is in a store, past runfs: as a fault, or another tool, would change it."""

    def __init__(self, operator: opendal.Operator) -> None:
        self._operator = operator

    def get(self, key: str) -> bytes:
        return bytes(self._operator.read(key))

    def put(self, key: str, data: bytes) -> None:
        self._operator.write(key, data)

    def drop(self, key: str) -> None:
        self._operator.delete(key)


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Objects]:
    """A store's URL, and what it holds."""
    if request.param == "file":
        (tmp_path / "store").mkdir()
        return (tmp_path / "store").as_uri(), Objects(opendal.Operator("fs", root=str(tmp_path / "store")))
    server: Seaweed = request.getfixturevalue("seaweed")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    prefix = f"scrub-{os.urandom(4).hex()}"
    operator = opendal.Operator(
        "s3",
        bucket=server.bucket,
        endpoint=server.endpoint,
        region=server.region,
        root=f"/{prefix}",
        **server.options(),
    )
    return server.url.replace("?", f"/{prefix}?"), Objects(operator)


@pytest.fixture
def place(tmp_path: Path, store: tuple[str, Objects]) -> Place:
    """A project with two homes: the store that is to be damaged, and a directory that is not."""
    (tmp_path / "attic").mkdir()
    return Place(tmp_path / "host", {"lab": store[0], "attic": (tmp_path / "attic").as_uri()})


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    place.record()
    with place.session() as session:
        push(session)
        yield session


def flipped(data: bytes, at: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flip(path: Path, at: int = 0) -> None:
    """Change one bit of a file, and nothing that stat(2) shows but the ctime."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rot(session: Session, path: Path, name: bytes, at: int = 0) -> None:
    """What a disk does: one bit is another, and stat(2) shows nothing at all, as far as the journal can tell."""
    flip(path, at)
    known = session.core.journal.known(UUID)
    from dataclasses import replace

    known[name] = replace(known[name], ctime_ns=path.stat().st_ctime_ns)
    session.core.journal.replace_known(UUID, known.values(), [])


def clean(session: Session) -> None:
    """Nothing is wrong any more, byte by byte, and nothing is left to push."""
    push(session)
    done = verify(session)
    assert (done["bad"], done["exit"]) == ([], 0), done


# --- nothing wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", [False, True])
def test_all_is_well(session: Session, evicted: bool) -> None:
    if evicted:
        session.evictor.evict(unit_of(session))
    before = min(each.proven_ns for each in session.core.journal.replicas_of(UUID, "lab").values())
    done = verify(session)
    assert (done["bad"], done["exit"], done["stopped"], done["resumed"]) == ([], 0, False, None)
    assert done["checked"] == len(set(contents(unit_of(session).base).values()))
    assert done["bytes"] >= 2 * sum(map(len, FILES.values())), "both homes are read"
    after = min(each.proven_ns for each in session.core.journal.replicas_of(UUID, "lab").values())
    assert after > before, "what was read back counts as proven"


# --- on this disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotten", [True, False])
@pytest.mark.parametrize("name", [b"weights.npy", b"metrics.json"])
def test_a_flipped_bit_here_is_mended_from_a_home(session: Session, place: Place, rotten: bool, name: bytes) -> None:
    path = place.directory() / os.fsdecode(name)
    rot(session, path, name, 5) if rotten else flip(path, 5)
    wrong = path.read_bytes()
    mtime = path.stat().st_mtime_ns
    found = verify(session)
    assert [(each["path"], each["store"], each["outcome"]) for each in found["bad"]] == [(name.decode(), "", None)]
    assert "lab has it" in found["bad"][0]["reason"]
    assert found["exit"] == 1
    assert path.read_bytes() == wrong, "without repair nothing is touched"
    done = verify(session, repair=True)
    assert (done["repaired"], done["exit"]) == (1, 0), done
    assert path.read_bytes() == FILES[name]
    assert path.stat().st_mtime_ns == mtime
    kept = [data for path_, data in contents(place.directory()).items() if b".damaged-" in path_]
    assert kept == ([] if rotten else [wrong]), "what somebody may have written is kept under another name"
    clean(session)
    assert os.listdir(place.directory().parent) == [UUID]


def test_a_file_that_was_cut_here_with_its_mtime_kept(session: Session, place: Place) -> None:
    path = place.directory() / "weights.npy"
    status = path.stat()
    os.truncate(path, 1000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = verify(session, repair=True)
    assert (done["repaired"], done["exit"]) == (1, 0), done
    assert path.read_bytes() == FILES[b"weights.npy"]
    clean(session)


def test_a_change_is_no_damage(session: Session, place: Place) -> None:
    (place.directory() / "metrics.json").write_bytes(b"changed by somebody")
    (place.directory() / "notes/model.bin").unlink()
    done = verify(session, repair=True)
    assert (done["bad"], done["exit"]) == ([], 0)
    assert (place.directory() / "metrics.json").read_bytes() == b"changed by somebody"
    assert not (place.directory() / "notes/model.bin").exists()


def test_a_damaged_file_that_is_open_stays(session: Session, place: Place) -> None:
    path = place.directory() / "weights.npy"
    rot(session, path, b"weights.npy")
    with open(path, "rb"):
        done = verify(session, repair=True)
        assert done["exit"] == 1
        assert "is in use" in done["bad"][0]["reason"]
    assert verify(session, repair=True)["exit"] == 0
    clean(session)


@pytest.mark.parametrize("whole", [True, False])
def test_a_flipped_bit_in_the_cache(session: Session, whole: bool) -> None:
    """A large file that came back, in part or whole, and a small one that was kept."""
    unit = unit_of(session)
    session.evictor.evict(unit)
    path = Path(os.fsdecode(unit.shadow)) / "weights.npy"
    with open(path, "rb") as file:
        if whole:
            session.hydrator.complete(file.fileno(), UUID, b"weights.npy")
        else:
            partial = session.core.partial(file.fileno())
            assert partial is not None
            session.hydrator.bring(partial, [1], UUID, b"weights.npy", 5.0)
            session.core.release(partial)
    session.core.settle()
    session.pusher.scan(unit)
    flip(path, CHUNK + 7)
    flip(Path(os.fsdecode(unit.shadow)) / "metrics.json", 3)
    found = verify(session)
    assert {each["path"] for each in found["bad"]} == {"weights.npy", "metrics.json"}, found
    done = verify(session, repair=True)
    assert (done["repaired"], done["exit"]) == (2, 0), done
    assert everything(session, unit).items() >= {key: FILES[key] for key in (b"weights.npy", b"metrics.json")}.items()
    clean(session)


# --- in a store ----------------------------------------------------------------------------------------------------


def damage(objects: Objects, key: str, how: str) -> None:
    data = objects.get(key)
    match how:
        case "flipped":
            objects.put(key, flipped(data, len(data) // 2))
        case "cut":
            objects.put(key, data[: len(data) // 2])
        case "longer":
            objects.put(key, data + b"x")
        case "gone":
            objects.drop(key)


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone"])
@pytest.mark.parametrize("source", ["here", "another home"])
def test_a_damaged_object_is_brought_again(session: Session, store: tuple[str, Objects], how: str, source: str) -> None:
    """From this disk, or from the other home where the record is evicted."""
    unit = unit_of(session)
    if source == "another home":
        session.evictor.evict(unit)
    damage(store[1], plain_key(UUID, b"weights.npy"), how)
    found = verify(session)
    assert [(each["path"], each["store"], each["outcome"]) for each in found["bad"]] == [("weights.npy", "lab", None)]
    assert found["exit"] == 1
    done = verify(session, repair=True)
    assert (done["repaired"], done["exit"]) == (1, 0), done
    file = parse(store[1].get(manifest_key(UUID)), UUID).by_path()[b"weights.npy"]
    assert store[1].get(file.key) == FILES[b"weights.npy"]
    if how != "gone":
        assert store[1].get(plain_key(UUID, b"weights.npy")) != FILES[b"weights.npy"], (
            "what is there is not overwritten"
        )
    clean(session)


def test_a_damaged_object_under_its_digest_is_replaced(
    session: Session, place: Place, store: tuple[str, Objects]
) -> None:
    from blake3 import blake3

    (place.directory() / "metrics.json").write_bytes(b"later")
    push(session)
    key = data_key(UUID, blake3(b"later").digest())
    store[1].put(key, b"1ater")
    assert verify(session, repair=True)["repaired"] == 1
    assert store[1].get(key) == b"later"
    clean(session)


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("how", ["gone", "no json", "another record's", "changed", "older"])
def test_a_wrong_manifest_is_put_right(
    session: Session, place: Place, store: tuple[str, Objects], how: str, evicted: bool
) -> None:
    objects, key = store[1], manifest_key(UUID)
    older = objects.get(key)
    (place.directory() / "new").write_bytes(b"n")
    push(session)
    if evicted:
        session.evictor.evict(unit_of(session))
    good = objects.get(key)
    wrong = {
        "no json": b'{"format": 1,',
        "another record's": good.replace(UUID.encode(), OTHER.encode()),
        "changed": dump(replace_files(good)),
        "older": older,
        "gone": b"",
    }[how]
    objects.put(key, wrong) if wrong else objects.drop(key)
    before = everything(session, unit_of(session)) if evicted else contents(place.directory())
    found = verify(session)
    assert [(each["path"], each["store"]) for each in found["bad"]] == [("", "lab")], found
    assert found["exit"] == 1
    done = verify(session, repair=True)
    assert (done["repaired"], done["exit"]) == (1, 0), done
    assert parse(objects.get(key), UUID).by_path().keys() == parse(good, UUID).by_path().keys()
    if wrong:
        named = done["bad"][0]["reason"].rpartition(" ")[2]
        assert objects.get(named) == wrong, "what was there is kept"
    assert contents(unit_of(session).base) == before
    clean(session)


def replace_files(good: bytes) -> Any:
    """A manifest of the same version that calls one file another."""
    from dataclasses import replace

    manifest = parse(good, UUID)
    files = manifest.by_path()
    files[b"metrics.json"] = replace(
        files[b"metrics.json"], digest=files[b"weights.npy"].digest, size=files[b"weights.npy"].size
    )
    return replace(manifest, files=tuple(files[path] for path in sorted(files)))


def test_an_older_manifest_removes_nothing_here(session: Session, place: Place, store: tuple[str, Objects]) -> None:
    """A bucket that was put back from a backup, and a push before anybody has verified."""
    older = store[1].get(manifest_key(UUID))
    (place.directory() / "new").write_bytes(b"n")
    push(session)
    store[1].put(manifest_key(UUID), older)
    (place.directory() / "newer").write_bytes(b"n")
    push(session)
    assert {"new", "newer"} <= set(os.listdir(place.directory()))
    assert {b"new", b"newer"} <= parse(store[1].get(manifest_key(UUID)), UUID).by_path().keys()


# --- nothing right is left -----------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, store: tuple[str, Objects]) -> Iterator[tuple[Session, Place]]:
    """A project with one home."""
    place = Place(tmp_path / "alone", {"lab": store[0]})
    place.record()
    with place.session() as session:
        push(session)
        yield session, place


def test_quarantine_of_a_file_here(alone: tuple[Session, Place], store: tuple[str, Objects]) -> None:
    session, place = alone
    path, key = place.directory() / "weights.npy", plain_key(UUID, b"weights.npy")
    good = store[1].get(key)
    rot(session, path, b"weights.npy", 9)
    wrong = path.read_bytes()
    store[1].put(key, flipped(good, 3))
    done = verify(session, repair=True)
    assert (done["quarantined"], done["exit"]) == (2, 1), done
    assert not path.exists(), "it is not shown under its name"
    (kept,) = [name for name in os.listdir(place.directory()) if name.startswith("weights.npy.damaged-")]
    assert (place.directory() / kept).read_bytes() == wrong, "what there is of it is kept"
    push(session)
    manifest = parse(store[1].get(manifest_key(UUID)), UUID).by_path()
    assert {b"weights.npy", os.fsencode(kept)} <= manifest.keys(), "nobody has removed it"
    assert store[1].get(manifest[os.fsencode(kept)].key) == wrong
    shown = session.run("status", {}, Nobody())["quarantine"]
    assert [(each["uuid"], each["path"], each["kept"]) for each in shown] == [(UUID, "weights.npy", kept)]
    with pytest.raises(RunfsError, match="verify --repair"):
        session.evictor.evict(unit_of(session))
    again = verify(session, repair=True)
    assert again["exit"] == 1, "it is told until it is mended"
    # The right bytes turn up: in the store, or by hand.
    store[1].put(key, good)
    done = verify(session, repair=True)
    assert done["exit"] == 0, done
    assert path.read_bytes() == FILES[b"weights.npy"]
    assert session.core.journal.quarantined() == []
    clean(session)


def test_a_file_in_quarantine_that_somebody_makes_again(
    alone: tuple[Session, Place], store: tuple[str, Objects]
) -> None:
    session, place = alone
    path, key = place.directory() / "weights.npy", plain_key(UUID, b"weights.npy")
    rot(session, path, b"weights.npy")
    store[1].put(key, flipped(store[1].get(key), 3))
    verify(session, repair=True)
    path.write_bytes(FILES[b"weights.npy"])
    session.core.units.mark_dirty(unit_of(session), "test")
    push(session)
    assert session.core.journal.quarantined() == []
    file = parse(store[1].get(manifest_key(UUID)), UUID).by_path()[b"weights.npy"]
    assert store[1].get(file.key) == FILES[b"weights.npy"]
    clean(session)


def test_quarantine_of_what_is_only_in_a_store(alone: tuple[Session, Place], store: tuple[str, Objects]) -> None:
    session, place = alone
    unit, key = unit_of(session), plain_key(UUID, b"weights.npy")
    session.evictor.evict(unit)
    good = store[1].get(key)
    store[1].put(key, flipped(good, 3))
    done = verify(session, repair=True)
    assert (done["quarantined"], done["exit"]) == (2, 1), done
    assert store[1].get(key) == flipped(good, 3), "it is kept as it is"
    (row,) = session.core.journal.quarantined()
    assert (row.path, row.kept) == (b"weights.npy", b"")
    told = session.run("status", {"paths": [str(place.directory() / "weights.npy")]}, Nobody())
    assert "no right copy is left" in told["paths"][0]["error"]
    assert told["exit"] == 1
    with pytest.raises(RunfsError):
        session.evictor.hydrate(unit)
    store[1].put(key, good)
    assert verify(session, repair=True)["exit"] == 0
    assert session.core.journal.quarantined() == []
    clean(session)


def test_quarantine_of_a_chunk_in_the_cache(alone: tuple[Session, Place], store: tuple[str, Objects]) -> None:
    session, _place = alone
    unit, key = unit_of(session), plain_key(UUID, b"weights.npy")
    session.evictor.evict(unit)
    session.evictor.hydrate(unit)
    session.core.settle()
    session.pusher.scan(unit)
    path = Path(os.fsdecode(unit.shadow)) / "weights.npy"
    flip(path, CHUNK + 1)
    wrong = path.read_bytes()
    store[1].put(key, flipped(store[1].get(key), 3))
    done = verify(session, repair=True)
    assert done["quarantined"] >= 1, done
    header = cache.read_header(os.fsencode(path))
    assert header is not None, "the chunk that is wrong is not called local any more"
    assert [n for first, end in header.runs for n in range(first, end)] == [0, 2]
    kept = [data for name, data in contents(unit.shadow).items() if b".damaged-" in name]
    assert kept == [wrong]
    session.pusher.push(unit)
    assert [row.path for row in session.core.journal.quarantined()] == [b"weights.npy"], "a push does not end it"


def test_a_store_that_cannot_be_asked_is_no_reason_to_give_up(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "attic": f"hooked://{tmp_path}/attic"})
    place.record()
    from vfs.errors import Unreachable

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    with place.session() as session:
        push(session)
        session.evictor.evict(unit_of(session))
        hooked(session, "attic").hook = away
        key = plain_key(UUID, b"weights.npy")
        hooked(session, "lab").put(key, flipped(hooked(session, "lab").raw(key)))
        done = verify(session, repair=True)
        assert (done["quarantined"], done["repaired"], done["exit"]) == (0, 0, 1), done
        assert session.core.journal.quarantined() == []
        hooked(session, "attic").hook = lambda _operation, _key: None
        assert verify(session, repair=True)["exit"] == 0


# --- the plan ------------------------------------------------------------------------------------------------------

GOOD, BAD, GONE, PART, AWAY = (Verdict(word) for word in (Word.GOOD, Word.BAD, Word.GONE, Word.PART, Word.UNKNOWN))


@pytest.mark.parametrize(
    ("here", "there", "wanted"),
    [
        ({b"a": GOOD}, {"lab": GOOD}, Plan()),
        ({b"a": PART}, {"lab": GOOD}, Plan()),
        ({b"a": GOOD}, {"lab": AWAY}, Plan()),
        ({b"a": BAD}, {"lab": GOOD}, Plan((), (b"a",), "lab")),
        ({b"a": GOOD}, {"lab": GONE}, Plan(("lab",), (), "", b"a")),
        ({b"a": PART}, {"lab": BAD, "attic": GOOD}, Plan(("lab",), (), "attic")),
        ({b"a": BAD, b"b": GOOD}, {"lab": BAD}, Plan(("lab",), (b"a",), "", b"b")),
        ({b"a": BAD}, {"lab": BAD}, Plan(("lab",), (b"a",), lost=True)),
        ({b"a": PART}, {"lab": GONE}, Plan(("lab",), lost=True)),
        ({b"a": PART}, {"lab": GONE, "attic": AWAY}, Plan(("lab",), wait=True)),
        ({b"a": BAD}, {}, Plan((), (b"a",), lost=True)),
    ],
)
def test_what_is_to_be_done(here: dict[bytes, Verdict], there: dict[str, Verdict], wanted: Plan) -> None:
    assert plan(here, there) == wanted


def test_a_file_is_mended_from_its_copy_beside_it(tmp_path: Path) -> None:
    """Two files with the same bytes, one of them damaged, and the store's copy too."""
    place = Place(tmp_path / "host")
    place.record(files={b"one": noise(70_000), b"two": noise(70_000)})
    with place.session() as session:
        push(session)
        rot(session, place.directory() / "one", b"one")
        for path in (place.store / UUID).glob("[ot][nw][eo]"):
            path.write_bytes(flipped(path.read_bytes()))
        done = verify(session, repair=True)
        assert (done["repaired"], done["exit"]) == (2, 0), done
        assert (place.directory() / "one").read_bytes() == noise(70_000)
        clean(session)


# --- pace, progress, going on --------------------------------------------------------------------------------------


def test_the_pace_is_kept() -> None:
    pace = Pace(1e6, lambda: False)
    began = time.monotonic()
    for _ in range(4):
        pace.spend(50_000)
    assert time.monotonic() - began >= 0.19
    with pytest.raises(Stopped):
        Pace(1.0, lambda: time.monotonic() - began > 0.3).spend(1000)


UUIDS = [f"record{letter * 4}01" for letter in "ABCD"]


@pytest.fixture
def several(tmp_path: Path) -> Place:
    place = Place(tmp_path / "host")
    for uuid in UUIDS:
        place.record(uuid, {b"data": noise(200_000, ord(uuid[6]))})
    with place.session() as session:
        for uuid in UUIDS:
            push(session, uuid)
    return place


def test_progress_is_told(several: Place) -> None:
    with several.session() as session:
        listening = Nobody()
        session.run("verify", {"deep": True, "rate": 1_000_000}, listening)
    told = [event for event in listening.told if event["what"] == "verify" and "left_s" in event]
    assert told
    assert {"uuid", "done", "size", "rate"} <= told[0].keys()
    assert all(event["rate"] <= 1_300_000 for event in told), "not faster than asked for"


def test_a_scrub_that_was_killed_goes_on(several: Place) -> None:
    """In a process of its own, killed when it has noted how far it is; what it had found is not forgotten."""
    first = several.store / UUIDS[0] / "data"
    first.write_bytes(flipped(first.read_bytes()))
    process = os.fork()
    if process == 0:
        try:
            os.environ["RUNFS_FAULT"] = "scrub.saved=kill"
            import importlib

            from vfs import faults

            importlib.reload(faults)
            with several.session() as session:
                session.run("verify", {"deep": True, "rate": 400_000}, Nobody())
        finally:
            os._exit(1)
    _pid, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with several.session() as session:
        state = session.core.journal.scrub("*")
        assert state is not None
        assert state.checked > 0
        done = verify(session)
        assert done["resumed"] == pytest.approx(state.began_ns / 1e9)
        assert done["bytes"] < 2 * verify(session, restart=True)["bytes"]
        assert [each["uuid"] for each in done["bad"]] == [UUIDS[0]]
        assert done["exit"] == 1


@pytest.mark.parametrize("repair", [False, True])
def test_one_that_is_stopped_says_so_and_goes_on(several: Place, repair: bool) -> None:
    first = several.store / UUIDS[0] / "data"
    first.write_bytes(flipped(first.read_bytes()))
    listening = Nobody()

    def leave(event: dict[str, Any]) -> None:
        listening.cancelled = True

    class Leaving(Nobody):
        def __call__(self, event: dict[str, Any], /) -> None:
            if event.get("uuid", "") > UUIDS[0]:
                self.cancelled = True

    with several.session() as session:
        stopped = session.run("verify", {"deep": True, "repair": repair, "rate": 500_000}, Leaving())
        assert stopped["stopped"]
        assert stopped["exit"] == 1
        done = verify(session, repair=repair)
        whole = verify(session, restart=True)
        assert done["resumed"] is not None
        assert {each["uuid"] for each in done["bad"]} == {UUIDS[0]}
        assert done["exit"] == int(not repair)
        assert (whole["resumed"], whole["exit"]) == (None, int(not repair))
        assert session.core.journal.scrub("*") is None


def test_records_that_are_named(several: Place) -> None:
    second = several.store / UUIDS[1] / "data"
    second.write_bytes(flipped(second.read_bytes()))
    with several.session() as session:
        assert verify(session, uuids=[UUIDS[0]])["exit"] == 0
        assert verify(session, uuids=[UUIDS[1]])["exit"] == 1


def test_repair_in_a_dry_run_touches_nothing(session: Session, place: Place) -> None:
    path = place.directory() / "weights.npy"
    flip(path)
    before = path.read_bytes()
    done = verify(session, repair=True, dry_run=True)
    assert (done["repaired"], done["exit"]) == (0, 1)
    assert path.read_bytes() == before


def test_not_pushed_yet_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path / "host")
    place.record()
    with place.session() as session:
        done = verify(session)
        assert "not pushed there yet" in done["bad"][0]["reason"]
    until(lambda: True)
