"""State that was left behind when a project moved: it is found by the index's path, so a new path means new state.

Used when a session opens. Looks at the other states of this user, read-only; touches no store and changes nothing. What
was not pushed of evicted records is only there, so it must be said where.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import apsw

from vfs.journal import Journal
from vfs.settings import Settings

log = logging.getLogger(__name__)
_INDEX, _IDENTITY = "index path", "index identity"


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """The state of this very index under the path it had before: where, and how many evicted records have changes in
    it that no store has."""

    state: Path
    index: str
    unpushed: int


def remember(journal: Journal, index: Path) -> None:
    """Note which file the state is about, for the day it is somewhere else."""
    for name, value in ((_INDEX, os.path.realpath(index)), (_IDENTITY, _identity(index))):
        if journal.note(name) != value:
            journal.set_note(name, value)


def left_behind(settings: Settings) -> list[LeftBehind]:
    """States of this index from before it moved: their index is gone, and was the same file."""
    found = []
    for place in sorted(settings.state_dir.glob("*/journal.sqlite")):
        if place.parent != settings.state:
            try:
                found += _look(place, _identity(settings.index))
            except (apsw.Error, OSError) as error:
                log.debug("%s: %s", place, error)
    return found


def warnings(settings: Settings) -> list[str]:
    """What was left behind and matters, as sentences."""
    return [
        f"this project was at {os.path.dirname(each.index)} before: {each.unpushed} evicted "
        f"record{'s have' if each.unpushed > 1 else ' has'} changes there that no store has (in {each.state}). Move it "
        "back to that place, run `runfs push` there, then move it again and run `runfs reindex`"
        for each in left_behind(settings)
        if each.unpushed
    ]


def _look(place: Path, identity: str) -> list[LeftBehind]:
    db = apsw.Connection(str(place), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = db.execute("SELECT name, value FROM notes WHERE name IN (?, ?)", (_INDEX, _IDENTITY)).fetchall()
        notes = {str(name): str(value) for name, value in rows}
        before = notes.get(_INDEX)
        if before is None or notes.get(_IDENTITY) != identity or os.path.exists(before):
            return []
        ((count,),) = db.execute("SELECT count(*) FROM dirty JOIN units USING (uuid)").fetchall()
        return [LeftBehind(place.parent, before, int(str(count)))]
    finally:
        db.close()


def _identity(index: Path) -> str:
    """The index's file, whatever its path: a move within a file system keeps it."""
    status = os.stat(index)
    return f"{status.st_dev}:{status.st_ino}"
