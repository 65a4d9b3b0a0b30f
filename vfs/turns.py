"""Who works while others wait. Used where several threads do much with many small files.

Python runs one thread at a time and hands over at each system call. Threads that make a hundred thousand of them side
by side spend most of their time handing over: four evictions at once took three times as long as one after the other.
So one works, and the others wait for disks and stores meanwhile.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One turn at a time, given up while its holder waits for something else than the processor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = threading.local()

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Work. Not to be nested."""
        with self._lock:
            self._own.held = True
            try:
                yield
            finally:
                self._own.held = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Wait for a disk, a store or the event loop: others work meanwhile. Without a turn it changes nothing."""
        if not getattr(self._own, "held", False):
            yield
            return
        self._own.held = False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._own.held = True
