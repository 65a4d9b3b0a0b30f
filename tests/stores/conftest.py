"""The stores that the contract suite runs on: memory, a directory, a real S3 server."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import Seaweed, seaweedfs
from vfs.stores import Store, open_store

MakeStore = Callable[..., Store]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One S3 server for the whole session."""
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3(seaweed: Seaweed) -> Iterator[MakeStore]:
    """Makes S3 stores, all of one test under one prefix of their own; options go on top."""
    prefix = "t-" + os.urandom(6).hex()
    made: list[Store] = []

    def make(**options: object) -> Store:
        url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
        made.append(open_store({"url": url, **seaweed.options(), **options}))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()


@pytest.fixture(params=["memory", "file", "s3"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores of each kind; those made in one test share their content."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    url = f"file://{tmp_path}/store" if request.param == "file" else f"memory://{os.urandom(6).hex()}"
    yield lambda **options: open_store({"url": url, **options})


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store()
