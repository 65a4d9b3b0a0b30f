"""Fixtures of the security tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import unmount_under


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that other users can pass, which pytest's own are not."""
    place = Path(tempfile.mkdtemp(prefix="runfs-others-"))
    place.chmod(0o711)
    yield place
    unmount_under(place)
    shutil.rmtree(place)
