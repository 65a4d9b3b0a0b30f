"""runfs's own durable state: SQLite through apsw, WAL, synchronous=FULL.

Used by every part of `vfs` that must remember something over a crash. Each method is one short transaction and
blocks for one disk sync when it writes. Thread-safe: one lock around one connection. This module owns the schema.

What is *not* here: which chunks of an evicted file are local. That is an extended attribute of the file itself
(`vfs/cache.py`), so that it follows renames and links and cannot disagree with them.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from vfs import faults
from vfs.errors import Full, JournalError, JournalLocked
from vfs.manifest import Content, File
from vfs.trust.journal import TABLES as TRUST_TABLES
from vfs.trust.journal import TrustRows
from vfs.versions.journal import TABLES as VERSION_TABLES

# Numbered migrations: the schema at version n is the first n scripts. Never edit one that was released.
_MIGRATIONS = (
    """
    CREATE TABLE units (                     -- one row for each root record that is not simply resident
        uuid TEXT PRIMARY KEY,               -- of the root record
        state TEXT NOT NULL,                 -- 'evicting' | 'evicted' | 'restoring'; no row: resident
        directory BLOB NOT NULL,             -- where machinable believes the record is (absolute)
        aside BLOB NOT NULL,                 -- the second name of the exchange, beside `directory`; b'' when done
        rows TEXT NOT NULL,                  -- JSON: the index rows of the unit, put back when machinable rebuilds
        bytes INTEGER NOT NULL,              -- size of the unit when it was evicted
        at_ns INTEGER NOT NULL               -- when the state was entered
    );
    CREATE TABLE files (                     -- what was last digested: the local side of a manifest
        uuid TEXT NOT NULL, path BLOB NOT NULL,
        kind TEXT NOT NULL,                  -- file | directory | symlink | other
        mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        inode INTEGER NOT NULL,              -- with size, mtime and ctime: unchanged means the digest still holds
        ctime_ns INTEGER NOT NULL,
        digest BLOB NOT NULL,                -- blake3 of the content; b'' for what has none
        target BLOB NOT NULL,                -- of a symlink
        same BLOB NOT NULL,                  -- path of the first hard link to the same file, or b''
        attributes TEXT NOT NULL,            -- JSON: extended attribute -> hex; '' for none
        PRIMARY KEY (uuid, path)
    ) WITHOUT ROWID;
    CREATE TABLE contents (                  -- what a digest consists of
        digest BLOB PRIMARY KEY, size INTEGER NOT NULL,
        chunks BLOB NOT NULL                 -- blake3 of each MiB, concatenated
    ) WITHOUT ROWID;
    CREATE TABLE replicas (                  -- which object of which store holds a content
        digest BLOB NOT NULL, store TEXT NOT NULL, uuid TEXT NOT NULL,
        key TEXT NOT NULL,
        proven_ns INTEGER NOT NULL,          -- when it was last proven to hold exactly this; 0: uploaded, not proven
        how TEXT NOT NULL,                   -- 'read back' | 'md5 of the store' | ''
        PRIMARY KEY (digest, store, uuid)
    ) WITHOUT ROWID;
    CREATE TABLE homes (                     -- the manifest each store holds of each record
        uuid TEXT NOT NULL, store TEXT NOT NULL,
        generation INTEGER NOT NULL,
        version TEXT NOT NULL,               -- the store's version of the manifest object, for If-Match
        manifest BLOB NOT NULL,              -- as published: the base of the next merge
        rows TEXT NOT NULL,                  -- blake3 of the index rows in it: what only the index knows counts too
        pushed_ns INTEGER NOT NULL,
        proven_ns INTEGER NOT NULL,          -- when the published manifest was last read back; 0: it is another one now
        PRIMARY KEY (uuid, store)
    ) WITHOUT ROWID;
    CREATE TABLE dirty (                     -- what must still be pushed; written before a writer's open is answered
        uuid TEXT PRIMARY KEY,
        why TEXT NOT NULL, since_ns INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, next_ns INTEGER NOT NULL DEFAULT 0,
        error TEXT NOT NULL DEFAULT ''
    );
    CREATE TABLE pins (uuid TEXT PRIMARY KEY, at_ns INTEGER NOT NULL);
    CREATE TABLE used (uuid TEXT PRIMARY KEY, at_ns INTEGER NOT NULL);   -- last use through the mount
    CREATE TABLE incoming (name TEXT PRIMARY KEY, directory BLOB NOT NULL, at_ns INTEGER NOT NULL);
    CREATE TABLE receipts (
        id INTEGER PRIMARY KEY,
        at_ns INTEGER NOT NULL,
        what TEXT NOT NULL,                  -- 'push' | 'evict' | 'drop' | 'restore'
        uuid TEXT NOT NULL,
        store TEXT NOT NULL,                 -- '' where several are named in the proof
        files INTEGER NOT NULL, bytes INTEGER NOT NULL,
        digest TEXT NOT NULL,                -- blake3 of the manifest it is about
        proof TEXT NOT NULL                  -- JSON: for each store, how and when its copy was proven
    );
    CREATE INDEX receipts_uuid ON receipts(uuid);
    CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);     -- small facts: mountpoint, stores used
    """,
    VERSION_TABLES,
    TRUST_TABLES,
)


@dataclass(frozen=True, slots=True)
class UnitRow:
    uuid: str
    state: str
    directory: bytes
    aside: bytes
    rows: str
    bytes: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Known:
    """A file as it was last digested, with what tells whether it has changed since."""

    file: File
    inode: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Replica:
    digest: bytes
    store: str
    uuid: str
    key: str
    proven_ns: int
    how: str


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file of a unit and one object that holds its content."""

    path: bytes
    size: int
    digest: bytes
    store: str
    key: str


