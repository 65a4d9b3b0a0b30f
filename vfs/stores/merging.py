"""What stores that are made of stores share: locks by key, and listings merged without duplicates.

Used by `mounted.py` and `first.py`. `KeyLocks` blocks until the key is free; the rest as the stores' listings do.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vfs.errors import StoreTimeout
from vfs.stores.base import PROBLEMS_KEPT
from vfs.stores.limits import Budget
from vfs.stores.protocol import Stat, Store

REMEMBERED = 200_000  # keys of a listing kept to leave out duplicates: about 30 MB; the others cost a stat each


@dataclass(slots=True)
class _Lock:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class KeyLocks:
    """One lock for each key that is being changed by this process."""

    def __init__(self) -> None:
        self._locks: dict[str, _Lock] = {}
        self._guard = threading.Lock()

    @contextmanager
    def __call__(self, budget: Budget, *keys: str) -> Iterator[None]:
        """Hold the locks of these keys, taken in their order. Raises StoreTimeout at the end of the budget."""
        held: list[str] = []
        try:
            for key in sorted(set(keys)):
                self._take(key, budget)
                held.append(key)
            yield
        finally:
            for key in held:
                self._give(key)

    def _take(self, key: str, budget: Budget) -> None:
        with self._guard:
            entry = self._locks.setdefault(key, _Lock())
            entry.users += 1
        if not entry.lock.acquire(timeout=budget.left()):
            self._forget(key, entry)
            raise StoreTimeout(f"{key}: another thread was changing it for {budget.total_s:g} s; try again")

    def _give(self, key: str) -> None:
        entry = self._locks[key]
        entry.lock.release()
        self._forget(key, entry)

    def _forget(self, key: str, entry: _Lock) -> None:
        with self._guard:
            entry.users -= 1
            if not entry.users:
                del self._locks[key]


def merge(
    listings: Sequence[Iterable[Stat]], has: Callable[[int, str], bool], remembered: int = REMEMBERED
) -> Iterator[Stat]:
    """All of the first listing, then what only the second has, and so on, lazily.

    Listings have no order, so the keys that were given are kept; when they are more than `remembered`, `has(number,
    key)` (a stat in an earlier listing's store) is asked for the keys that are not among the kept ones.
    """
    seen: set[str] = set()
    all_kept = True
    for number, listing in enumerate(listings):
        for stat in listing:
            if stat.key in seen or (not all_kept and any(has(before, stat.key) for before in range(number))):
                continue
            if number < len(listings) - 1:
                all_kept = all_kept and len(seen) < remembered
                if all_kept:
                    seen.add(stat.key)
            yield stat


def gather_problems(store: Store, *parts: Store) -> None:
    """Add what a store's parts found odd to what it found itself."""
    for sentence in (sentence for part in parts for sentence in part.problems):
        if sentence not in store.problems and len(store.problems) < PROBLEMS_KEPT:
            store.problems.append(sentence)
