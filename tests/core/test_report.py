"""What `status`, `ls`, `--where` and `doctor` say of records that ran, are nested, or were taken up from a store."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import FILES, NESTED, UUID, Place, unit_of, write_record
from vfs.session import Session

RUN_FILES = {b"output.log": b"said\n"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A record without markers of a run of its own, whose execution has finished: as machinable makes it."""
    place = Place(tmp_path / "host")
    directory = place.record(UUID, FILES)
    for marker in ("started_at", "finished_at"):
        (directory / marker).unlink()
    inner = directory / "x" / "run1"
    write_record(inner, NESTED, RUN_FILES, parent=UUID)
    for name in ("id.json", "model.json"):
        (inner / name).write_text(json.dumps({**json.loads((inner / name).read_text()), "kind": "Execution"}))
    place.ingest(inner)
    return place


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    with place.session() as session:
        yield session


class Quiet:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


def run(session: Session, command: str, **args: Any) -> dict[str, Any]:
    return session.run(command, args, Quiet())


def listed(session: Session, *uuids: str, **args: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = run(session, "ls", uuids=list(uuids), **args)["records"]
    return records


def test_a_record_has_the_status_of_its_execution(session: Session) -> None:
    assert [each["status"] for each in listed(session)] == ["finished"]
    assert [each["uuid"] for each in listed(session, where="status=finished")] == [UUID]
    assert listed(session, where="status=none") == []


def test_a_nested_record_and_a_directory_are_where_their_unit_is(session: Session) -> None:
    session.pusher.push(unit_of(session))
    paths = [NESTED, f"{session.settings.mountpoint}/{UUID}/notes"]
    nested, notes = run(session, "status", paths=paths)["paths"]
    assert [replica["store"] for replica in nested["replicas"]] == ["lab"]
    assert (notes["kind"], notes["size"]) == ("directory", sum(len(FILES[path]) for path in FILES if b"notes/" in path))
    assert [replica["store"] for replica in notes["replicas"]] == ["lab"]
    assert listed(session, NESTED)[0]["size"] == nested["size"] > len(RUN_FILES[b"output.log"])


def test_after_a_reindex_nothing_is_guessed_from_files_that_are_away(place: Place, tmp_path: Path) -> None:
    with place.session() as session:
        session.pusher.push(unit_of(session))
    shutil.rmtree(place.project)
    other = Place(tmp_path / "other", {"lab": (tmp_path / "host" / "store").as_uri()})
    with other.session() as taken:
        run(taken, "reindex", **{"from": ["lab"]})
        (record,) = listed(taken)
        assert (record["state"], record["status"]) == ("evicted", None)
        assert [each for each in run(taken, "doctor")["checks"] if each["ok"] is False] == []


def test_an_import_leaves_the_link_of_another_project_alone(session: Session, place: Place, tmp_path: Path) -> None:
    unit = unit_of(session)
    session.pusher.push(unit)
    session.evictor.evict(unit)
    link = place.directory()
    assert link.is_symlink()
    other = Place(tmp_path / "other", {"else": (tmp_path / "else").as_uri()})
    with other.session() as taking:
        assert UUID in run(taking, "import", source=(tmp_path / "host" / "store").as_uri())["imported"]
        assert (other.directory() / "metrics.json").read_bytes() == FILES[b"metrics.json"]
    assert link.is_symlink()


def test_passthrough_that_was_switched_off_is_not_wrong(place: Place) -> None:
    with place.session(passthrough="off") as session:
        (found,) = [each for each in run(session, "doctor")["checks"] if each["name"] == "passthrough"]
    assert found["ok"] is True


def test_a_store_that_evicted_records_need_is_missed_at_the_start(tmp_path: Path) -> None:
    """Not at the first read that fails."""
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "disk": f"hooked://{tmp_path}/disk"})
    place.record()
    with place.session() as session:
        session.evictor.evict(unit_of(session))
        assert session.warnings == []
    place.stores = {"disk": f"hooked://{tmp_path}/disk"}
    with place.session() as session:
        assert session.warnings == []  # one of its homes is enough
    place.stores = {"other": f"hooked://{tmp_path}/other"}
    with place.session() as session:
        (said,) = session.warnings
    assert "only in disk" in said
    assert "--store disk=URL" in said


def test_what_a_broker_warns_of_is_told_by_the_mount(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": "memory://warned"})
    session = Session.open(place.settings(), role="daemon")
    try:
        (said,) = session.warnings
    finally:
        session.close()
    assert "gone when the process ends" in said
