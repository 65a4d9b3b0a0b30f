"""The fixtures themselves: a copied project is one that machinable takes for its own."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.projects import Project

READ_BACK = """
import json, sys
from machinable import get
run = get("mymodel", {"lr": 0.2, "size": int(sys.argv[1]), "seed": 2}).launch()
print(run.uuid, run.local_directory(), run.load_file("metrics.json")["loss"])
"""


def test_machinable_finds_the_finished_runs_of_a_copy(make_project: Callable[..., Project]) -> None:
    project = make_project(size=70_000)
    before = set(project.rows())
    uuid, directory, loss = project.run(READ_BACK, "70000").stdout.split()
    assert uuid == project.runs[1]  # found, not run again
    assert set(project.rows()) == before
    assert Path(directory) == project.directory(uuid)
    assert Path(directory).is_relative_to(project.path)
    assert loss == "0.4"


def test_a_project_holds_what_tests_count_on(project: Project) -> None:
    assert len(project.runs) == 4
    first = project.directory(project.runs[0])
    assert (first / "weights.npy").stat().st_size == 2_300_017 + 128  # the .npy header
    assert (first / "notes" / "by step" / "2.txt").read_text() == "step 2, lr 0.1\n"
    assert [project.rows()[each]["kind"] for each in project.executions(project.runs[0])] == ["Execution"]
    assert (project.directory(project.runs[3]) / "related" / "metadata.jsonl").exists()


def test_two_projects_of_one_test_are_independent(make_project: Callable[..., Project]) -> None:
    one, two = make_project("one", size=1000), make_project("two", size=1000)
    new = two.launch(lr=0.9, size=10)
    assert new in two.rows()
    assert new not in one.rows()
    assert two.directory(new).is_relative_to(two.path)


def test_the_persons_own_places_are_out_of_reach(tmp_path: Path) -> None:
    for name in ("RUNFS_STATE_DIR", "RUNFS_CACHE_DIR", "RUNFS_RUNTIME_DIR"):
        assert Path(os.environ[name]).is_relative_to(tmp_path)
    assert "RUNFS_MOUNT" not in os.environ
