"""The stores made of stores that the contract suite runs on: parts in memory, and on a disk with content behind."""

import os
from pathlib import Path

import pytest

from tests.stores.kinds import MakeStore
from vfs.events import Events
from vfs.stores import Store, open_store
from vfs.stores.first import FirstStore
from vfs.stores.memory import MemoryStore
from vfs.stores.mounted import MountedStore
from vfs.stores.observed import ObservedStore


@pytest.fixture
def mounted_stores(tmp_path: Path) -> MakeStore:
    """A directory mounted on another one, at the root: every key can be written."""

    def make(**options: object) -> Store:
        front = open_store(f"file://{tmp_path}/front", options=options)
        return ObservedStore(MountedStore(front, "", open_store(f"file://{tmp_path}/behind"), name="mounted"), Events())

    return make


@pytest.fixture
def first_stores() -> MakeStore:
    """Three in memory, the last of which cannot be written to."""
    tag = os.urandom(6).hex()

    def make(**options: object) -> Store:
        read_only = {"read_only": True}
        behind = [open_store(f"memory://{tag}-2"), open_store(f"memory://{tag}-3", options=read_only)]
        return FirstStore([open_store(f"memory://{tag}", options=options), *behind, MemoryStore("empty")], name="first")

    return make
