"""Fixtures of the POSIX tests. One mount serves them all."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.mounts import fuse_missing, unmount_under
from tests.posix.places import STATES, Arena, Place, can_be_somebody
from tests.stores.kinds import *  # noqa: F403  (fixtures: every kind of store)
from tests.stores.kinds_local import fsspec_local_stores as fsspec_local_stores
from tests.stores.kinds_local import fsspec_memory_stores as fsspec_memory_stores
from tests.stores.kinds_local import nfs_stores as nfs_stores
from tests.stores.kinds_sftp import sftp_server as sftp_server
from tests.stores.kinds_sftp import sftp_stores as sftp_stores

LIMIT_S = 240.0  # for one test; what waits in the mount then gets an error instead of waiting for ever


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    """Not below pytest's own directory, which other users may not enter."""
    if fuse_missing() is not None:
        pytest.skip("nothing can be mounted here")
    directory = Path(tempfile.mkdtemp(prefix="runfs-posix-"))
    directory.chmod(0o755)
    try:
        made = Arena(directory)
        made.shared.mounted.start()
        try:
            yield made
        finally:
            made.shared.mounted.kill()  # nobody waits for what the tests left to be pushed
        log = made.shared.mounted.log()
        assert "please report this" not in log, log
        assert "Traceback" not in log, log
    finally:
        unmount_under(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=STATES)
def place(arena: Arena, request: pytest.FixtureRequest) -> Place:
    """A directory of its own for each test: on the native file system, in a resident and in an evicted record."""
    return arena.take(request.param)


@pytest.fixture
def users() -> None:
    """The test becomes other users."""
    if can_be_somebody():
        return
    if in_ci():
        pytest.fail("only root can be other users", pytrace=False)
    pytest.skip("only root can be other users")


@pytest.fixture(autouse=True)
def _nothing_hangs(request: pytest.FixtureRequest) -> Iterator[None]:
    mounted = "arena" in request.fixturenames
    places = [request.getfixturevalue("arena").shared.place] if mounted else []
    timer = threading.Timer(LIMIT_S, lambda: [unmount_under(each) for each in places])
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)
