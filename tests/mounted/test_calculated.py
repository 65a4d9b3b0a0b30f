"""A record whose bytes every store has lost is calculated again when somebody reads it in the mount."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Mounted
from tests.projects import Project
from tests.relaunching import COMMAND, make_relaunchable, relaunches

pytestmark = pytest.mark.mounted


@pytest.fixture
def mounted(mount: Callable[..., Mounted], make_project: Callable[..., Project], tmp_path: Path) -> Mounted:
    """A project of one run, with a directory and a command as stores; the run is evicted and the directory empty."""
    project = make_relaunchable(make_project(runs=1, size=300_000, report=False))
    file = tmp_path / "runfs.toml"
    file.write_text(
        f"""
        [stores.lab]
        url = "{(tmp_path / "lab").as_uri()}"
        [stores.again]
        url = "command://again"
        [stores.again.options]
        command = {json.dumps(COMMAND)}
        enabled = true
        """
    )
    mounted = mount(project, options=["--config", str(file)])
    mounted.json("evict", project.runs[0])
    for path in (tmp_path / "lab").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return mounted


def read(mounted: Mounted, path: Path) -> str:
    """The digest of a file, read by another program."""
    done = mounted.bounded(["sha256sum", str(path)])
    return done.stdout.split()[0] if done.returncode == 0 else f"failed: {done.stderr}"


def test_it_is_calculated_for_a_reader(mounted: Mounted) -> None:
    project = mounted.project
    uuid = project.runs[0]
    rows = project.rows()
    before = project.run("import sys; from machinable import get; print(get('mymodel', {'lr': 0.1, 'size': 300000}))")
    shown = {store["name"]: store for store in mounted.json("stores")["stores"]}
    assert COMMAND in "".join(shown["again"]["warnings"])
    assert mounted.bounded(["ls", "-l", str(mounted.path / uuid)]).returncode == 0
    assert mounted.bounded(["cat", str(mounted.path / uuid / "metrics.json")]).returncode == 0  # kept, being small
    assert relaunches(project) == 0
    expected = project.run(
        "import hashlib, io, numpy as np; out = io.BytesIO();"
        "np.save(out, np.random.default_rng(1).integers(0, 256, 300000, dtype=np.uint8));"
        "print(hashlib.sha256(out.getvalue()).hexdigest())"
    ).stdout.strip()
    assert read(mounted, mounted.path / uuid / "weights.npy") == expected
    assert relaunches(project) == 1
    assert "making " + uuid in mounted.log()
    assert project.rows() == rows
    after = project.run("import sys; from machinable import get; print(get('mymodel', {'lr': 0.1, 'size': 300000}))")
    assert after.stdout == before.stdout


def test_other_bytes_are_an_error(mounted: Mounted) -> None:
    model = mounted.project.path / "mymodel.py"
    model.write_text(model.read_text().replace("default_rng(self.config.seed)", "default_rng()"))
    path = mounted.path / mounted.project.runs[0] / "weights.npy"
    assert "Input/output error" in read(mounted, path)
    assert "other bytes than the record has" in mounted.runfs("status", str(path)).stdout
