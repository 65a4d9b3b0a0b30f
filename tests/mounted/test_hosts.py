"""Two hosts with one store: mounts of their own, with states of their own. What one does the other notices."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.making import until
from tests.mounting import Mounted
from tests.projects import Project

pytestmark = pytest.mark.mounted
Make = Callable[..., Project]
Mount = Callable[..., Mounted]


@pytest.fixture
def hosts(make_project: Make, mount: Mount, tmp_path: Path) -> tuple[Mounted, Mounted, str]:
    """The same record on two hosts, pushed by both and at rest; they look for news twice a second."""
    found = []
    url = (tmp_path / "store").as_uri()
    for name in ("one", "two"):
        environment = {
            f"RUNFS_{kind}_DIR": str(tmp_path / f"{name[0]}{kind[0]}") for kind in ("STATE", "CACHE", "RUNTIME")
        }
        environment |= {"RUNFS_NOTICE_S": "0.5", "RUNFS_PUSH__QUIET_S": "0.1"}
        mounted = mount(
            make_project(name, runs=1, size=100_000, report=False),
            name=f"m{name}",
            stores=[url],
            environment=environment,
        )
        mounted.json("push")
        found.append(mounted)
    (uuid,) = found[0].project.runs
    assert (found[1].path / uuid).is_dir(), "the same record"
    return found[0], found[1], uuid


def looks_at(mounted: Mounted, uuid: str) -> None:
    """Use a record, as a reader does."""
    (mounted.path / uuid / "model.json").read_bytes()


def test_changes_arrive_at_a_host_that_only_reads(hosts: tuple[Mounted, Mounted, str]) -> None:
    one, two, uuid = hosts
    (one.path / uuid / "weights.npy").unlink()
    (one.path / uuid / "new").write_bytes(b"from one")
    one.json("push", uuid)
    directory = two.path / uuid

    def arrived() -> bool:
        looks_at(two, uuid)
        return not (directory / "weights.npy").exists() and (directory / "new").exists()

    until(arrived, 30)
    assert (directory / "new").read_bytes() == b"from one"
    assert "weights.npy" not in {path.name for path in directory.iterdir()}
    two.json("push", uuid)
    one.json("push", uuid)
    assert not (one.path / uuid / "weights.npy").exists(), "it came back"


def test_a_conflict_is_told_and_settled_through_the_daemon(hosts: tuple[Mounted, Mounted, str]) -> None:
    one, two, uuid = hosts
    (one.path / uuid / "both").write_bytes(b"from one")
    one.json("push", uuid)
    (two.path / uuid / "both").write_bytes(b"from two, longer")
    two.json("push", uuid)
    told = two.json("conflicts", exit_code=1)["conflicts"]
    assert [each["path"] for each in told] == ["both"]
    assert (two.path / uuid / told[0]["ours"]["path"]).read_bytes() == b"from two, longer"
    assert (two.path / uuid / told[0]["theirs"]["path"]).read_bytes() == b"from one"
    assert "conflict" in two.runfs("status").stdout
    dry = two.runfs("conflicts", uuid, "both", "--keep", "theirs", "--dry-run")
    assert (dry.returncode, "would be settled" in dry.stdout) == (0, True), dry
    assert two.json("conflicts", uuid, "both", "--keep", "theirs")["failed"] == []
    assert (two.path / uuid / "both").read_bytes() == b"from one"
    assert not (two.path / uuid / told[0]["theirs"]["path"]).exists()
    assert two.json("conflicts")["conflicts"] == []
    assert two.runfs("conflicts", "--keep", "ours").returncode == 2

    def arrived() -> bool:
        looks_at(one, uuid)
        return (one.path / uuid / "both").read_bytes() == b"from one" and len(
            list((one.path / uuid).glob("both*"))
        ) == 1

    until(arrived, 30)


def test_a_scrub_through_the_daemon(hosts: tuple[Mounted, Mounted, str], tmp_path: Path) -> None:
    one, _two, uuid = hosts
    damaged = tmp_path / "store" / uuid / "weights.npy"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1])
    shown = one.json("verify", "--deep", exit_code=1)["bad"]
    found = [(each["uuid"], each["path"], each["store"]) for each in shown if each["path"]]
    assert found == [(uuid, "weights.npy", "store")]
    done = one.runfs("verify", "--repair", "--rate", "50MB/s", uuid)
    assert (done.returncode, " repaired" in done.stdout) == (0, True), done
    assert one.json("verify", "--deep")["bad"] == []
    assert one.runfs("verify", "--rate", "fast", "--deep").returncode == 2
    assert one.runfs("verify", "--rate", "1MB/s").returncode == 2
    receipts = one.json("receipts", uuid)["receipts"]
    assert {"expires_at", "expired"} <= receipts[0].keys()
    assert one.json("receipts", uuid, "--expired")["receipts"] == []
