"""An object of 5 GiB on every kind of store that takes one, in bounded memory. Only with RUNFS_TEST_LARGE=1 (`make
test-large`): it takes minutes and disk space."""

import resource

import pytest

from tests.stores.kinds import LARGE, MakeStore
from vfs.errors import StoreError

SIZE = 5 * 1024**3 + 12_345  # above what S3 takes in one request, and copies in one
MARKS = {0: b"begin", 3 * 1024**3 + 17: b"in the middle", SIZE - 3: b"end"}
ZEROS = bytes(16 * 1024**2)

pytestmark = pytest.mark.skipif(not LARGE, reason="takes minutes: make test-large")


def mostly_zeros(offset: int, length: int) -> bytes:
    """A sparse file's content: zeros, and a few bytes that tell where they are."""
    data = ZEROS[:length] if length <= len(ZEROS) else bytes(length)
    for at, mark in MARKS.items():
        if offset <= at < offset + length:
            data = (data[: at - offset] + mark + data[at - offset + len(mark) :])[:length]
    return data


@pytest.mark.parametrize(
    "fixture", ["file_stores", "s3", "ftp_stores", "sftp_stores", "webdav_stores", "fsspec_local_stores"]
)
def test_a_large_object(request: pytest.FixtureRequest, fixture: str) -> None:
    make: MakeStore = request.getfixturevalue(fixture)
    store = make()
    limit = store.info().max_object
    if limit is not None and limit < SIZE:
        with pytest.raises(StoreError, match=str(limit)):
            store.upload("u/large", mostly_zeros, SIZE)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stat = store.upload("u/large", mostly_zeros, SIZE, if_absent=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert stat.size == SIZE
    assert stat.verified or store.info().checksum is None
    assert grown < 300 * 1024  # kibibytes
    for at, mark in MARKS.items():
        assert store.read("u/large", at, len(mark)) == mark
    assert store.read("u/large", SIZE - 1, 100) == b"d"
    assert [found.size for found in store.list("u/")] == [SIZE]
    store.delete("u/large")
    assert list(store.list()) == []
