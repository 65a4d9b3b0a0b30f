"""Rebuilding an index from stores, without a mount: what people are told of them."""

from pathlib import Path
from typing import Any

from daemon.render import reindex as rendered
from tests.core.making import UUID, Place, unit_of


class Progress:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


def test_a_store_without_records_is_said_to_be_one(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {name: f"file://{tmp_path}/{name}" for name in ("lab", "attic")})
    place.record()
    with place.session() as session:
        session.pusher.push(unit_of(session, UUID), [session.core.home("lab")])
        for dry_run in (True, False):
            done = session.run("reindex", {"stores": True, "dry_run": dry_run}, Progress())
            assert (done["empty"], done["exit"]) == (["attic"], 0)
            assert rendered(done, {})[-1] == "attic: no record is there"
