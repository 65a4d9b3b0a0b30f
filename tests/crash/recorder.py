"""A disk whose writes are recorded: a FUSE file system with one file, `disk`, that a loop device stands on.

As a program: `python -m tests.crash.recorder MOUNTPOINT IMAGE LOG`. What the loop device writes goes to IMAGE and, in
order, to LOG; a flush of its cache arrives as fsync and is a line in LOG, too. That is what dm-log-writes does, on
kernels that have no device mapper. `Log` reads it back and builds the disk as a power cut may leave it: all that was
written before the last completed flush, and any of what came after.
"""

import errno
import os
import random
import shutil
import stat
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

HEAD = struct.Struct("<BQI")  # kind, offset and length in bytes; the data of a write follows
WRITE, FLUSH = 1, 2
SECTOR = 4096  # what a disk writes whole
NAME = b"disk"
FILE = pyfuse3.ROOT_INODE + 1


class Recorder(pyfuse3.Operations):
    """The file system. A request is in the log before it is answered."""

    def __init__(self, image: str, log: str) -> None:
        super().__init__()
        self._image = os.open(image, os.O_RDWR)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else os.fstat(self._image).st_size
        entry.st_nlink = 1
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._image, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        os.writev(self._log, [HEAD.pack(WRITE, off, len(buf)), buf])
        return os.pwrite(self._image, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        os.write(self._log, HEAD.pack(FLUSH, 0, 0))

    async def flush(self, fh: int) -> None:
        return None

    async def release(self, fh: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the log. `end` is the position in the log after it; `at` where a write's data is in it."""

    kind: int
    offset: int
    size: int
    at: int
    end: int


class Log:
    """A recorded log and the image as it was when recording began."""

    def __init__(self, base: Path, log: Path) -> None:
        self._base = base
        self._log = log
        self.events = self._read()

    def _read(self) -> list[Event]:
        events, position = [], 0
        with self._log.open("rb") as file:
            while len(head := file.read(HEAD.size)) == HEAD.size:
                kind, offset, size = HEAD.unpack(head)
                start = position + HEAD.size
                position = start + (size if kind == WRITE else 0)
                file.seek(position)
                events.append(Event(kind, offset, size, start, position))
        return events

    def flushes(self) -> list[int]:
        """Which events are flushes."""
        return [number for number, event in enumerate(self.events) if event.kind == FLUSH]

    def cut(self, number: int, image: Path, chance: float, seed: int) -> int:
        """Write to `image` the disk as a cut of the power after so many events may leave it: of what no flush covers,
        each sector with this chance. How many bytes of it were left out."""
        shutil.copyfile(self._base, image)
        last = max((flush for flush in self.flushes() if flush < number), default=-1)
        luck, lost = random.Random(seed), 0
        with self._log.open("rb") as log, image.open("r+b") as disk:
            for index, event in enumerate(self.events[:number]):
                if event.kind != WRITE:
                    continue
                log.seek(event.at)
                data = log.read(event.size)
                for start in range(0, event.size, event.size if index < last else SECTOR):
                    piece = data[start : start + (event.size if index < last else SECTOR)]
                    if index < last or luck.random() < chance:
                        disk.seek(event.offset + start)
                        disk.write(piece)
                    else:
                        lost += len(piece)
        return lost


def main(arguments: Sequence[str]) -> None:
    mountpoint, image, log = arguments
    pyfuse3.init(Recorder(image, log), mountpoint, {"fsname=recorder", "subtype=recorder"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(sys.argv[1:])
