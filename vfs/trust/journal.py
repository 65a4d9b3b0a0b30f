"""What the journal remembers of conflicts, of damage that nothing could mend, and of scrubs under way.

A part of `vfs/journal.py`, which owns the schema and the connection. Each method is one short transaction.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vfs.versions.journal import VersionRows

TABLES = """
    CREATE TABLE conflicts (                 -- paths that two hosts changed, each in its own way
        uuid TEXT NOT NULL,
        path BLOB NOT NULL,                  -- the name both meant
        ours BLOB NOT NULL,                  -- where this host's version is; x'': it was removed here
        theirs BLOB NOT NULL,                -- where the other's is; x'': it was removed there
        store TEXT NOT NULL,                 -- where they met
        at_ns INTEGER NOT NULL,              -- when this host learned of it
        settled INTEGER NOT NULL DEFAULT 0,  -- 1: both are kept by somebody's wish
        PRIMARY KEY (uuid, path, ours, theirs)
    ) WITHOUT ROWID;
    CREATE TABLE quarantine (                -- files of which no place holds the right bytes any more
        uuid TEXT NOT NULL, path BLOB NOT NULL,
        digest BLOB NOT NULL,                -- of the content that is wanted
        kept BLOB NOT NULL,                  -- path in the record where the damaged bytes are; x'': only in stores
        reason TEXT NOT NULL,                -- what is wrong with each place that should have it
        at_ns INTEGER NOT NULL,
        PRIMARY KEY (uuid, path)
    ) WITHOUT ROWID;
    CREATE TABLE scrubs (                    -- how far a scrub has come, for the next one to go on
        what TEXT PRIMARY KEY,               -- which records it is about: '*' for all, else a digest of their names
        began_ns INTEGER NOT NULL,
        seen_ns INTEGER NOT NULL,            -- when it came so far
        uuid TEXT NOT NULL,                  -- records before this one, in order, have been looked at,
        path BLOB NOT NULL,                  -- and of it the contents before this path
        checked INTEGER NOT NULL, bytes INTEGER NOT NULL
    );
    CREATE TABLE scrubbed (                  -- what a scrub that is under way has found
        what TEXT NOT NULL, uuid TEXT NOT NULL, path BLOB NOT NULL,
        store TEXT NOT NULL,                 -- '' for this disk
        reason TEXT NOT NULL,
        outcome TEXT NOT NULL,               -- '' | 'repaired' | 'quarantined'
        PRIMARY KEY (what, uuid, path, store)
    ) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Clash:
    """A path that two hosts changed. `ours`, `theirs`: under which names the versions are; b"": removed."""

    uuid: str
    path: bytes
    ours: bytes
    theirs: bytes
    store: str = ""
    at_ns: int = 0
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file of which no place holds the right bytes. `kept`: a name in the record that has the damaged ones."""

    uuid: str
    path: bytes
    digest: bytes
    kept: bytes
    reason: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Scrub:
    """How far a scrub has come: everything before `path` of record `uuid`. Times in ns, sizes in bytes."""

    what: str
    began_ns: int
    seen_ns: int = 0
    uuid: str = ""
    path: bytes = b""
    checked: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """What a scrub found wrong in one place. `store`: "" for this disk; `outcome`: "" while it is wrong."""

    uuid: str
    path: bytes
    store: str
    reason: str
    outcome: str = ""


class TrustRows(VersionRows):
    """The methods; `Journal` gives the connection."""

    # --- conflicts ---------------------------------------------------------------------------------------------

    def add_clashes(self, clashes: Iterable[Clash]) -> None:
        """Remember conflicts; those that are known already stay as they are."""
        with self.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO conflicts VALUES (?,?,?,?,?,?,?)",
                ((c.uuid, c.path, c.ours, c.theirs, c.store, c.at_ns or time.time_ns(), c.settled) for c in clashes),
            )

    def clashes(self, uuid: str | None = None) -> list[Clash]:
        """Every conflict that was noted, settled ones too, oldest first."""
        rows = self._all("SELECT * FROM conflicts WHERE ? IS NULL OR uuid=? ORDER BY at_ns, path", (uuid, uuid))
        return [replace(Clash(*row), settled=bool(row[-1])) for row in rows]

    def settle(self, clash: Clash, *, both: bool) -> None:
        """A conflict is over; `both`: both versions stay under their names, which is not to be told again."""
        with self.transaction() as db:
            db.execute(
                "DELETE FROM conflicts WHERE uuid=? AND path=? AND ours=? AND theirs=?",
                (clash.uuid, clash.path, clash.ours, clash.theirs),
            )
            if both:
                db.execute(
                    "INSERT INTO conflicts VALUES (?,?,?,?,?,?,1)",
                    (clash.uuid, clash.path, clash.ours, clash.theirs, clash.store, clash.at_ns),
                )

    def second_names(self, uuid: str | None = None) -> list[tuple[str, bytes]]:
        """(record, path) of every file, as last digested, whose name says that it is another's version."""
        rows = self._all(
            "SELECT uuid, path FROM files WHERE (? IS NULL OR uuid=?) AND instr(path, x'2e636f6e666c6963742d') > 0",
            (uuid, uuid),
        )
        return [(row[0], row[1]) for row in rows]

    def digested(self, uuid: str, path: bytes) -> tuple[str, int, int] | None:
        """Kind, size and mtime (ns) of one path of a unit as last digested."""
        rows = self._all("SELECT kind, size, mtime_ns FROM files WHERE uuid=? AND path=?", (uuid, path))
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    # --- quarantine --------------------------------------------------------------------------------------------

    def quarantine(self, item: Quarantined) -> None:
        self._run(
            "INSERT OR REPLACE INTO quarantine VALUES (?,?,?,?,?,?)",
            (item.uuid, item.path, item.digest, item.kept, item.reason, item.at_ns),
        )

    def quarantined(self, uuid: str | None = None) -> list[Quarantined]:
        """What is in quarantine, oldest first."""
        rows = self._all("SELECT * FROM quarantine WHERE ? IS NULL OR uuid=? ORDER BY at_ns, path", (uuid, uuid))
        return [Quarantined(*row) for row in rows]

    def release(self, uuid: str, path: bytes) -> None:
        self._run("DELETE FROM quarantine WHERE uuid=? AND path=?", (uuid, path))

    # --- scrubs ------------------------------------------------------------------------------------------------

    def scrub(self, what: str) -> Scrub | None:
        rows = self._all("SELECT * FROM scrubs WHERE what=?", (what,))
        return Scrub(*rows[0]) if rows else None

    def set_scrub(self, scrub: Scrub) -> None:
        self._run(
            "INSERT OR REPLACE INTO scrubs VALUES (?,?,?,?,?,?,?)",
            (scrub.what, scrub.began_ns, scrub.seen_ns, scrub.uuid, scrub.path, scrub.checked, scrub.bytes),
        )

    def end_scrub(self, what: str) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM scrubs WHERE what=?", (what,))
            db.execute("DELETE FROM scrubbed WHERE what=?", (what,))

    def add_fault(self, what: str, fault: Fault) -> None:
        self._run(
            "INSERT OR REPLACE INTO scrubbed VALUES (?,?,?,?,?,?)",
            (what, fault.uuid, fault.path, fault.store, fault.reason, fault.outcome),
        )

    def faults(self, what: str) -> list[Fault]:
        rows = self._all(
            "SELECT uuid, path, store, reason, outcome FROM scrubbed WHERE what=? ORDER BY uuid, path, store", (what,)
        )
        return [Fault(*row) for row in rows]
