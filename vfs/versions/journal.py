"""What the journal remembers of earlier versions, of objects nobody needs any more, and of transactions.

A part of `vfs/journal.py`, which owns the schema and the connection. Each method is one short transaction.
"""

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import apsw

from vfs.manifest import Manifest, dump, parse

# Compressed bytes of manifests kept here of one record in one store. Digests hardly compress: of a record with 5,000
# files about 60 versions; older ones are read from the store again.
_MANIFESTS_MOST = 16 << 20

TABLES = """
    CREATE TABLE versions (                  -- earlier versions that a store keeps, as far as they are known here
        uuid TEXT NOT NULL, store TEXT NOT NULL,
        number INTEGER NOT NULL,             -- the manifest's generation
        at_ns INTEGER NOT NULL,              -- when it was published, by the publisher's clock; 0: not known
        files INTEGER NOT NULL, bytes INTEGER NOT NULL,
        notes TEXT NOT NULL,
        manifest BLOB NOT NULL,              -- as published, zlib; x'': no longer kept here, the store has it
        PRIMARY KEY (uuid, store, number)
    );
    CREATE TABLE superseded (                -- objects of ours that the manifest which replaced theirs does not use
        uuid TEXT NOT NULL, store TEXT NOT NULL, key TEXT NOT NULL,
        digest BLOB NOT NULL,                -- what it holds
        at_ns INTEGER NOT NULL,              -- since when
        PRIMARY KEY (uuid, store, key)
    ) WITHOUT ROWID;
    CREATE TABLE transactions (              -- one row for each record in a transaction
        uuid TEXT PRIMARY KEY,
        state TEXT NOT NULL,                 -- 'open': pushes wait | 'committing': they do not, the next one publishes
                                             -- the notes | 'rolling back': files go back to `manifest`, then it is over
        notes TEXT NOT NULL,
        began_ns INTEGER NOT NULL,
        numbers TEXT NOT NULL,               -- JSON: store -> the version it held at the begin
        manifest BLOB NOT NULL               -- the record at the begin, zlib: every byte of it is in a home
    );
"""


@dataclass(frozen=True, slots=True)
class VersionRow:
    """An earlier version as the journal knows it. `here`: its manifest is in the journal."""

    uuid: str
    store: str
    number: int
    at_ns: int
    files: int
    bytes: int
    notes: str
    here: bool


@dataclass(frozen=True, slots=True)
class Transaction:
    """A record's transaction. `state`: open, committing or rolling back; `numbers`: each store's version when it
    began."""

    uuid: str
    state: str
    notes: str
    began_ns: int
    numbers: Mapping[str, int]


