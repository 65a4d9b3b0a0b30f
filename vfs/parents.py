"""The directories of a tree, each reached once for many of its files. Used by leases and shadow. Local disk only."""

import os

from vfs import linux


class Parents:
    """Open directories below `root`, of which the last one stays open. Use as a context manager; give paths in order.

    Follows no link. A directory that is renamed meanwhile goes on being reached by what was its path.
    """

    def __init__(self, root: bytes) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._last, self._path = self._root, b""

    def __enter__(self) -> "Parents":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leave()
        os.close(self._root)

    def _leave(self) -> None:
        if self._last != self._root:
            os.close(self._last)
        self._last, self._path = self._root, b""

    def of(self, path: bytes) -> tuple[int, bytes]:
        """A descriptor of the directory that holds `path`, good until the next call, and the last name. Raises
        OSError."""
        directory, _slash, name = path.rpartition(b"/")
        if directory != self._path:
            self._leave()
            if directory:
                self._last = linux.open_beneath(self._root, directory, os.O_PATH | os.O_DIRECTORY)
                self._path = directory
        return self._last, name
