"""One SQLite connection to machinable's index: its profile, its lock, and every failure as one clear sentence.

Used by `vfs/index.py` only. Each call may wait for this connection's lock, and for other processes' locks up to
the busy timeout (5 s); a WAL reader does not wait for a writer. Results are fetched whole, so that no read
transaction outlives a call and other processes' checkpoints and writes go on.

SQLite's locks belong to the process (POSIX). So within a process that has the index open nothing else may open its
file: not `open()`, whose close drops the locks, and not another SQLite library such as the standard library's
`sqlite3`, which takes itself for the last user when it closes and removes the log from under us. `stat` is fine.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import apsw

from vfs.errors import Full, IndexCorrupt, IndexLocked, IndexMissing, IndexUnavailable, IndexVersion
from vfs.index_schema import NAMES, SCHEMA_VERSION, STATEMENTS

Value = None | int | float | str | bytes
Row = tuple[Value, ...]

# As machinable's: longer than any of its own transactions.
BUSY_TIMEOUT_S = 5.0


class Identity(NamedTuple):
    """Which files an index is in; `log` is SQLite's write-ahead log (0: none), which lives and dies with its users."""

    device: int
    file: int
    log: int


def identity(path: str) -> Identity:
    """Which files are at `path` now. Raises IndexMissing, IndexUnavailable."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexMissing(
            f"{path}: there is no index; name another with --project or --index, or make it with: runfs reindex"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise IndexUnavailable(f"{path}: is a directory; --index wants the file in it, often .machinable.sqlite")
    if not stat.S_ISREG(status.st_mode):
        raise IndexUnavailable(f"{path}: is not a plain file, so not an index")
    try:
        log = os.stat(f"{os.path.realpath(path)}-wal").st_ino
    except OSError:
        log = 0
    return Identity(status.st_dev, status.st_ino, log)


def _unreadable(path: str, error: OSError) -> IndexUnavailable:
    return IndexUnavailable(f"{path}: cannot be used: {os.strerror(error.errno or errno.EIO)}")


class Database:
    """A connection with its lock. Thread safe: calls take turns."""

    def __init__(self, path: str, *, create: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """Open it (with `create`, make the file and the schema where there is none) and check the schema.

        Raises IndexMissing, IndexVersion, IndexLocked, IndexCorrupt, IndexUnavailable.
        """
        self.path = path
        self._lock = threading.RLock()
        self._busy_timeout_s = busy_timeout_s
        self._closed = False
        self._connection = self._connect(create)

    def _connect(self, create: bool) -> apsw.Connection:
        self._check_place(create)
        flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
        with self.explained():
            connection = apsw.Connection(self.path, flags=flags)
            try:
                # The file's before the first read, the log's after it: the first read makes it. Were the file
                # replaced in between, the next poll would notice.
                before = identity(self.path)
                connection.set_busy_timeout(int(self._busy_timeout_s * 1000))
                self._prepare(connection, create)
                self.identity = before._replace(log=identity(self.path).log)
            except BaseException:
                connection.close()
                raise
        return connection

    def _check_place(self, create: bool) -> None:
        try:
            self.path.encode()
            if create:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
        except UnicodeEncodeError as error:
            raise IndexUnavailable(f"{self.path!r}: is not UTF-8, and SQLite opens no other names") from error
        except OSError as error:
            raise _unreadable(os.path.dirname(self.path), error) from error
        if not create or os.path.lexists(self.path):
            identity(self.path)
            # SQLite takes anything below 512 bytes for an empty database and would write over it.
            if 0 < os.stat(self.path).st_size < 512:
                raise IndexCorrupt(f"{self.path}: is too short to be an index; {_RECOVER}")

    def _prepare(self, connection: apsw.Connection, create: bool) -> None:
        if create and _number(connection, "PRAGMA user_version") == 0:
            _make_schema(connection)
        self._check(connection)
        # Asked first: setting it takes a write lock, and a read-only file cannot be set but can be read.
        mode = connection.execute("PRAGMA journal_mode").fetchall()[0][0]
        if mode != "wal" and not connection.readonly("main"):
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = NORMAL")

    def reopen(self) -> None:
        """Connect to the file that is at the path now. When that fails the old connection stays. Raises as opening."""
        with self._lock:
            old, self._connection = self._connection, self._connect(create=False)
            _abandon(old)

    def check(self) -> None:
        """Raises IndexVersion or IndexCorrupt unless the tables are those of the version we know."""
        with self._lock, self.explained():
            self._check(self._connection)

    def _check(self, connection: apsw.Connection) -> None:
        version = _number(connection, "PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise IndexVersion(
                f"{self.path}: has schema version {version}, newer than {SCHEMA_VERSION}, which this runfs knows; "
                "upgrade runfs"
            )
        if version == 0 and _number(connection, "SELECT count(*) FROM sqlite_schema"):
            raise IndexCorrupt(f"{self.path}: is a database of something else, not an index")
        if version == 0:
            raise IndexVersion(f"{self.path}: is empty, no index has been made in it yet; make it with: runfs reindex")
        if version < SCHEMA_VERSION:
            raise IndexVersion(
                f"{self.path}: has the old schema version {version}; open the project once with machinable 5.1, "
                f"which brings it to {SCHEMA_VERSION}"
            )
        found = {str(row[1]) for row in connection.execute("PRAGMA table_info('index')")}
        if missing := [name for name in NAMES if name not in found]:
            what = f"the column {missing[0]}" if found else "the table 'index'"
            raise IndexCorrupt(f"{self.path}: says version {version} but has not {what}; {_RECOVER}")

    def query(self, sql: str, values: Sequence[Value] = ()) -> list[Row]:
        """All rows. Raises IndexUnavailable or one of its kin."""
        with self._lock, self.explained():
            return self._connection.execute(sql, tuple(values)).fetchall()

    def one(self, sql: str, values: Sequence[Value] = ()) -> Value:
        """The first value of the first row, None if there is none. Errors as for `query`."""
        rows = self.query(sql, values)
        return rows[0][0] if rows else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A write transaction, taken at once (`BEGIN IMMEDIATE`), so that it fails before it has done anything.

        Other threads wait for it; keep it short. Rolled back if the block raises.
        """
        with self._lock, self.explained():
            if identity(self.path) != self.identity:
                raise IndexUnavailable(f"{self.path}: was replaced by another file just now; try again")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close it. Calling it twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                ours = identity(self.path) == self.identity
            except IndexUnavailable:
                ours = False
            if ours:
                self._connection.close()
            else:
                _abandon(self._connection)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """SQLite's failures as ours, each one sentence."""
        try:
            yield
        except (apsw.BusyError, apsw.LockedError) as error:
            raise IndexLocked(
                f"{self.path}: another program has kept it locked for {self._busy_timeout_s:g} s; "
                "let it finish or stop it, then try again"
            ) from error
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise IndexCorrupt(f"{self.path}: SQLite says: {error}; {_RECOVER}") from error
        except (apsw.CantOpenError, apsw.PermissionsError) as error:
            raise IndexUnavailable(f"{self.path}: cannot be opened: {error}; check the permissions") from error
        except apsw.ReadOnlyError as error:
            raise IndexUnavailable(f"{self.path}: cannot be written: {error}") from error
        except apsw.FullError as error:
            raise Full(f"{self.path}: the disk is full") from error
        except apsw.IOError as error:
            raise IndexUnavailable(f"{self.path}: the disk failed: {error}") from error
        except apsw.SQLError as error:
            if "no such table" not in str(error) and "no such column" not in str(error):
                raise
            raise IndexVersion(
                f"{self.path}: its tables are just being rebuilt ({error}); try again in a moment"
            ) from error


def _abandon(connection: apsw.Connection) -> None:
    """Close a connection to files that are no longer at their path.

    The last user of a log writes it back and removes it when it closes, by name: that is another index's log now.
    """
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.close()


def _make_schema(connection: apsw.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked again under the lock: another process may have made it in the meantime.
        if not _number(connection, "PRAGMA user_version") and not _number(
            connection, "SELECT count(*) FROM sqlite_schema"
        ):
            for statement in STATEMENTS:
                connection.execute(statement)
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _number(connection: apsw.Connection, sql: str) -> int:
    value = connection.execute(sql).fetchall()[0][0]
    return value if isinstance(value, int) else 0


_RECOVER = "move it away and make a new one from the record directories with: runfs reindex"
