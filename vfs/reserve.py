"""A little room that is kept, so that room can be made when there is none: an eviction writes before it drops.

Used by the session, around evictions and at its start. One file beside the journal (state and cache are on one disk
for most) that holds nothing; when the disk is nearly full it goes, and comes back when there is room again. Blocks on
the local disk for a moment.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)
# Names and placeholders of a record of some thousand files, and the journal's log until it is next folded in.
RESERVE = 8 << 20  # bytes


class Reserve:
    """The file. `released` lets what happens inside use the room, if it is needed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "reserve"
        self._lock = threading.Lock()
        self._users = 0

    @contextmanager
    def released(self) -> Iterator[None]:
        """While the block runs, the reserve is free to be used when nothing else is."""
        with self._lock:
            self._users += 1
            if self._free() < RESERVE:
                self._path.unlink(missing_ok=True)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._keep()

    def _free(self) -> int:
        room = os.statvfs(self._path.parent)
        return room.f_bavail * room.f_frsize

    def _keep(self) -> None:
        """Take the room, if twice as much is there."""
        with suppress(OSError):
            if self._path.exists() or self._free() < 2 * RESERVE:
                return
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE)
            except OSError:
                self._path.unlink()
            finally:
                os.close(fd)
