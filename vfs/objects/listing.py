"""Listings of buckets and items over all places: lazily, each once, and saying when they are stale.

Used by `buckets.py`. Blocks for the stores while a listing is iterated; reads up to 32 records ahead, eight at a time.
Memory: the names seen, where more than one place is listed; else nothing that grows.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from vfs.errors import ManifestError, StoreError
from vfs.objects.format import Change, Record
from vfs.objects.item import Stats, stats_of
from vfs.objects.offline import overlaid
from vfs.objects.places import Places, Watched
from vfs.objects.query import Listing

AHEAD = 32
THREADS = 8
PROBLEMS_KEPT = 100

T = TypeVar("T")
View = Callable[[str], Record]


def buckets(places: Places, listing: Listing[str]) -> Iterator[str]:
    """The names of all buckets."""
    seen: set[str] = set()
    for name in _over(places, listing, lambda place: place.shelf.bucket_names(), "the buckets"):
        if name not in seen:
            seen.add(name)
            yield name


def items(places: Places, bucket: str, own: str, listing: Listing[Stats]) -> Iterator[Stats]:
    """The latest version of each item in a bucket."""
    waiting: dict[str, list[Change]] = {}
    for each in places.local.waiting() if places.local else ():
        if each.bucket == bucket:
            waiting.setdefault(each.name, []).append(each.change)
    several = bool(places.others or places.local)
    seen: set[str] = set()
    for record in _records(places, bucket, own, listing):
        if several and record.name in seen:
            continue
        if several:
            seen.add(record.name)
        yield from _latest(record, bucket, waiting.pop(record.name, []), listing)
    for name, changes in waiting.items():
        yield from _latest(Record(bucket, name), bucket, changes, listing)


def _latest(record: Record, bucket: str, changes: list[Change], listing: Listing[Stats]) -> Iterator[Stats]:
    result = overlaid(record, changes)
    if result.versions:
        last = result.versions[-1]
        here = any(change.version is not None and change.version.id == last.id for change in changes)
        yield stats_of(bucket, record.name, last, listing.reason, here)


def _records(places: Places, bucket: str, own: str, listing: Listing[Stats]) -> Iterator[Record]:
    """The records of a bucket in every place, those of removed items too: they hide what other places have."""

    def of(place: Watched) -> Iterator[Record]:
        return _viewed(place.shelf.prefixes(bucket), lambda prefix: place.view(prefix, own), listing)

    yield from _over(places, listing, of, bucket)


def _over(places: Places, listing: Listing[Any], ask: Callable[[Watched], Iterator[T]], what: str) -> Iterator[T]:
    """What each place has, the home first. One that does not answer makes the listing stale, and the local store is
    listed too; with nobody who answers and no local store it is an error."""
    failed: list[StoreError] = []
    for place in (places.home, *places.others):
        try:
            with place.health.watched(measured=False):
                yield from ask(place)
        except StoreError as error:
            failed.append(error)
            listing.reason = listing.reason or f"not all of {what} is listed as it is now: {error}"
    if failed and places.local is None and len(failed) > len(places.others):
        raise failed[0]
    if failed and places.local is not None:
        yield from ask(Watched(places.local.store))


def _viewed(prefixes: Iterator[str], view: View, listing: Listing[Stats]) -> Iterator[Record]:
    """The records at these prefixes, some of them read at the same time."""

    def record(prefix: str) -> Record | str:
        try:
            return view(prefix)
        except ManifestError as error:
            return str(error)

    with ThreadPoolExecutor(THREADS, "objects-listing") as pool:
        while batch := list(islice(prefixes, AHEAD)):
            for found in pool.map(record, batch):
                if isinstance(found, str):
                    if len(listing.problems) < PROBLEMS_KEPT:
                        listing.problems.append(found)
                elif found.name:
                    yield found
