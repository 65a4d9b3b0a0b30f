"""Inode numbers: the same one for the same name after a remount, and the same one for a file that was renamed, got a
further name or lost one, for as long as the mount lives. Pure; used by `vfs/tree.py` on one thread.

The kernel drops what it knows of a resident file as soon as nobody uses it, so a number that cannot be told from the
name is kept here when that happens, by the file behind: (device, inode).
"""

from collections.abc import Container
from itertools import count

from blake3 import blake3

Key = tuple[int, int]
_FIRST = 2  # 1 is the root
_KEPT_MOST = 100_000  # numbers, of some 200 bytes each; the oldest are given up


def number_of(*parts: bytes) -> int:
    """What a name's inode number is if it is free."""
    return int.from_bytes(blake3(b"\0".join(parts)).digest()[:8], "little") >> 1


class Numbers:
    """Numbers that no two files share. `used`: those that the kernel knows now."""

    def __init__(self, used: Container[int]) -> None:
        self._used = used
        self._by_file: dict[Key, int] = {}
        self._kept: set[int] = set()

    def free(self, natural: int) -> int:
        """This number, or the next one that nobody has."""
        return next(n for n in count(max(natural, _FIRST)) if n not in self._used and n not in self._kept)

    def keep(self, key: Key, number: int) -> None:
        """The kernel forgets a file whose number its name does not tell."""
        self.drop(key)
        self._by_file[key] = number
        self._kept.add(number)
        if len(self._by_file) > _KEPT_MOST:
            self.drop(next(iter(self._by_file)))

    def kept(self, key: Key) -> int | None:
        """The number a file had before, for its new node."""
        number = self._by_file.get(key)
        self.drop(key)
        return None if number in self._used else number

    def drop(self, key: Key) -> None:
        """The file is gone, or has a node again."""
        number = self._by_file.pop(key, None)
        if number is not None:
            self._kept.discard(number)
