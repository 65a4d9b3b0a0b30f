"""The stores over a mount and over fsspec that the contract suite runs on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.kinds import Maker, MakeStore

SHARED_MEMORY = Path("/dev/shm")  # a mount point on every Linux machine that anybody may write below


@pytest.fixture
def nfs_stores() -> Iterator[MakeStore]:
    """Directories on a mount; what kind of mount it is makes no difference to the store."""
    directory = SHARED_MEMORY / f"runfs-test-{os.getpid()}-{os.urandom(6).hex()}"
    yield Maker(f"nfs://{directory}", mount=str(SHARED_MEMORY), remote="server:/export")
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def fsspec_memory_stores() -> Iterator[MakeStore]:
    fsspec = pytest.importorskip("fsspec")
    name = f"t-{os.urandom(6).hex()}"
    yield Maker(f"fsspec+memory://{name}/store")
    files = fsspec.filesystem("memory")
    if files.exists(f"/{name}"):
        files.rm(f"/{name}", recursive=True)


@pytest.fixture
def fsspec_local_stores(tmp_path: Path) -> MakeStore:
    pytest.importorskip("fsspec")
    return Maker(f"fsspec+file://{tmp_path}/store")