class VersionRows(ABC):
    """The methods; `Journal` gives the connection."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[apsw.Connection]: ...

    @abstractmethod
    def _all(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...

    @abstractmethod
    def _run(self, sql: str, bindings: Sequence[Any] = ()) -> None: ...

    # --- versions ----------------------------------------------------------------------------------------------

    def add_version(self, store: str, manifest: Manifest) -> None:
        """Remember an earlier version. Of long histories the oldest manifests are let go, their rows stay."""
        files = sum(file.kind == "file" for file in manifest.files)
        packed = zlib.compress(dump(manifest), 1)
        row = (manifest.uuid, store, manifest.generation, manifest.published_ns, files, manifest.size, manifest.notes)
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO versions VALUES (?,?,?,?,?,?,?,?)", (*row, packed))
            sizes = db.execute(
                "SELECT number, length(manifest) FROM versions WHERE uuid=? AND store=? AND length(manifest) > 0 "
                "ORDER BY number DESC",
                (manifest.uuid, store),
            ).fetchall()
            for number in _beyond(sizes):
                db.execute(
                    "UPDATE versions SET manifest=x'' WHERE uuid=? AND store=? AND number=?",
                    (manifest.uuid, store, number),
                )

    def versions(self, uuid: str, store: str | None = None) -> list[VersionRow]:
        """Earlier versions of a record, oldest first."""
        rows = self._all(
            "SELECT uuid, store, number, at_ns, files, bytes, notes, length(manifest) > 0 FROM versions "
            "WHERE uuid=? AND (? IS NULL OR store=?) ORDER BY number, store",
            (uuid, store, store),
        )
        return [
            VersionRow(u, s, n, at, files, size, notes, bool(here)) for u, s, n, at, files, size, notes, here in rows
        ]

    def version(self, uuid: str, store: str, number: int) -> Manifest | None:
        """The manifest of an earlier version, if it is kept here. Raises ManifestError."""
        rows = self._all(
            "SELECT manifest FROM versions WHERE uuid=? AND store=? AND number=? AND length(manifest) > 0",
            (uuid, store, number),
        )
        return parse(zlib.decompress(rows[0][0]), uuid) if rows else None

    def versioned(self) -> list[str]:
        """Records with an earlier version that can be looked at, or with a published one."""
        sql = "SELECT uuid FROM versions WHERE length(manifest) > 0 UNION SELECT uuid FROM homes ORDER BY uuid"
        return [row[0] for row in self._all(sql)]

    def forget_versions(self, uuid: str, store: str, numbers: Iterable[int]) -> None:
        with self.transaction() as db:
            db.executemany(
                "DELETE FROM versions WHERE uuid=? AND store=? AND number=?",
                ((uuid, store, number) for number in numbers),
            )

    # --- objects nobody needs ----------------------------------------------------------------------------------

    def add_superseded(self, uuid: str, store: str, objects: Mapping[str, bytes], at_ns: int) -> None:
        """`objects`: key -> digest of what it holds."""
        with self.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO superseded VALUES (?,?,?,?,?)",
                ((uuid, store, key, digest, at_ns) for key, digest in objects.items()),
            )

    def superseded(self, uuid: str, store: str) -> dict[str, tuple[bytes, int]]:
        """Objects that a later manifest does not use: key -> what it holds, since when (ns)."""
        rows = self._all("SELECT key, digest, at_ns FROM superseded WHERE uuid=? AND store=?", (uuid, store))
        return {key: (digest, at_ns) for key, digest, at_ns in rows}

    def forget_object(self, uuid: str, store: str, key: str, digest: bytes) -> None:
        """An object is about to be removed: no proof counts on it any more, and until then it is one to remove."""
        with self.transaction() as db:
            db.execute("DELETE FROM replicas WHERE uuid=? AND store=? AND key=?", (uuid, store, key))
            db.execute("INSERT OR IGNORE INTO superseded VALUES (?,?,?,?,0)", (uuid, store, key, digest))

    def not_superseded(self, uuid: str, store: str, keys: Iterable[str]) -> None:
        """These objects are gone, or a manifest uses them again."""
        with self.transaction() as db:
            db.executemany(
                "DELETE FROM superseded WHERE uuid=? AND store=? AND key=?", ((uuid, store, key) for key in keys)
            )

    # --- transactions ------------------------------------------------------------------------------------------

    def begin_transaction(self, transaction: Transaction, manifest: Manifest) -> None:
        self._run(
            "INSERT INTO transactions VALUES (?,?,?,?,?,?)",
            (
                transaction.uuid,
                transaction.state,
                transaction.notes,
                transaction.began_ns,
                json.dumps(dict(transaction.numbers), sort_keys=True),
                zlib.compress(dump(manifest), 1),
            ),
        )

    def enter_transaction(self, uuid: str, state: str, notes: str) -> None:
        self._run("UPDATE transactions SET state=?, notes=? WHERE uuid=?", (state, notes, uuid))

    def end_transaction(self, uuid: str) -> None:
        self._run("DELETE FROM transactions WHERE uuid=?", (uuid,))

    def transactions(self) -> dict[str, Transaction]:
        rows = self._all("SELECT uuid, state, notes, began_ns, numbers FROM transactions ORDER BY began_ns")
        return {uuid: Transaction(uuid, state, notes, at, json.loads(text)) for uuid, state, notes, at, text in rows}

    def before_transaction(self, uuid: str) -> Manifest | None:
        """The record as it was when its transaction began."""
        rows = self._all("SELECT manifest FROM transactions WHERE uuid=?", (uuid,))
        return parse(zlib.decompress(rows[0][0]), uuid) if rows else None


def _beyond(sizes: Sequence[tuple[Any, ...]]) -> list[int]:
    """Numbers of the versions, newest first, whose manifests are more than is kept here; the newest always is."""
    total, beyond = 0, []
    for place, (number, size) in enumerate(sizes):
        total += size
        if place and total > _MANIFESTS_MOST:
            beyond.append(number)
    return beyond
