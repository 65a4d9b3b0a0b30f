"""`runfs reindex --store`: the project, its index and all state are gone, and one bucket is all there is."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from tests.conftest import WEIGHTS_BYTES
from tests.mounted.records import tree
from tests.mounted.test_from_bucket import LAUNCH, MANUAL, Bucket, Tree, without_directory_modes
from tests.mounted.trouble import sentence
from tests.mounting import Mounted
from tests.projects import MODEL, Project
from tests.servers import Seaweed
from vfs.stores import open_store
from vfs.wire import manifest_key

pytestmark = pytest.mark.mounted


@pytest.fixture
def bucket(seaweed: Seaweed) -> Bucket:
    prefix = "t-" + os.urandom(6).hex()
    url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    return Bucket(url, seaweed.environment())


@pytest.fixture
def configured(bucket: Bucket, tmp_path: Path) -> None:
    """The bucket is called `lab` in the configuration file."""
    (tmp_path / "config" / "runfs").mkdir(parents=True)
    (tmp_path / "config" / "runfs" / "config.toml").write_text(f'[stores.lab]\nurl = "{bucket.url}"\n')


def command(project: Project, bucket: Bucket, tmp_path: Path) -> Mounted:
    """For commands while nothing is mounted."""
    return Mounted(project, tmp_path / "mnt", environment={**bucket.environment, "RUNFS_MOUNT": ""})


def lose(project: Project, tmp_path: Path) -> None:
    """All but the configuration: the project's directory and everything runfs kept on this machine."""
    shutil.rmtree(project.path)
    for place in ("s", "c", "r"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)


def readable(
    project: Project, bucket: Bucket, tmp_path: Path, store: str, before: dict[str, Tree], *, exact: bool
) -> None:
    """Evicted, readable through a mount, and known to machinable, which runs nothing again."""
    (project.path / "mymodel.py").write_text(MODEL)
    with Mounted(project, tmp_path / "mnt", stores=[store], options=MANUAL, environment=bucket.environment) as mounted:
        states = mounted.json("status")["states"]
        assert states["evicted"]["records"] == len(before)
        assert states["evicted"]["cached_bytes"] < WEIGHTS_BYTES
        for uuid, expected in before.items():
            assert project.directory(uuid).is_symlink()
            seen = tree(mounted.path / uuid, times=exact)
            assert (seen if exact else without_directory_modes(seen)) == expected
        assert project.run(LAUNCH).stdout.split()[-1] == project.runs[0]
        mounted.json("push")
        assert mounted.json("safe")["safe"]


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("named", ["lab", "url"])
def test_from_the_bucket_alone(project: Project, bucket: Bucket, tmp_path: Path, named: str) -> None:
    before = {uuid: tree(project.directory(uuid), times=True) for uuid in project.runs}
    runfs = command(project, bucket, tmp_path)
    runfs.json("push", "--project", str(project.path))
    rows = project.rows()
    lose(project, tmp_path)
    store = named if named == "lab" else bucket.url
    planned = runfs.runfs("reindex", "--project", str(project.path), "--store", store, "--dry-run", "--json")
    assert not project.index.exists(), "a dry run makes nothing"
    assert planned.returncode == 2, "there is no index to plan with"
    done = runfs.json("reindex", "--project", str(project.path), "--store", store)
    assert done["restored_rows"] == len([row for row in rows.values() if row["kind"] != "Project"])
    assert done["damaged"] == []
    back = project.rows()
    assert {uuid: row["storage_uri"] for uuid, row in back.items()} == {
        uuid: row["storage_uri"] for uuid, row in rows.items() if row["kind"] != "Project"
    }
    again = runfs.json("reindex", "--project", str(project.path), "--store", store)
    assert again["restored_rows"] == 0
    readable(project, bucket, tmp_path, store, before, exact=True)


def test_records_that_another_tool_uploaded(project: Project, bucket: Bucket, tmp_path: Path) -> None:
    """They get their manifests; nothing but what describes them is brought here. One lacks its marker, which may be
    empty: some tools copy no empty files."""
    bare = project.runs[1]
    before = {uuid: without_directory_modes(tree(project.directory(uuid))) for uuid in project.runs}
    os.environ.update(bucket.environment)
    store = open_store(bucket.url)
    for uuid in project.runs:
        for path in project.directory(uuid).rglob("*"):
            inside = path.relative_to(project.directory(uuid))
            if path.is_file() and (uuid, str(inside)) != (bare, ".machinable"):
                store.write(f"{uuid}/{inside}".replace(" ", "%20"), path.read_bytes())
    before[bare][b".machinable"] = (sha256(b"").hexdigest(),)
    store.write("wrongheader/id.json", json.dumps({"uuid": "another"}).encode())
    rows = project.rows()
    lose(project, tmp_path)
    runfs = command(project, bucket, tmp_path)
    done = runfs.json("reindex", "--project", str(project.path), "--store", bucket.url, exit_code=1)
    ((damaged,),) = (done["damaged"],)
    assert "wrongheader" in damaged["path"]
    assert done["restored_rows"] == len([row for row in rows.values() if row["kind"] != "Project"])
    assert all(store.stat(manifest_key(uuid)).size > 0 for uuid in project.runs)
    readable(project, bucket, tmp_path, bucket.url, before, exact=False)


def test_bad_stores(project: Project, bucket: Bucket, tmp_path: Path) -> None:
    """A name nobody knows; a store that is not there; a store that is damaged."""
    runfs = command(project, bucket, tmp_path)
    where = ["--project", str(project.path)]
    assert "'lap' is neither a URL nor a store in the configuration" in sentence(
        runfs.runfs("reindex", *where, "--store", "lap"), 2
    )
    gone = f"s3://{bucket.url.split('/')[2].split('?')[0]}/x?endpoint=http://127.0.0.1:9&region=us-east-1"
    answer = runfs.runfs("reindex", *where, "--store", gone)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    os.environ.update(bucket.environment)
    open_store(bucket.url).write(".runfs/damagedAAA01/manifest.json", b"{")
    done = runfs.json("reindex", *where, "--store", bucket.url, exit_code=1)
    (damaged,) = done["damaged"]
    assert damaged["path"].endswith(".runfs/damagedAAA01/manifest.json")
    assert "not JSON" in damaged["reason"]