@dataclass(frozen=True, slots=True)
class Home:
    uuid: str
    store: str
    generation: int
    version: str
    manifest: bytes
    rows: str
    pushed_ns: int
    proven_ns: int


@dataclass(frozen=True, slots=True)
class Dirty:
    uuid: str
    why: str
    since_ns: int
    attempts: int
    next_ns: int
    error: str


class Journal(TrustRows):
    """The open state of one index. `exclusive` takes the state directory for this process.

    Raises JournalLocked naming the holder, JournalError when the file cannot be used.
    """

    def __init__(self, directory: Path, *, exclusive: bool = True) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._held: int | None = None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if exclusive:
            self._take()
        try:
            self._db = apsw.Connection(str(directory / "journal.sqlite"))
            os.chmod(directory / "journal.sqlite", 0o600)
            self._db.set_busy_timeout(5000)
            self._prepare()
        except apsw.Error as error:
            self.close()
            raise JournalError(f"the journal {directory / 'journal.sqlite'} cannot be used: {error}") from error
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(fd)
            raise JournalLocked(
                f"this index is already served by {holder}; unmount that first, or use its mount with --mount"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()}".encode(), 0)
        self._held = fd

    def holder(self, text: str) -> None:
        """Say in the lock file who we are, for the process that is refused."""
        if self._held is not None:
            os.ftruncate(self._held, 0)
            os.pwrite(self._held, text.encode(), 0)

    def _prepare(self) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=OFF", "wal_autocheckpoint=4000"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        version = int(self._db.pragma("user_version"))
        if version > len(_MIGRATIONS):
            raise JournalError(
                f"{self.directory} was written by a newer runfs (schema {version}, this one knows {len(_MIGRATIONS)}); "
                "upgrade runfs"
            )
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            with self._db:
                self._db.execute(script)
                faults.point("journal.changed")
                self._db.execute(f"PRAGMA user_version={number}")
                faults.point("journal.numbered")
            faults.point("journal.migrated")

    def close(self) -> None:
        with self._lock:
            if hasattr(self, "_db"):
                self._db.close()
            if self._held is not None:
                os.close(self._held)
                self._held = None

    @contextmanager
    def transaction(self) -> Iterator[apsw.Connection]:
        """One transaction: all of it is on the disk when the block ends, or none."""
        with self._lock:
            try:
                with self._db:
                    yield self._db
            except apsw.FullError as error:
                raise Full(f"no space for the journal in {self.directory}; free some") from error
            except apsw.Error as error:
                raise JournalError(f"the journal in {self.directory} failed: {error}") from error

    def _all(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, bindings).fetchall()
            except apsw.Error as error:
                raise JournalError(f"the journal in {self.directory} failed: {error}") from error

    def _run(self, sql: str, bindings: Sequence[Any] = ()) -> None:
        with self.transaction() as db:
            db.execute(sql, bindings)

    # --- units -------------------------------------------------------------------------------------------------

    def units(self) -> list[UnitRow]:
        """Every unit that is not simply resident, without its kept rows (`unit` has them)."""
        columns = "uuid, state, directory, aside, '' AS rows, bytes, at_ns"
        return [UnitRow(*row) for row in self._all(f"SELECT {columns} FROM units")]

    def unit(self, uuid: str) -> UnitRow | None:
        rows = self._all("SELECT * FROM units WHERE uuid=?", (uuid,))
        return UnitRow(*rows[0]) if rows else None

    def set_unit(self, row: UnitRow) -> None:
        self._run(
            "INSERT OR REPLACE INTO units VALUES (?,?,?,?,?,?,?)",
            (row.uuid, row.state, row.directory, row.aside, row.rows, row.bytes, row.at_ns),
        )

    def keep_rows(self, uuid: str, rows: str) -> None:
        self._run("UPDATE units SET rows=? WHERE uuid=?", (rows, uuid))

    def drop_unit(self, uuid: str) -> None:
        self._run("DELETE FROM units WHERE uuid=?", (uuid,))

    # --- what was digested -------------------------------------------------------------------------------------

    def known(self, uuid: str) -> dict[bytes, Known]:
        """The files of a unit as last digested, by path, in path order."""
        rows = self._all(
            "SELECT path, kind, mode, mtime_ns, size, digest, target, uid, gid, same, attributes, inode, ctime_ns "
            "FROM files WHERE uuid=? ORDER BY path",
            (uuid,),
        )
        return {
            path: Known(
                File(path, kind, mode, mtime, size, digest, "", target, uid, gid, same, _unpacked(attributes)),
                inode,
                ctime,
            )
            for path, kind, mode, mtime, size, digest, target, uid, gid, same, attributes, inode, ctime in rows
        }

    def replace_known(self, uuid: str, known: Iterable[Known], contents: Iterable[Content]) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM files WHERE uuid=?", (uuid,))
            db.executemany(
                "INSERT INTO files VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    (
                        uuid, k.file.path, k.file.kind, k.file.mode, k.file.uid, k.file.gid, k.file.size,
                        k.file.mtime_ns, k.inode, k.ctime_ns, k.file.digest, k.file.target, k.file.same,
                        _packed(k.file.attributes),
                    )
                    for k in known
                ),
            )  # fmt: skip
            self._add_contents(db, contents)

    def place_known(self, uuid: str, places: Mapping[bytes, tuple[int, int]]) -> None:
        """The files of a unit are other inodes now, by our own doing: (inode, ctime in ns) by path."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE files SET inode=?, ctime_ns=? WHERE uuid=? AND path=?",
                ((inode, ctime_ns, uuid, path) for path, (inode, ctime_ns) in places.items()),
            )

    @staticmethod
    def _add_contents(db: apsw.Connection, contents: Iterable[Content]) -> None:
        db.executemany(
            "INSERT OR IGNORE INTO contents VALUES (?,?,?)", ((c.digest, c.size, c.chunks) for c in contents)
        )

    def add_contents(self, contents: Iterable[Content]) -> None:
        with self.transaction() as db:
            self._add_contents(db, contents)

    def content(self, digest: bytes) -> Content | None:
        rows = self._all("SELECT digest, size, chunks FROM contents WHERE digest=?", (digest,))
        return Content(*rows[0]) if rows else None

    def contents_of(self, uuid: str) -> dict[bytes, Content]:
        rows = self._all(
            "SELECT DISTINCT c.digest, c.size, c.chunks FROM files f JOIN contents c ON c.digest=f.digest "
            "WHERE f.uuid=?",
            (uuid,),
        )
        return {row[0]: Content(*row) for row in rows}

    # --- where the bytes are -----------------------------------------------------------------------------------

    def replicas(self, digest: bytes) -> list[Replica]:
        return [Replica(*row) for row in self._all("SELECT * FROM replicas WHERE digest=?", (digest,))]

    def small_files(self, uuid: str, most: int) -> list[SmallFile]:
        """The files of a unit that have bytes, `most` at most, once for each replica, in path order."""
        rows = self._all(
            "SELECT f.path, f.size, f.digest, r.store, r.key FROM files f JOIN replicas r ON r.digest=f.digest "
            "WHERE f.uuid=? AND f.kind='file' AND f.size BETWEEN 1 AND ? ORDER BY f.path, r.uuid<>f.uuid",
            (uuid, most),
        )
        return [SmallFile(*row) for row in rows]

    def replicas_of(self, uuid: str, store: str) -> dict[bytes, Replica]:
        rows = self._all("SELECT * FROM replicas WHERE store=? AND uuid=?", (store, uuid))
        return {row[0]: Replica(*row) for row in rows}

    def set_replicas(self, replicas: Iterable[Replica]) -> None:
        with self.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO replicas VALUES (?,?,?,?,?,?)",
                ((r.digest, r.store, r.uuid, r.key, r.proven_ns, r.how) for r in replicas),
            )

    def forget_replica(self, digest: bytes, store: str, uuid: str) -> None:
        self._run("DELETE FROM replicas WHERE digest=? AND store=? AND uuid=?", (digest, store, uuid))

    def forget_replicas(self, uuid: str, store: str) -> None:
        self._run("DELETE FROM replicas WHERE uuid=? AND store=?", (uuid, store))

    def doubt_replicas(self, uuid: str, store: str) -> None:
        """A store may have lost what it held of a record: nothing in it is proven any more."""
        self._run("UPDATE replicas SET proven_ns=0, how='' WHERE uuid=? AND store=?", (uuid, store))

    def home(self, uuid: str, store: str) -> Home | None:
        rows = self._all("SELECT * FROM homes WHERE uuid=? AND store=?", (uuid, store))
        return Home(*rows[0]) if rows else None

    def homes(self, uuid: str) -> list[Home]:
        return [Home(*row) for row in self._all("SELECT * FROM homes WHERE uuid=?", (uuid,))]

    def generations(self, uuid: str, store: str) -> tuple[int, int] | None:
        """The version that a store holds of a record, and when it was pushed (ns): `home` without its manifest."""
        rows = self._all("SELECT generation, pushed_ns FROM homes WHERE uuid=? AND store=?", (uuid, store))
        return (int(rows[0][0]), int(rows[0][1])) if rows else None

    def set_home(self, home: Home) -> None:
        self._run(
            "INSERT OR REPLACE INTO homes VALUES (?,?,?,?,?,?,?,?)",
            tuple(getattr(home, name) for name in Home.__slots__),
        )

    def doubt_home(self, uuid: str, store: str) -> None:
        """A store's manifest is not the one that was published from here: the next push looks, and merges."""
        self._run("UPDATE homes SET version='', proven_ns=0 WHERE uuid=? AND store=?", (uuid, store))

    def home_marks(self) -> list[tuple[str, str, str]]:
        """(record, store, digest of its index rows) of everything that was pushed."""
        return [(row[0], row[1], row[2]) for row in self._all("SELECT uuid, store, rows FROM homes")]

    def without_home(self, stores: Iterable[str]) -> list[tuple[str, str]]:
        """(record, a store that has it) of units whose files are not in their directory, and that none of these stores
        holds."""
        names = list(stores)
        marks = ", ".join("?" * len(names))
        rows = self._all(
            "SELECT u.uuid, min(h.store) FROM units u JOIN homes h ON h.uuid=u.uuid GROUP BY u.uuid "
            f"HAVING sum(h.store IN ({marks}))=0",
            names,
        )
        return [(row[0], row[1]) for row in rows]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Files and bytes of each unit, as last digested."""
        rows = self._all("SELECT uuid, count(*), sum(size) FROM files WHERE kind='file' AND same=x'' GROUP BY uuid")
        return {uuid: (files, size) for uuid, files, size in rows}

    def unit_uuids(self) -> list[str]:
        """Every unit that is not simply resident."""
        return [row[0] for row in self._all("SELECT uuid FROM units")]

    def units_between(self, first: str, last: str) -> list[UnitRow]:
        """Units that are not simply resident, from one uuid to another one; without their index rows."""
        found = self._all(
            "SELECT uuid, state, directory, aside, '', bytes, at_ns FROM units WHERE uuid BETWEEN ? AND ?",
            (first, last),
        )
        return [UnitRow(*row) for row in found]

    def evicted_size(self) -> tuple[int, int]:
        """Evicted units and their bytes."""
        rows = self._all("SELECT count(*), coalesce(sum(bytes), 0) FROM units WHERE state != 'evicting'")
        return int(rows[0][0]), int(rows[0][1])

    def forget_home(self, uuid: str, store: str) -> None:
        self._run("DELETE FROM homes WHERE uuid=? AND store=?", (uuid, store))

    def homed(self, store: str) -> set[str]:
        """Records of which `store` holds a manifest."""
        return {row[0] for row in self._all("SELECT uuid FROM homes WHERE store=?", (store,))}

    # --- what must be pushed -----------------------------------------------------------------------------------

    def dirty(self) -> list[Dirty]:
        return [Dirty(*row) for row in self._all("SELECT * FROM dirty ORDER BY since_ns")]

    def is_dirty(self, uuid: str) -> bool:
        return bool(self._all("SELECT 1 FROM dirty WHERE uuid=?", (uuid,)))

    def mark_dirty(self, uuid: str, why: str) -> None:
        self._run("INSERT OR IGNORE INTO dirty(uuid, why, since_ns) VALUES (?,?,?)", (uuid, why, time.time_ns()))

    def mark_all_dirty(self, marks: Iterable[tuple[str, str]]) -> None:
        with self.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO dirty(uuid, why, since_ns) VALUES (?,?,?)",
                ((uuid, why, time.time_ns()) for uuid, why in marks),
            )

    def postpone(self, uuid: str, error: str, delay_s: float) -> None:
        self._run(
            "UPDATE dirty SET attempts=attempts+1, next_ns=?, error=? WHERE uuid=?",
            (time.time_ns() + int(delay_s * 1e9), error, uuid),
        )

    def clean(self, uuid: str) -> None:
        self._run("DELETE FROM dirty WHERE uuid=?", (uuid,))

    # --- pins, use, incoming, notes ----------------------------------------------------------------------------

    def pins(self) -> set[str]:
        return {row[0] for row in self._all("SELECT uuid FROM pins")}

    def pin(self, uuid: str, on: bool) -> None:
        if on:
            self._run("INSERT OR IGNORE INTO pins VALUES (?,?)", (uuid, time.time_ns()))
        else:
            self._run("DELETE FROM pins WHERE uuid=?", (uuid,))

    def used(self) -> dict[str, int]:
        return {row[0]: row[1] for row in self._all("SELECT uuid, at_ns FROM used")}

    def set_used(self, used: Mapping[str, int]) -> None:
        with self.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO used VALUES (?,?)", used.items())

    def incoming(self) -> dict[str, bytes]:
        return {row[0]: row[1] for row in self._all("SELECT name, directory FROM incoming")}

    def add_incoming(self, name: str, directory: bytes) -> None:
        self._run("INSERT OR REPLACE INTO incoming VALUES (?,?,?)", (name, directory, time.time_ns()))

    def drop_incoming(self, name: str) -> None:
        self._run("DELETE FROM incoming WHERE name=?", (name,))

    def note(self, name: str) -> str | None:
        rows = self._all("SELECT value FROM notes WHERE name=?", (name,))
        return str(rows[0][0]) if rows else None

    def set_note(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO notes VALUES (?,?)", (name, value))

    def drop_note(self, name: str) -> None:
        self._run("DELETE FROM notes WHERE name=?", (name,))

    # --- receipts ----------------------------------------------------------------------------------------------

    def add_receipt(
        self, what: str, uuid: str, store: str, files: int, size: int, digest: str, proof: Mapping[str, Any]
    ) -> int:
        with self.transaction() as db:
            db.execute(
                "INSERT INTO receipts(at_ns, what, uuid, store, files, bytes, digest, proof) VALUES (?,?,?,?,?,?,?,?)",
                (time.time_ns(), what, uuid, store, files, size, digest, json.dumps(proof, sort_keys=True)),
            )
            return db.last_insert_rowid()

    def receipts(self, uuid: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
        where, bindings = ("WHERE uuid=?", (uuid, limit)) if uuid else ("", (limit,))
        names = ("id", "at_ns", "what", "uuid", "store", "files", "bytes", "digest", "proof")
        rows = self._all(f"SELECT {', '.join(names)} FROM receipts {where} ORDER BY id DESC LIMIT ?", bindings)
        return [dict(zip(names, row, strict=True)) | {"proof": json.loads(row[-1])} for row in rows]


def _packed(attributes: tuple[tuple[str, bytes], ...]) -> str:
    return json.dumps({name: value.hex() for name, value in attributes}) if attributes else ""


def _unpacked(text: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, bytes.fromhex(value)) for name, value in json.loads(text).items()) if text else ()
