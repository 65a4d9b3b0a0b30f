"""Listings of remote stores, in pages, and the sweeping of temporary objects, which begins with one.

Used by `remote.py`. Blocks its caller for each page, at most for the budget of one and a moment.
"""

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from functools import partial

from opendal.types import Entry

from vfs.errors import StoreError
from vfs.stores.limits import Budget, Limits
from vfs.stores.remote_calls import TEMPORARY, Calls
from vfs.stores.remote_config import BUCKET_ENGINES, Target

PAGE = 1000  # entries handed over at a time: what S3 sends in one answer
LISTING = 64 * 1024 * 1024  # bytes; a directory with 100,000 names, told in one answer


class Listings:
    """The listings of one store. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits, calls: Calls) -> None:
        self._target = target
        self._limits = limits
        self._calls = calls

    def sweep(self, older_than_s: float, budget: Budget) -> int:
        """Remove what was written under temporary keys and not renamed; how many."""
        area = TEMPORARY.rpartition("/")[0] + "/"
        swept = 0
        for page in self.pages(area, False, None):
            for entry in page:
                modified = entry.metadata.last_modified
                stale = modified is not None and time.time() - modified.timestamp() >= older_than_s
                if entry.path.startswith(TEMPORARY) and stale:
                    self._calls.delete(entry.path, budget)
                    swept += 1
        return swept

    def pages(self, prefix: str, recursive: bool, deadline: float | None) -> Iterator[list[Entry]]:
        """The entries under a prefix, a page at a time; each page has its own budget. May contain directories
        and, on engines that list directories, entries outside the prefix."""
        if self._target.scheme in BUCKET_ENGINES:
            yield from self._flat_pages(prefix, recursive, deadline)
            return
        # Directory by directory, each anew when it fails: opendal's own walk takes one that did not answer for empty.
        start = prefix[: prefix.rfind("/") + 1]
        waiting, seen = [start], {start}
        while waiting:
            directory = waiting.pop()
            page = self._calls.run("list", prefix, partial(self._directory, directory), self._limits.budget(deadline))
            yield page
            below = [entry.path for entry in page if entry.metadata.mode.is_dir()] if recursive else []
            waiting += [each for each in below if each not in seen and _may_hold(each, prefix)]
            seen.update(below)

    async def _directory(self, directory: str) -> list[Entry]:
        async def ask() -> list[Entry]:
            return [entry async for entry in await self._calls.operator.list(directory)]

        page = await self._calls.watched(ask, LISTING)
        return [entry for entry in page if entry.path not in (directory, "/")]

    def _flat_pages(self, prefix: str, recursive: bool, deadline: float | None) -> Iterator[list[Entry]]:
        budget = self._limits.budget(deadline)
        entries = self._calls.run("list", prefix, lambda: self._open_listing(prefix, recursive), budget)
        remembered: object = None
        counted, next_at = 0, 1
        while True:
            page = self._calls.run("list", prefix, lambda: _page(entries), self._limits.budget(deadline), attempts=1)
            for entry in page:  # a circle of any length meets a name remembered at each doubling, sooner or later
                told = (entry.path, entry.metadata.etag, entry.metadata.last_modified)
                if told == remembered:
                    where = f"{self._target.name}: list {prefix}".rstrip()
                    raise StoreError(f"{where}: {self._target.place} repeats the same names for ever")
                counted += 1
                if counted == next_at:
                    remembered, next_at = told, 2 * next_at
            if page:
                yield page
            if len(page) < PAGE:
                return

    async def _open_listing(self, start: str, recursive: bool) -> AsyncIterator[Entry]:
        listing: AsyncIterable[Entry] = await self._calls.in_window(
            self._calls.listing.list(start, recursive=recursive)
        )
        return aiter(listing)


async def _page(entries: AsyncIterator[Entry]) -> list[Entry]:
    page: list[Entry] = []
    async for entry in entries:
        page.append(entry)
        if len(page) == PAGE:
            break
    return page


def _may_hold(directory: str, prefix: str) -> bool:
    """Whether keys with that prefix can be below that directory; names that lead elsewhere hold nothing."""
    lawful = directory.endswith("/") and not {"", ".", ".."} & set(directory[:-1].split("/"))
    return lawful and (directory.startswith(prefix) or prefix.startswith(directory))
