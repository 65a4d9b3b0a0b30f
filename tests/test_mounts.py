"""The tests' own safety net: a hung mount is found without being asked, and taken away."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest, mounts

# A file system that never answers a lookup.
HANGING = """
import sys
import pyfuse3, trio

class Hanging(pyfuse3.Operations):
    async def lookup(self, parent, name, ctx=None):
        await trio.sleep_forever()

pyfuse3.init(Hanging(), sys.argv[1], {"fsname=hanging", "subtype=runfs"})
trio.run(pyfuse3.main)
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "a mount"
    place.mkdir()
    daemon = subprocess.Popen([sys.executable, "-c", HANGING, str(place)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not mounts.is_fuse_mount(place):
            assert daemon.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        yield place
    finally:
        mounts.unmount_under(tmp_path)
        daemon.kill()
        daemon.wait()


@pytest.mark.mounted
def test_a_hung_mount_is_taken_away_and_its_waiters_go_on(hanging: Path) -> None:
    waiting = subprocess.Popen(["stat", str(hanging / "x")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        assert [each.path for each in mounts.unmount_under(hanging.parent)] == [hanging]
        assert waiting.wait(10) == 1
    finally:
        waiting.kill()  # not waited for: if this failed, it ends only with the daemon
    assert not mounts.is_fuse_mount(hanging)
    assert list(hanging.iterdir()) == []


def test_only_mounts_below_the_directory_are_taken_away(tmp_path: Path) -> None:
    assert mounts.unmount_under(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "expected"), [("", False), ("0", False), ("false", False), ("1", True), ("true", True)]
)
def test_ci_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("CI", value)
    assert conftest.in_ci() is expected


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("1", "failed")])
def test_without_fuse_a_mounting_test_is_skipped_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, ci: str, outcome: str
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(conftest, "fuse_missing", lambda: "no /dev/fuse on this machine")
    request.node.add_marker("mounted")
    expected = pytest.skip.Exception if outcome == "skipped" else pytest.fail.Exception
    with pytest.raises(expected, match="no /dev/fuse on this machine"):
        conftest.pytest_runtest_setup(request.node)
