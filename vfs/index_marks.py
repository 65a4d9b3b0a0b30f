"""Which rows of the index changed since they were last looked at, told with 16 bytes a row.

Used by the daemon's upkeep, in a worker thread: each call reads the whole index, page by page, on the connection for
scans, and rests half of the time, so look-ups go on. What a mark is: see `Index.marks`.
"""

import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from vfs.index import Index

_PAGE = 1000


class _Page(NamedTuple):
    """Rows up to the uuid `last`, in uuid order: a hash of each uuid, and its mark."""

    last: str
    ids: "array[int]"
    marks: "array[int]"


class Marks:
    """The marks of one index as they were when last asked for."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._pages: list[_Page] = []
        self._left: dict[int, int] = {}  # of rows that are away: a rebuild brings them back as they were

    def take(self) -> None:
        """Take the marks as they are now. Raises IndexUnavailable."""
        self._pages = [_page(rows) for rows in self._read()]

    def changed(self) -> Iterator[str]:
        """Records whose row is new or another one than when last asked. Raises IndexUnavailable: what was not told by
        then is told the next time."""
        old, done, at = self._pages, list[_Page](), 0
        for rows in self._read():
            page, to = _page(rows), at
            while to < len(old) and old[to].last <= page.last:
                to += 1
            even = to > 0 and old[to - 1].last == page.last
            before = old[at : to if even else to + 1]  # with the one that goes on beyond this page
            done.append(page)
            self._pages = done + old[to:]
            if not (to == at + 1 and before[0] == page):
                yield from self._compare(rows, page, before)
            at = to
        for page in old[at:]:
            self._leave(page, done)
        self._pages = done

    def _read(self) -> Iterator[list[tuple[str, int]]]:
        after, began = "", time.monotonic()
        while rows := self._index.marks(after, _PAGE):
            yield rows
            after = rows[-1][0]
            time.sleep(time.monotonic() - began)  # as long as it worked: who looks something up goes before
            began = time.monotonic()

    def _compare(self, rows: list[tuple[str, int]], page: _Page, before: list[_Page]) -> list[str]:
        known = {one: mark for some in before for one, mark in zip(some.ids, some.marks, strict=True)}
        different = []
        for (uuid, mark), one in zip(rows, page.ids, strict=True):
            if known.pop(one, self._left.pop(one, None)) != mark:
                different.append(uuid)
        self._left |= known  # those of the next page come back out of it when their turn comes
        return different

    def _leave(self, page: _Page, now: list[_Page]) -> None:
        there = set(now[-1].ids) if now else set()
        self._left |= {one: mark for one, mark in zip(page.ids, page.marks, strict=True) if one not in there}


def _page(rows: list[tuple[str, int]]) -> _Page:
    return _Page(rows[-1][0], array("q", [hash(uuid) for uuid, _ in rows]), array("q", [mark for _, mark in rows]))
