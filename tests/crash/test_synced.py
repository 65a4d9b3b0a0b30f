"""What one close is still syncing is not synced for another one."""

import os
from pathlib import Path

from tests.core.making import UUID, Place
from vfs.filesystem import Caller, FileSystem

ME = Caller(os.getuid(), os.getgid(), os.getpid())


def test_two_who_sync_at_once_are_both_answered_after_it(tmp_path: Path) -> None:
    """The first has begun and is not done: the second must not be told that there is nothing to do."""
    place = Place(tmp_path)
    place.record()
    with place.session() as session:
        files = FileSystem(session.core)
        record = files.lookup(1, UUID.encode())
        one, attributes = files.create(record.ino, b"new", 0o644, os.O_WRONLY, ME)
        other = files.open(attributes.ino, os.O_WRONLY)
        files.write(one, 0, b"acknowledged to both")
        first, second = files.sync_plan(one), files.sync_plan(other)
        assert first is not None
        assert second is not None, "answered before the bytes and the name are on the disk"
        third, third_attributes = files.create(record.ino, b"third", 0o644, os.O_WRONLY, ME)
        del third_attributes
        plan = files.sync_plan(third)
        for each in (first, second, plan):
            assert each is not None
            each()
        assert files.sync_plan(one) is None, "all of it is on the disk now"
        for handle in (one, other, third):
            assert files.release(handle)
