"""What all tests share: a place of their own, real projects, real servers, and the handling of tests that mount."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import projects
from tests.mounting import Mounted
from tests.mounts import fuse_missing, unmount_under
from tests.projects import Project
from tests.servers import Seaweed, seaweedfs

# Not a whole number of 1 MiB chunks, and well over what eviction keeps (64 KiB).
WEIGHTS_BYTES = 2_300_017
FOREIGN = ("RUNFS_MOUNT", "RUNFS_CONFIG", "MACHINABLE_INDEX", "NOTIFY_SOCKET", "WATCHDOG_USEC")
FAILED = pytest.StashKey[bool]()


def in_ci() -> bool:
    """CI machines must run everything: there, what cannot run is a failure."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("mounted") is None:
        return
    reason = fuse_missing()
    if reason is not None and in_ci():
        pytest.fail(f"{reason}; with CI=1 tests that mount must run", pytrace=False)
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session", autouse=True)
def _no_mount_stays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """However a test ended, nothing stays mounted under this session's directory."""
    yield
    unmount_under(tmp_path_factory.getbasetemp().resolve())


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the state, cache, configuration or credentials of the person who runs it."""
    for name in [*FOREIGN, *(each for each in os.environ if each.startswith("AWS_"))]:
        monkeypatch.delenv(name, raising=False)
    for name, short in (("STATE", "s"), ("CACHE", "c"), ("RUNTIME", "r")):  # a socket's path is at most 107 bytes
        monkeypatch.setenv(f"RUNFS_{name}_DIR", str(tmp_path / short))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def _templates() -> dict[object, Project]:
    return {}


@pytest.fixture
def make_project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, _templates: dict[object, Project]
) -> Callable[..., Project]:
    """Makes projects: `make_project(name, runs=3, size=bytes of weights.npy, report=True)`."""

    def make(name: str = "project", *, runs: int = 3, size: int = WEIGHTS_BYTES, report: bool = True) -> Project:
        key = (runs, size, report)
        if key not in _templates:
            configs: list[dict[str, object]] = [
                {"lr": round(0.1 * (number + 1), 3), "size": size, "seed": number + 1} for number in range(runs)
            ]
            place = tmp_path_factory.mktemp("template") / "project"
            _templates[key] = projects.create(place, configs, report=report)
        return projects.copy(_templates[key], tmp_path / name)

    return make


@pytest.fixture
def project(make_project: Callable[..., Project]) -> Project:
    """A project of three runs of `mymodel` and one `report` that uses the first."""
    return make_project()


@pytest.fixture
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Mounted]]:
    """Mounts projects: `mount(project, stores=[url], options=[...])`. Unmounts, and prints the log of a failed test."""
    mounted: list[Mounted] = []

    def start(project: Project, name: str = "mnt", **options: Any) -> Mounted:
        each = Mounted(project, tmp_path / name, **options)
        mounted.append(each)
        each.start()
        return each

    yield start
    for each in reversed(mounted):
        each.stop()
        if request.node.stash.get(FAILED, False):
            each.print_log()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One real S3 server for the whole session; use a prefix of your own in it."""
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        yield server
