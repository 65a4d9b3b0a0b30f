"""An index of a hundred thousand records, mounted: listings are complete and start at once, memory stays bounded, and
nothing looks at every record before the mount answers.

The rows are copies of a real one; their directories are there and hold little. Making them takes about 10 s.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import projects
from tests.mounted.records import ask
from tests.mounting import Mounted
from tests.mounts import fuse_missing
from tests.projects import Project

pytestmark = pytest.mark.mounted
COUNT = 100_000
MEMORY = 150 << 20  # bytes the daemon may grow by
LISTED_S = 60.0  # for all of them, on a slow shared machine


def name_of(number: int) -> str:
    return f"m{number:011}"


def grow(project: Project, count: int) -> None:
    """Add so many records: copies of the project's first row, in one transaction, each with a directory."""
    template = project.runs[0]
    source = project.directory(template)
    storage = project.path / "many"
    header = json.loads((source / "id.json").read_text())
    for number in range(count):
        directory = os.path.join(storage, f"{number // 1000:03}", name_of(number))
        if number % 1000 == 0:
            os.makedirs(os.path.dirname(directory))
        os.mkdir(directory)
    for number in (0, count // 2):  # these are looked into
        directory = os.path.join(storage, f"{number // 1000:03}", name_of(number))
        shutil.copytree(source, directory, dirs_exist_ok=True)
        Path(directory, "id.json").write_text(json.dumps({**header, "uuid": name_of(number)}))
    insert(project, range(count), storage)


def insert(project: Project, numbers: range, storage: Path, *, shared: bool = False) -> None:
    """Copies of the project's first row, made by SQLite itself: a million in seconds. `shared`: a thousand rows each
    name one directory, for when making so many would take longer than everything else."""
    connection = sqlite3.connect(project.index)
    columns = [row[1] for row in connection.execute('PRAGMA table_info("index")')]
    own = {
        "record_id": "printf('m%011d', i)",
        "storage_uri": "'file://' || :storage || printf('/%03d', i / 1000)"
        + ("" if shared else " || printf('/m%011d', i)"),
        "local_uri": "NULL",
        "label": "printf('batch%d', i % 7)",
        "predicate_key": "printf('%032d', i)",
    }
    count = "WITH RECURSIVE n(i) AS (SELECT :start UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :stop)"
    values = ", ".join(own.get(column, f'"{column}"') for column in columns)
    bound = {"start": numbers.start, "stop": numbers.stop, "storage": str(storage), "template": project.runs[0]}
    with connection:
        connection.execute(
            f'INSERT INTO "index" {count} SELECT {values} FROM n, "index" AS t WHERE t.record_id = :template', bound
        )
    connection.close()


class Many:
    def __init__(self, place: Path) -> None:
        self.project = projects.create(place / "project", [{"size": 1000}], report=False)
        grow(self.project, COUNT)
        environment = {f"RUNFS_{name}_DIR": str(place / name[0].lower()) for name in ("STATE", "CACHE", "RUNTIME")}
        environment["XDG_CONFIG_HOME"] = str(place / "config")
        self.mounted = Mounted(self.project, place / "mnt", environment=environment)

    def memory(self) -> int:
        """Bytes of memory that the daemon holds."""
        lines = Path(f"/proc/{self.mounted.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    if fuse_missing() is not None:
        pytest.skip("nothing can be mounted here")
    made = Many(tmp_path_factory.mktemp("many"))
    began = time.monotonic()
    with made.mounted:
        assert time.monotonic() - began < 15  # a second on a quiet machine: no record is looked at before it answers
        yield made
    assert "Traceback" not in made.mounted.log()


FIRST = """
import itertools, os, sys, time
began = time.monotonic()
with os.scandir(sys.argv[1]) as entries:
    names = [entry.name for entry in itertools.islice(entries, 1000)]
print(time.monotonic() - began, len(set(names)))
"""
ADD = """
import sys
from pathlib import Path
from tests.mounted.test_scale import insert
from tests.projects import Project
project = Project(Path(sys.argv[1]), [sys.argv[2]])
for number in range(200_000, 201_000, 50):
    insert(project, range(number, number + 50), project.path / "many")
"""


def test_a_listing_starts_at_once(many: Many) -> None:
    done = many.mounted.bounded([sys.executable, "-c", FIRST, str(many.mounted.path)], LISTED_S)
    seconds, count = done.stdout.split()
    assert int(count) == 1000
    assert float(seconds) < 3  # not after all of them were collected, which takes some 15 s


def test_ls_f_lists_each_once_while_records_are_added(many: Many) -> None:
    before = many.memory()
    command = [sys.executable, "-c", ADD, str(many.project.path), many.project.runs[0]]
    with subprocess.Popen(command, env=many.mounted.environment) as adding:
        done = many.mounted.bounded(["ls", "-f", str(many.mounted.path)], LISTED_S)
        assert adding.wait(LISTED_S) == 0
    names = done.stdout.split()
    assert len(names) == len(set(names))
    assert {name_of(number) for number in range(COUNT)} <= set(names)
    assert many.memory() - before < MEMORY


def test_a_record_is_found_by_its_name(many: Many) -> None:
    middle = many.mounted.path / name_of(COUNT // 2)
    assert json.loads((middle / "id.json").read_text())["uuid"] == name_of(COUNT // 2)
    assert (many.mounted.path / name_of(COUNT - 1)).is_dir()
    assert not (many.mounted.path / name_of(10**9)).exists()


def test_status_and_ls(many: Many) -> None:
    before = many.memory()
    status = ask(many.mounted, "status")
    assert status["records"] >= COUNT
    found = ask(many.mounted, "ls", where="label=batch3 and kind=Interface")["records"]
    assert len({each["uuid"] for each in found}) == len(found) >= COUNT // 7
    (one,) = many.mounted.json("ls", name_of(COUNT // 2))["records"]
    assert one["label"] == f"batch{COUNT // 2 % 7}"
    assert many.memory() - before < MEMORY


def test_changes_are_noticed(many: Many) -> None:
    """A record that is added shows within seconds, however many there are."""
    insert(many.project, range(300_000, 300_001), many.project.path / "many")
    (many.project.path / "many" / "300" / name_of(300_000)).mkdir(parents=True)
    end = time.monotonic() + 10
    while not (many.mounted.path / name_of(300_000)).is_dir():
        assert time.monotonic() < end
        time.sleep(0.05)
