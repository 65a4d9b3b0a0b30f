"""Fixtures of the tests on real mounts. A test that hangs in the mount is ended: its mount is taken away."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.records import STATES, Record, Shared
from tests.mounts import fuse_missing, unmount_under

LIMIT_S = 90.0  # for one test; what waits in the mount then gets an error instead of waiting for ever
RECORDS = 130  # more than any module takes


@pytest.fixture(autouse=True)
def _nothing_hangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    timer = threading.Timer(LIMIT_S, unmount_under, [tmp_path_factory.getbasetemp().resolve()])
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """One mount, with a store in a directory, for the tests of a module."""
    if fuse_missing() is not None:
        pytest.skip("nothing can be mounted here")
    place: Path = tmp_path_factory.mktemp("shared")
    made = Shared(place, RECORDS)
    with made.mounted:
        yield made
    log = made.mounted.log()
    assert "please report this" not in log, log
    assert "Traceback" not in log, log


@pytest.fixture(params=STATES)
def record(shared: Shared, request: pytest.FixtureRequest) -> Record:
    """A record of its own for each test, once resident and once evicted."""
    return shared.take(request.param)


@pytest.fixture
def evicted(shared: Shared) -> Record:
    return shared.take("evicted")


@pytest.fixture
def resident(shared: Shared) -> Record:
    return shared.take("resident")
