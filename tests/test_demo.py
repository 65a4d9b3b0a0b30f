"""`make demo` does what it says, and leaves nothing behind, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import demo
from tests.mounting import ROOT
from tests.mounts import fuse_mounts

LIMIT_S = 240.0
DEMO = (sys.executable, "-m", "daemon.demo")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1"}


def assert_nothing_left(tmp_path: Path) -> None:
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not [mount for mount in fuse_mounts() if mount.path.is_relative_to(tmp_path)]


@pytest.mark.mounted
@pytest.mark.parametrize("options", [[], ["--s3"]], ids=["directory", "s3"])
def test_every_step_does_what_it_says(environment: dict[str, str], tmp_path: Path, options: list[str]) -> None:
    done = subprocess.run([*DEMO, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("$ runfs ")]
    assert [line.split()[2] for line in shown] == [
        *("mount", "push", "evict", "evict", "status", "status", "push", "safe", "umount"),
    ]
    assert "For your own project:" in done.stdout
    assert_nothing_left(tmp_path)


@pytest.mark.mounted
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_it_still_cleans_up(
    environment: dict[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    with subprocess.Popen(DEMO, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("$ runfs push"):
                process.send_signal(how)
        assert process.wait(LIMIT_S) == 128 + how
    assert_nothing_left(tmp_path)


def test_a_step_that_fails_ends_the_demo(tmp_path: Path) -> None:
    steps = demo.Demo(tmp_path, "file:///nowhere", {})
    with pytest.raises(demo.StepFailed, match="this ended with 3: exit 3"):
        steps.run("exit 3")
    with pytest.raises(demo.StepFailed, match="other bytes"):
        steps.check(False, "other bytes")
