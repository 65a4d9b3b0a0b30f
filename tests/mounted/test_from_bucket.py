"""Only the bucket is left: index, state, cache and records are gone, and come back from a store. And records that
another tool put there.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import WEIGHTS_BYTES
from tests.mounted.records import Tree, evict, tree
from tests.mounted.trouble import empty_project, lines
from tests.mounting import Mounted
from tests.projects import MODEL, REPORT, Project
from tests.servers import Seaweed
from vfs.stores import open_store

pytestmark = pytest.mark.mounted
MIB = 1 << 20
MANUAL = ("-o", "push.auto=false")
CONFIG = {"lr": 0.1, "size": WEIGHTS_BYTES, "seed": 1}
LAUNCH = f"from machinable import get; print(get('mymodel', {CONFIG}).launch().uuid)"


class Bucket:
    """A store with the records of a project in it, in a directory or in S3."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.url = url
        self.environment = environment


@pytest.fixture(params=["file"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    if request.param == "file":
        return Bucket((tmp_path / "store").as_uri(), {})
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    prefix = "t-" + os.urandom(6).hex()
    url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    return Bucket(url, seaweed.environment())


def without_directory_modes(found: Tree) -> Tree:
    """Another tool keeps no modes, links and empty directories: what it keeps is names and bytes."""
    return {path: (seen[-1],) for path, seen in found.items() if isinstance(seen[-1], str)}


@pytest.fixture
def filled(project: Project, bucket: Bucket, tmp_path: Path) -> dict[str, Tree]:
    """The project's records are in the bucket, one of them evicted before; the records by uuid."""
    for uuid in project.runs:
        (project.directory(uuid) / "tool").symlink_to("metrics.json")
        (project.directory(uuid) / "empty directory").mkdir()
        (project.directory(uuid) / "id.json").chmod(0o640)
    before = {uuid: tree(project.directory(uuid), times=True) for uuid in project.runs}
    with Mounted(
        project, tmp_path / "mnt", stores=[bucket.url], options=MANUAL, environment=bucket.environment
    ) as mounted:
        evict(mounted, project.runs[0])
        mounted.json("push")
    for place in ("s", "c", "r", "config"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
    return before


@pytest.mark.parametrize(("bucket", "command"), [("file", "import"), ("s3", "reindex")], indirect=["bucket"])
def test_everything_comes_back(
    project: Project, bucket: Bucket, filled: dict[str, Tree], tmp_path: Path, command: str
) -> None:
    """In another place than before: the rows name the new one, for machinable too."""
    rows = project.rows()
    shutil.rmtree(project.path)
    other = empty_project(tmp_path / "elsewhere")
    (other.path / "mymodel.py").write_text(MODEL)
    (other.path / "report.py").write_text(REPORT)
    arguments = ["reindex", "--from", bucket.url] if command == "reindex" else ["import", bucket.url]
    with Mounted(
        other, tmp_path / "mnt", stores=[bucket.url], options=MANUAL, environment=bucket.environment
    ) as mounted:
        done = mounted.json(*arguments)
        if command == "import":
            assert set(done["imported"]) == set(project.runs)
        back = other.rows()
        assert {uuid for uuid, row in rows.items() if row["kind"] != "Project"} == set(back)
        states = mounted.json("status")["states"]
        assert states["evicted"]["records"] == len(project.runs)
        assert states["evicted"]["cached_bytes"] < MIB
        for uuid, before in filled.items():
            assert other.directory(uuid).is_symlink()
            assert tree(mounted.path / uuid, times=True) == before
            assert tree(other.directory(uuid) / ".", times=True) == before
            same = {"kind", "module", "label", "predicate_key", "created_at_ns", "parent_id"}
            assert {name: back[uuid][name] for name in same} == {name: rows[uuid][name] for name in same}
        assert not project.path.exists()
        assert other.run(LAUNCH).stdout.split()[-1] == project.runs[0]  # found, and not run again
        mounted.json("push")
        assert mounted.json("safe")["safe"]
        mounted.json("hydrate", "--restore", project.runs[1])
        assert tree(other.directory(project.runs[1]), times=True) == filled[project.runs[1]]


def test_in_the_same_place(project: Project, bucket: Bucket, filled: dict[str, Tree], tmp_path: Path) -> None:
    """The index is gone, the records are not all: what is there stays as it is."""
    evicted, there, gone, *_more = project.runs
    rows = project.rows()
    for leftover in project.path.glob(".machinable.sqlite*"):
        leftover.unlink()
    shutil.rmtree(place_of(rows, gone))
    away = Mounted(project, tmp_path / "mnt", environment={**bucket.environment, "RUNFS_MOUNT": ""})
    away.json("reindex", "--project", str(project.path), "--store", bucket.url, "--from", bucket.url)
    assert {uuid: row["storage_uri"] for uuid, row in project.rows().items()} == {
        uuid: row["storage_uri"] for uuid, row in rows.items() if row["kind"] != "Project"
    }
    with Mounted(
        project, tmp_path / "mnt", stores=[bucket.url], options=MANUAL, environment=bucket.environment
    ) as mounted:
        assert not project.directory(there).is_symlink()
        for uuid in (evicted, there, gone):
            assert tree(mounted.path / uuid, times=True) == filled[uuid]


def place_of(rows: dict[str, dict[str, str]], uuid: str) -> Path:
    return Path(rows[uuid]["storage_uri"].removeprefix("file://"))


def test_a_store_that_is_not_one_of_ours(
    project: Project, bucket: Bucket, filled: dict[str, Tree], tmp_path: Path
) -> None:
    """Import copies from it, and what is imported is pushed to our own; reindex says what to do instead."""
    shutil.rmtree(project.path)
    other = empty_project(tmp_path / "elsewhere")
    own = (tmp_path / "own").as_uri()
    with Mounted(other, tmp_path / "mnt", stores=[own], options=MANUAL, environment=bucket.environment) as mounted:
        refused = mounted.runfs("reindex", "--from", bucket.url)
        assert refused.returncode == 2
        assert "is not one of this index's stores; add it with --store" in refused.stderr
        planned = mounted.json("import", bucket.url, "--dry-run")
        assert set(planned["imported"]) == set(project.runs)
        assert os.listdir(other.path / "storage") == []
        done = mounted.json("import", bucket.url)
        assert set(done["imported"]) == set(project.runs)
        for uuid, before in filled.items():
            assert not other.directory(uuid).is_symlink()
            assert tree(other.directory(uuid), times=True) == before
        mounted.json("push")
        assert {path.name for path in (tmp_path / "own").iterdir()} >= set(project.runs)
        again = lines(mounted.runfs("import", bucket.url), 1)
        assert any("the index has it already" in line for line in again)


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_records_that_another_tool_uploaded(project: Project, bucket: Bucket, tmp_path: Path) -> None:
    """Plain objects, `<uuid>/<path>`, and no manifest: as `aws s3 sync` leaves them."""
    before = {uuid: without_directory_modes(tree(project.directory(uuid))) for uuid in project.runs}
    os.environ.update(bucket.environment)
    store = open_store(bucket.url)
    try:
        for uuid in project.runs:
            for path in project.directory(uuid).rglob("*"):
                if path.is_file():
                    key = f"{uuid}/{path.relative_to(project.directory(uuid))}".replace(" ", "%20")
                    store.write(key, path.read_bytes())
        store.write("notes/readme.txt", b"no record")
        store.write("strangeuuid/data.bin", b"no header")
        store.write("wrongheader/id.json", json.dumps({"uuid": "another"}).encode())
    finally:
        store.disconnect()
        for name in bucket.environment:
            del os.environ[name]
    shutil.rmtree(project.path)
    other = empty_project(tmp_path / "elsewhere")
    with Mounted(
        other, tmp_path / "mnt", stores=[bucket.url], options=MANUAL, environment=bucket.environment
    ) as mounted:
        planned = mounted.json("import", bucket.url, "--dry-run", exit_code=None)
        assert set(project.runs) <= set(planned["imported"])
        assert os.listdir(other.path / "storage") == []
        done = mounted.json("import", bucket.url, exit_code=1)
        assert set(project.runs) <= set(done["imported"])
        (failed,) = done["failed"]
        assert failed["source"] == "wrongheader"
        for uuid in project.runs:
            assert without_directory_modes(tree(mounted.path / uuid)) == before[uuid]
        mounted.json("push")
        assert mounted.json("safe")["safe"]
        evict(mounted, *project.runs)
        for uuid in project.runs:
            assert without_directory_modes(tree(mounted.path / uuid)) == before[uuid]
