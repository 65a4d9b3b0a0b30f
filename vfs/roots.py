"""What a listing of the root answers, kept in memory: names, inode numbers and attributes in packed pages.

Used by `vfs/filesystem.py` (listings), `vfs/access.py` (the name of an inode number) and the daemon's upkeep. A page is
made by asking the index and looking at each of its directories, so in a worker thread; to serve a made one asks
nobody. Pages are immutable and exchanged whole.

What may be how old: what the index says is compared again after each change of it (`turn`), page by page, when the
page is next listed. What a record's own directory is like (times, mode; whether it is there) is looked at again when
the page is older than LOOKED_S, or when something was seen to change in one of its records (`touch`); a thread does so
after each listing too (`again`), so that a page is normally as it was at the last listing.

Memory: about 80 bytes a record; 1,000 records a page.
"""

import bisect
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vfs.core import Core
from vfs.errors import DamagedRecord, RunfsError
from vfs.index_listing import Listed, to_listed
from vfs.index_record import text
from vfs.numbers import number_of
from vfs.residency import State
from vfs.units import relative_to

log = logging.getLogger(__name__)

PAGE = 1000  # records: some 5 ms to make; an answer to the kernel holds 24 to 400
_MOST = 2 * PAGE  # a page that grew beyond this is cut
LOOKED_S = 30.0  # directories of records that nobody was seen to change are listed as they were so long ago, at most
_AGAIN_S = 1.0  # older than this, a page is looked at again after a listing
_TOUCHED_S = 1.0  # a change is noted before it is made, and made within this time
_SERVING_S = 0.3  # the thread waits while a listing was served so shortly ago
_REST = 1.0  # after each page the thread rests as long as it worked: a listing goes before
EAGER = 200_000  # records: of smaller indexes everything is made before somebody asks
_GONE_MOST = 10_000


Values = tuple[bytes, int, int, int, int, int, int, int, int, int, int, int]  # of a Row


class Row(NamedTuple):
    """One entry. `link`: 0 for a directory, otherwise a number made of the symlink's target. Sizes in bytes."""

    name: bytes
    ino: int
    link: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


def _form(width: int) -> struct.Struct:
    return struct.Struct(f"<{width}sQQIIIIqqqqq")


