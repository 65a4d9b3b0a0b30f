"""The stores that the contract suite runs on, as one table. A new kind of store adds a line to `KINDS`.

Each kind is a fixture that gives a function: it makes stores of that kind, options on top; those made in one test share
their content, which is empty at the test's start. The fixture lives here, or in a module that is imported here.
A kind in `READ_ONLY` also has an attribute `writer`: a function that makes a store which puts content there from
behind. Tests that ask for the fixture `writer` run on every kind, all others on those that can be written to.
"""

import pytest

from tests.stores.kinds import *  # noqa: F403  (fixtures)
from tests.stores.kinds import MakeStore
from tests.stores.kinds_local import fsspec_local_stores as fsspec_local_stores
from tests.stores.kinds_local import fsspec_memory_stores as fsspec_memory_stores
from tests.stores.kinds_local import nfs_stores as nfs_stores
from tests.stores.kinds_of_stores import first_stores as first_stores
from tests.stores.kinds_of_stores import mounted_stores as mounted_stores
from tests.stores.kinds_sftp import sftp_server as sftp_server
from tests.stores.kinds_sftp import sftp_stores as sftp_stores
from tests.stores.servers_globus import globus as globus
from tests.stores.servers_globus import globus_stores as globus_stores
from vfs.stores import Store, urls

__all__ = ["KINDS", "READ_ONLY", "MakeStore"]

KINDS = {
    "memory": "memory_stores",
    "file": "file_stores",
    "mounted": "mounted_stores",
    "first": "first_stores",
    "sftp": "sftp_stores",
    "nfs": "nfs_stores",
    "fsspec-memory": "fsspec_memory_stores",
    "fsspec-local": "fsspec_local_stores",
    "s3": "s3",
    "s3-rclone": "rclone_s3_stores",
    "webdav": "webdav_stores",
    "globus": "globus_stores",
    "ftp": "ftp_stores",
    "http": "web_stores",
}
READ_ONLY = frozenset({"http"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        every = "writer" in metafunc.fixturenames
        metafunc.parametrize("kind", [each for each in KINDS if every or each not in READ_ONLY])


@pytest.fixture
def make_store(kind: str, request: pytest.FixtureRequest) -> MakeStore:
    """Makes stores of each kind; those made in one test share their content."""
    made: MakeStore = request.getfixturevalue(KINDS[kind])
    return made


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store()


@pytest.fixture
def writer(make_store: MakeStore, store: Store) -> Store:
    """What puts content into `store`: itself, or where that is read-only, the way from behind."""
    behind: MakeStore | None = getattr(make_store, "writer", None)
    return store if behind is None else behind()


@pytest.fixture
def many(make_store: MakeStore) -> int:
    """Objects that are more than one page of a listing."""
    number: int = getattr(make_store, "many", 1100)
    return number


@pytest.fixture
def credentials(make_store: MakeStore) -> dict[str, str]:
    """The options that log in to this kind of store; empty where there are none."""
    options: dict[str, str] = getattr(make_store, "options", {})
    return {key: value for key, value in options.items() if urls.is_secret(key)}
