"""The local directory that objects are read into: names that come from a store never lead out of it.

Used by `batch.py`. Blocks on the local disk. Raises OSError as the system does, and UsageError for names.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vfs.errors import UsageError
from vfs.stores.directory import BLOCKED, NEW, make_directories, remove

PART = ".runfs-part-"  # files being written; what a crash leaves of them can be removed


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file goes: the directories below the target, and its name."""

    directories: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return "/".join((*self.directories, self.name))


class Target:
    """A directory that is held open while it is written to: a rename of it, or a link put in its place, leads nowhere.

    Made if its parent is there. To be used with `with`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> "Target":
        with suppress(FileExistsError):
            self._path.mkdir()
        self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def place(self, name: bytes) -> Place:
        """The place for a name as a store or a caller gives it. Raises UsageError for one that is no way down."""
        parts = [os.fsdecode(part) for part in name.split(b"/")]
        if b"\0" in name or any(part in ("", ".", "..") for part in parts):
            raise UsageError(
                f"{os.fsdecode(name)[:200]!r} is no name of a file below {self._path}; give it another one"
            )
        return Place(tuple(parts[:-1]), parts[-1])

    @contextmanager
    def part(self, place: Place) -> Iterator["Part"]:
        """A new file beside this place, under a name of its own; removed at the end unless it was published."""
        with self._directory(place) as directory:
            name = PART + os.urandom(8).hex()
            file = os.open(name, NEW, 0o666, dir_fd=directory)
            try:
                yield Part(file, directory, name, place.name)
            finally:
                os.close(file)
                remove(directory, name)

    def link(self, place: Place, to: Path) -> None:
        """Put a symbolic link there, in place of what had the name."""
        with self._directory(place) as directory:
            name = PART + os.urandom(8).hex()
            os.symlink(to, name, dir_fd=directory)
            try:
                os.rename(name, place.name, src_dir_fd=directory, dst_dir_fd=directory)
            finally:
                remove(directory, name)

    def path(self, place: Place) -> Path:
        return self._path.joinpath(*place.directories, place.name)

    @contextmanager
    def _directory(self, place: Place) -> Iterator[int]:
        try:
            directory = make_directories(self._fd, place.directories)
        except OSError as error:
            if error.errno in BLOCKED:  # also a symbolic link: it is not followed
                raise UsageError(
                    f"{place}: {error.filename} is in the way; remove it, or read into another place"
                ) from None
            raise
        try:
            yield directory
        finally:
            os.close(directory)


@dataclass(frozen=True, slots=True)
class Part:
    """A file that is being written. `file` and `directory` are descriptors."""

    file: int
    directory: int
    part: str
    name: str

    def publish(self) -> None:
        """Give it its name, in place of what had it. Synced first: after a power cut it is whole or not there."""
        os.fsync(self.file)
        os.rename(self.part, self.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
