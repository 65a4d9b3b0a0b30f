"""Items on stores that can do less: no conditional writes, an answer for each call but slowly; with one writer."""

from collections.abc import Iterator

import pytest

from tests.layers import test_objects, test_objects_transactions
from tests.stores.kinds import MakeStore, webdav, webdav_stores
from vfs.objects import Bucket, Objects
from vfs.stores import Store

__all__ = ["webdav", "webdav_stores"]


@pytest.fixture
def store(webdav_stores: MakeStore) -> Iterator[Store]:
    opened = webdav_stores()
    assert not opened.info().conditional_write
    yield opened
    opened.disconnect()


@pytest.fixture
def objects(store: Store) -> Objects:
    return Objects(store)


@pytest.fixture
def bucket(objects: Objects) -> Bucket:
    return objects.bucket("models")


class TestItems(test_objects.TestOnEveryStore):
    test_racing_puts_are_all_versions = None  # type: ignore[assignment]  # one writer at a time


class TestTransactions(test_objects_transactions.TestOnEveryStore):
    pass
