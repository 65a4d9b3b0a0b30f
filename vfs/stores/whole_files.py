"""The file system work of stores of whole records. Used by `whole.py` and the stores on it; blocks on the disk."""

import atexit
import fcntl
import os
import shutil
import stat as modes
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def regular_files(root: bytes, below: bytes = b"") -> Iterator[tuple[bytes, os.stat_result]]:
    """Every regular file below a directory: its path in it and its attributes. Links are left out."""
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from regular_files(root, path)
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield path, entry.stat(follow_symlinks=False)


def own_place() -> Path:
    """A private directory for a store that was given none; gone when this process ends in the ordinary way."""
    place = Path(tempfile.mkdtemp(prefix="runfs-records-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def try_lock(file: int) -> bool:
    """Take the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def put(found: Path, target: Path, aside: Path) -> None:
    """Give a record its name, in the place of an older copy. Who reads that goes on with it."""
    if not modes.S_ISDIR(os.lstat(found).st_mode):
        raise NotADirectoryError(20, "what was brought is no directory", str(found))
    with suppress(FileNotFoundError):
        os.rename(target, aside)
    os.rename(found, target)
