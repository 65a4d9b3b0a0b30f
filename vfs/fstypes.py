"""The values that go in and out of the file operations. Pure.

Used by `vfs/filesystem.py` and its parts, and by the daemon's handlers, which translate them.
"""

import os
from dataclasses import dataclass, field

from vfs.cache import Partial
from vfs.roots import Page
from vfs.tree import FileNode, Inode, Node


class Needs(Exception):
    """These chunks of a file must be brought before the call can be answered. `partial` is held for the caller, who
    gives it back with `Core.release`."""

    def __init__(self, partial: Partial, numbers: list[int], ahead: list[int], node: FileNode) -> None:
        super().__init__(f"{len(numbers)} chunks")
        self.partial = partial
        self.numbers = numbers
        self.ahead = ahead
        self.uuid = node.unit.uuid
        self.path = node.path if node.named else b"(removed)"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the kernel is told of a node. Sizes in bytes, times in ns, timeouts in seconds."""

    ino: Inode
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the kernel says."""

    uid: int
    gid: int
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What a setattr asks for; None leaves as is. `by` is the uid that asks."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    by: int = 0

    @property
    def nothing(self) -> bool:
        return all(each is None for each in (self.mode, self.uid, self.gid, self.size, self.atime_ns, self.mtime_ns))


@dataclass(slots=True, eq=False)
class Handle:
    """An open file. `partial` is set where bytes may be missing; `end`, `window`
    (chunks), `turned` (the chunk at which it grew) and `asked` (up to which chunk more was asked for) follow a
    sequential reader. `passed`: the kernel reads and writes the file behind it itself, and `stamp` (size, mtime_ns,
    ctime_ns) is what was last seen of that."""

    node: FileNode
    fd: int
    flags: int
    partial: Partial | None
    keep_cache: bool = False
    repeats: bool = False  # only what the file holds already may be written
    wrote: bool = False
    end: int = 0
    window: int = 1
    turned: int = 0
    asked: int = 0
    pid: int = 0
    uid: int = 0
    passed: bool = False
    left: bool = False  # closed by its opener; kept, for reading only, while the file is mapped for writing
    stamp: tuple[int, int, int] = (0, 0, 0)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(slots=True, eq=False)
class Listing:
    """An open directory: names as they were when it was read, in a view with the time of the record (ns); of the root
    those that are incoming, and where its pages begin."""

    node: Node
    names: list[tuple[bytes, int | None]] | None = None
    pages: list[str] = field(default_factory=lambda: [""])
    held: dict[int, Page] = field(default_factory=dict)  # the last two: an entry may be asked for again
