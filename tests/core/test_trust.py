"""Proofs that expire, whose record it is, what a moved project leaves behind, how a run stands, what safe advises."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from daemon.render import lines
from tests.core.making import NESTED, UUID, Place, hooked, unit_of, write_record
from vfs.core import manifest_key
from vfs.errors import Refused
from vfs.manifest import Manifest, Owner, dump, merge, parse
from vfs.session import Session
from vfs.settings import ProofSettings
from vfs.trust.owners import joined

OTHER = "recordBBBB02"


class Nobody:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        return None


def push(session: Session, uuid: str = UUID) -> None:
    outcome = session.pusher.push(unit_of(session, uuid))
    assert not outcome.failed, outcome.failed


# --- proofs --------------------------------------------------------------------------------------------------------


def read_back(session: Session) -> set[str]:
    """Objects that were read since the last call."""
    store = hooked(session)
    found = {key for operation, key in store.done if operation == "read" and not key.startswith(".runfs")}
    store.done.clear()
    return found


@pytest.mark.parametrize("age", [1000.0, 0.0])
def test_an_eviction_makes_an_old_proof_again(tmp_path: Path, age: float) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})
    place.record()
    with place.session(proof=ProofSettings(max_age=age)) as session:
        push(session)
        session.run("verify", {"deep": True}, Nobody())
        read_back(session)
        session.evictor.evict(unit_of(session))
        assert bool(read_back(session)) is (age == 0.0)
        shown = session.run("receipts", {"uuids": [UUID]}, Nobody())["receipts"]
        receipt = next(each for each in shown if each["what"] == "evict")
        assert receipt["expires_at"] == pytest.approx(time.time() + age, abs=60)
        assert receipt["expired"] is (age == 0.0)
        only = session.run("receipts", {"uuids": [UUID], "expired": True}, Nobody())["receipts"]
        assert [each["what"] for each in only] == (["evict"] if age == 0.0 else [])
    assert ("expired" in "\n".join(lines("receipts", {"receipts": shown}, {}))) is (age == 0.0)


def test_an_old_proof_that_cannot_be_made_again_keeps_the_bytes(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "attic": f"hooked://{tmp_path}/attic"})
    place.record()
    with place.session(proof=ProofSettings(max_age=0.0), min_copies=2) as session:
        push(session)
        store = hooked(session, "attic")
        key = next(key for key in store.names() if key.endswith("weights.npy"))
        store.put(key, b"x" * len(store.raw(key)))
        with pytest.raises(Refused, match="1 of 2 copies are proven"):
            session.evictor.evict(unit_of(session))
        assert not unit_of(session).evicted
        session.evictor.evict(unit_of(session))  # it was pushed again
        assert unit_of(session).evicted


# --- owners --------------------------------------------------------------------------------------------------------


def test_reindex_leaves_what_another_project_of_this_machine_has(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    one, two = Place(tmp_path / "one", {"lab": url}), Place(tmp_path / "two", {"lab": url})
    one.record()
    two.record(OTHER)
    for place, uuid in ((one, UUID), (two, OTHER)):
        with place.session() as session:
            push(session, uuid)
    with one.session() as session:
        session.evictor.evict(unit_of(session))
    with two.session() as session:
        dry = session.run("reindex", {"from": ["lab"], "dry_run": True}, Nobody())
        assert dry["ingested"] == 1
        done = session.run("reindex", {"from": ["lab"]}, Nobody())
        assert done["elsewhere"] == [{"uuid": UUID, "project": str(one.project), "store": "lab"}]
        assert session.core.index.get(UUID) is None
        assert f"1 record belongs to {one.project}" in "\n".join(lines("reindex", done, {}))
    assert one.directory().is_symlink()
    one.index.unlink()  # its own index is lost: what is its own comes back
    with one.session(create_index=True) as session:
        assert session.run("reindex", {"from": ["lab"]}, Nobody())["elsewhere"] == [
            {"uuid": OTHER, "project": str(two.project), "store": "lab"}
        ]
        assert session.core.index.get(UUID) is not None
    os.rename(two.project, tmp_path / "gone")  # nobody has it any more: anybody may
    with one.session() as session:
        assert session.run("reindex", {"from": ["lab"]}, Nobody())["elsewhere"] == []
        assert session.core.index.get(OTHER) is not None


def test_owners_in_a_manifest() -> None:
    one, two = Owner("h1", b"/p", b"/p/storage/x"), Owner("h2", b"/q\xff", b"/q\xff/x")
    manifest = Manifest(UUID, 1, (), owners=(one, two))
    assert parse(dump(manifest), UUID) == manifest
    assert dump(parse(dump(manifest))) == dump(manifest)
    assert joined(two, (one, two)) == (two, one)
    merged = merge(None, Manifest(UUID, 1, (), owners=(one,)), Manifest(UUID, 2, (), owners=(two, one)))
    assert merged.manifest.owners == (one, two)


def test_both_hosts_are_named(tmp_path: Path) -> None:
    stores = {"lab": (tmp_path / "store").as_uri()}
    places = [Place(tmp_path / name, stores) for name in ("one", "two")]
    for place in places:
        place.record()
        with place.session() as session:
            push(session)
    body = (tmp_path / "store" / manifest_key(UUID)).read_bytes()
    assert {owner.directory for owner in parse(body).owners} == {os.fsencode(place.directory()) for place in places}


# --- a project that moved ------------------------------------------------------------------------------------------


def test_unpushed_changes_of_a_moved_project_are_told(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})
    place.record()
    with place.session() as session:
        push(session)
        session.evictor.evict(unit_of(session))
        unit = unit_of(session)
        Path(os.fsdecode(unit.shadow), "metrics.json").write_bytes(b"changed, and not pushed")
        session.core.units.mark_dirty(unit, "test")
    before = place.project
    moved = before.with_name("moved")
    before.rename(moved)
    there = {"index": moved / ".machinable.sqlite"}
    with place.session(**there) as session:
        (said,) = [each for each in session.warnings if "before" in each]
        assert str(before) in said
        safe = session.run("safe", {}, Nobody())
        assert safe["exit"] == 1
        assert any("unpushed changes" in each["reason"] for each in safe["unsafe"])
    moved.rename(before)
    with place.session() as session:
        assert not [each for each in session.warnings if "before" in each]
        push(session)
    before.rename(moved)
    with place.session(**there) as session:
        assert not [each for each in session.warnings if "before" in each], "they are in the store now"


# --- how a run stands, what safe advises ---------------------------------------------------------------------------


def test_a_record_stands_as_its_latest_execution(tmp_path: Path) -> None:
    place = Place(tmp_path / "host")
    root = place.record()
    for name in ("dispatched_at", "started_at", "finished_at"):
        (root / name).unlink(missing_ok=True)
    write_record(root / "executions" / NESTED, NESTED, {}, parent=UUID)
    header = root / "executions" / NESTED / "id.json"
    header.write_text(header.read_text().replace('"Interface"', '"Execution"'))
    model = root / "executions" / NESTED / "model.json"
    model.write_text(model.read_text().replace('"Interface"', '"Execution"'))
    place.ingest(root / "executions" / NESTED)
    with place.session() as session:
        record = session.core.index.get(UUID)
        assert record is not None
        assert session.core.units.status_of(record) != "finished"
        assert session.core.units.run_status_of(record) == "finished"
        found = session.core.index.search(status="finished", status_of=session.core.units.run_status_of)
        assert {each.uuid for each in found} == {UUID, NESTED}


def test_safe_with_an_open_transaction_advises_no_push(tmp_path: Path) -> None:
    place = Place(tmp_path / "host")
    root = place.record()
    with place.session() as session:
        push(session)
        session.transactions.begin(unit_of(session))
        (root / "metrics.json").write_bytes(b"changed")
        told = "\n".join(lines("safe", session.run("safe", {}, Nobody()), {}))
        assert "runfs transaction commit" in told
        assert "runfs push" not in told
        session.transactions.rollback(unit_of(session))