_REST_OF_ROW = _form(0).size  # bytes after the name


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """Records after the uuid `after` and up to `last` (None: all that follow). `rows` are packed Rows, in uuid order;
    `said` stands for what the index said."""

    after: str
    last: str | None
    rows: bytes
    form: struct.Struct
    ragged: bool  # names of different length: padded with NUL
    said: int
    generation: int
    looked: float

    def __len__(self) -> int:
        return len(self.rows) // self.form.size

    def since(self, number: int) -> Iterator[Values]:
        """The rows from one on."""
        rows = self.form.iter_unpack(memoryview(self.rows)[number * self.form.size :])
        return ((row[0].rstrip(b"\0"), *row[1:]) for row in rows) if self.ragged else rows

    def names(self) -> set[bytes]:
        return {row[0] for row in self.since(0)}

    def row(self, number: int) -> Row:
        return Row(*next(self.since(number)))

    def named(self, name: bytes) -> Row | None:
        """The row of a name."""
        size, width = self.form.size, self.form.size - _REST_OF_ROW
        rows, wanted = self.rows, name.ljust(width, b"\0")
        at = bisect.bisect_left(range(len(self)), wanted, key=lambda each: rows[each * size : each * size + width])
        row = self.row(at) if at < len(self) else None
        return row if row is not None and row.name == name else None

    def numbered(self, ino: int) -> Row | None:
        """The row of an inode number."""
        field, at = ino.to_bytes(8, "little"), self.form.size - _REST_OF_ROW
        place = self.rows.find(field)
        while place >= 0:
            if place % self.form.size == at:
                return self.row(place // self.form.size)
            place = self.rows.find(field, place + 1)
        return None


class Roots:
    """The pages of one index."""

    def __init__(self, core: Core, deep_target: Callable[[str], bytes | None], *, by: tuple[int, int]) -> None:
        """`deep_target`: of the link of a record nested more than once; `by`: the owner of links."""
        self._core = core
        self._deep_target = deep_target
        self._by = by
        self._pages: dict[str, Page] = {}
        self._cursors: list[str] = []  # where pages begin, in order
        self._touched: dict[str, float] = {}  # where a page begins -> when one of its records was touched
        self._gone: dict[int, bytes] = {}  # left out of a page that the kernel may have been told of
        self._hit = 0
        self._touch = self._served = -1e9  # when something was touched, a page was asked for
        self._generation = 0
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._asked = threading.Condition()
        self._wanted = self._closed = False
        self._thread: threading.Thread | None = None

    # --- serving -----------------------------------------------------------------------------------------------

    def page(self, after: str) -> Page | None:
        """The page after a uuid, if it is as it should be. Asks nobody."""
        self._served = time.monotonic()
        page = self._pages.get(after)
        return page if page is not None and self._is_good(page, LOOKED_S) else None

    def _is_good(self, page: Page, seconds: float) -> bool:
        return page.generation == self._generation and self._is_looked(page, seconds)

    def _is_looked(self, page: Page, seconds: float) -> bool:
        oldest = time.monotonic() - seconds
        return page.looked >= max(oldest, self._touched.get(page.after, 0.0) + _TOUCHED_S)

    def turn(self) -> None:
        """The index changed."""
        self._generation += 1

    def touch(self, uuid: str) -> None:
        """A record's directory changes, or its files move: now or in a moment. Any thread."""
        with self._lock:
            self._touch = time.monotonic()
            if self._cursors and (at := bisect.bisect_left(self._cursors, uuid)) > 0:
                self._touched[self._cursors[at - 1]] = self._touch

    def saw(self, uuid: str, mtime_ns: int) -> None:
        """Somebody was told this of a record's directory: a listing must not say something older."""
        with self._lock:
            at = bisect.bisect_left(self._cursors, uuid)
            page = self._pages.get(self._cursors[at - 1]) if at > 0 else None
        if page is not None:
            row = page.named(uuid.encode())
            if row is None or (row.mtime_ns != mtime_ns and not row.link):
                self.touch(uuid)

    def row(self, name: bytes) -> Row | None:
        """The entry of a name as last listed, if the index did not change since."""
        uuid = os.fsdecode(name)
        with self._lock:
            at = bisect.bisect_left(self._cursors, uuid)
            page = self._pages.get(self._cursors[at - 1]) if at > 0 else None
        if page is None or page.generation != self._generation:
            return None
        return page.named(name)

    def now(self, row: Row) -> Row | None:
        """An entry as it is now, if nothing but its directory's attributes can have changed: looks at that."""
        uuid = os.fsdecode(row.name)
        if row.link or self._core.journal.units_between(uuid, uuid):
            return row if row.link else None
        found = self._core.index.listed_one(uuid)
        return self._directory(uuid, found, evicted=False) if found is not None else None

    def name_of(self, ino: int) -> bytes | None:
        """The name of an inode number of a listing. Next to where the last one was it takes microseconds."""
        with self._lock:
            for step in range(len(self._cursors)):
                at = (self._hit + step) % len(self._cursors)
                page = self._pages[self._cursors[at]]
                row = page.numbered(ino)
                if row is not None:
                    self._hit = at
                    return row.name
            return self._gone.get(ino)

    def forgotten(self, ino: int) -> None:
        """The kernel does not know it any more."""
        self._gone.pop(ino, None)

    # --- making ------------------------------------------------------------------------------------------------

    def make(self, after: str, *, seconds: float | None = None) -> Page:
        """The page after a uuid, not older than so many seconds (LOOKED_S). Blocks for some ms. Raises
        IndexUnavailable."""
        seconds = LOOKED_S if seconds is None else seconds
        with self._making:
            old = self._pages.get(after)
            if old is not None and self._is_good(old, seconds):
                return old
            page = self._remake(after, old, seconds)
            self._install(page, old)
            return page

    def _remake(self, after: str, old: Page | None, seconds: float) -> Page:
        generation, looked = self._generation, time.monotonic()
        with self._lock:
            at = bisect.bisect_right(self._cursors, after)
            upto = self._cursors[at] if at < len(self._cursors) else None
        limit = PAGE if upto is None else _MOST
        found = self._core.index.listed(after, upto, limit + 1)
        cut = PAGE if len(found) > limit else len(found)
        records = [record for row in found[:cut] if (record := to_listed(row)) is not None]
        if len(found) > limit:
            upto = records[-1].uuid if records else text(found[cut - 1][1])
        said = hash((upto, *found[:cut]))
        if old is not None and old.said == said and self._is_looked(old, seconds):
            return Page(after, upto, old.rows, old.form, old.ragged, said, generation, old.looked)
        rows = self._look(records)
        width = max((len(row.name) for row in rows), default=1)
        form = _form(width)
        packed = b"".join(form.pack(*row) for row in rows)
        ragged = any(len(row.name) != width for row in rows)
        return Page(after, upto, packed, form, ragged, said, generation, looked)

    def _install(self, page: Page, old: Page | None) -> None:
        left = {row[0]: row[1] for row in old.since(0)} if old is not None and old.rows is not page.rows else {}
        for name in page.names() if left else ():
            left.pop(name, None)
        with self._lock:
            if page.after not in self._pages:
                bisect.insort(self._cursors, page.after)
                self._touched[page.after] = self._touch  # perhaps of one of its records, while it was made
            self._pages[page.after] = page
            self._gone.update((ino, name) for name, ino in left.items())
            while len(self._gone) > _GONE_MOST:
                self._gone.pop(next(iter(self._gone)), None)

    def _look(self, records: list[Listed]) -> list[Row]:
        if not records:
            return []
        away = {row.uuid: row for row in self._core.journal.units_between(records[0].uuid, records[-1].uuid)}
        rows: list[Row] = []
        for record in records:
            target = self._target(record)
            if target is not None:
                rows.append(self._link(record, target))
                continue
            unit = away.get(record.uuid)
            moved = unit is not None and State(unit.state) in (State.EVICTED, State.RESTORING)
            directory = unit.directory if unit is not None else record.directory
            base = self._core.units.shadow_of(record.uuid) if moved else directory
            row = self._directory(record.uuid, base, evicted=moved)
            if row is not None:
                rows.append(row)
        return rows

    def _target(self, record: Listed) -> bytes | None:
        if record.deep:
            return self._deep_target(record.uuid)
        if record.root is None or record.root_directory is None or record.directory is None:
            return None
        try:
            path = relative_to(record.root_directory, record.directory, record.root, record.uuid)
        except DamagedRecord:
            return None  # it lies elsewhere: a place of its own
        return record.root.encode() + b"/" + path

    def _link(self, record: Listed, target: bytes) -> Row:
        name, at = record.uuid.encode(), record.updated_at_ns
        ino, mark = number_of(b"link", name), link_mark(target)
        return Row(name, ino, mark, stat.S_IFLNK | 0o777, 1, *self._by, len(target), 0, at, at, at)

    def _directory(self, uuid: str, base: bytes | None, *, evicted: bool) -> Row | None:
        """None: it is gone or damaged, which doctor tells; it must not hide the others."""
        try:
            found = os.stat(base, follow_symlinks=False) if base is not None else None
        except OSError:
            return None
        if found is None or not stat.S_ISDIR(found.st_mode):
            return None
        core, name = self._core, uuid.encode()
        return Row(
            name, number_of(name, b"", name), 0, found.st_mode, found.st_nlink, found.st_uid, found.st_gid,
            found.st_size, found.st_blocks, found.st_atime_ns, core.mtime(found) if evicted else found.st_mtime_ns,
            core.ctime(found) if evicted else found.st_ctime_ns,
        )  # fmt: skip

    # --- ahead of time -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Have a thread make pages again after listings, and those of an index that is not large now."""
        self._wanted = True
        self._thread = threading.Thread(target=self._run, name="runfs-roots", daemon=True)
        self._thread.start()

    def again(self) -> None:
        """A listing ended: look at what it showed again, for the next one."""
        if len(self._cursors) * PAGE <= EAGER:
            with self._asked:
                self._wanted = True
                self._asked.notify()

    def close(self) -> None:
        """End the thread. Waits for the page it is at."""
        with self._asked:
            self._closed = True
            self._asked.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        first = True
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                self._wanted = False
            try:
                self._make_all(beyond=first and self._core.index.count() <= EAGER)
                first = False
            except RunfsError as error:
                log.debug("the root is listed anew when somebody asks: %s", error)
            except Exception:
                log.exception("listing the root ahead of time failed unexpectedly; please report this")

    def _make_all(self, *, beyond: bool) -> None:
        after: str | None = ""
        while after is not None and not self._closed and (beyond or after in self._pages):
            began = time.monotonic()
            if began - self._served < _SERVING_S:  # somebody lists: that goes before
                self._pause(_SERVING_S)
                continue
            after = self.make(after, seconds=_AGAIN_S).last
            self._pause(_REST * (time.monotonic() - began))

    def _pause(self, seconds: float) -> None:
        with self._asked:
            self._asked.wait_for(lambda: self._closed, seconds)


def link_mark(target: bytes) -> int:
    """A number, not 0, that stands for a symlink's target while this process lives."""
    return hash(target) & (2**63 - 1) or 1
