"""The real machinable 5.1, in processes of its own, on a real mount: before, during and after eviction.

Every test uses runs of its own in one shared project and mount (`lab`), and leaves it mounted. The body of a run adds a
line to `ran.txt` in the project, so that a run that ran again shows.
"""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FOREIGN
from tests.mounting import Mounted
from tests.mounts import is_fuse_mount
from tests.projects import Project

pytestmark = pytest.mark.mounted

WEIGHTS = 1_300_017  # bytes: two chunks, and well over what eviction keeps (64 KiB)
SECOND = 1.0  # what others change in the index is seen within this time

MODULE = f"""
import json, os, random, time
from machinable import Interface
from pydantic import BaseModel


class Train(Interface):
    class Config(BaseModel):
        lr: float = 0.1
        hold: str = ""  # go on only when this file is there

    def __call__(self):
        with open("ran.txt", "a") as ran:
            ran.write(f"{{self.config.lr}}\\n")
        self.save_file("metrics.json", {{"loss": self.config.lr * 2}})
        with open(self.local_directory("weights.bin"), "wb") as weights:
            weights.write(random.Random(self.config.lr).randbytes({WEIGHTS}))
        for step in range(100):
            print("step", step, "of", self.config.lr, "." * 900)
        while self.config.hold and not os.path.exists(self.config.hold):
            time.sleep(0.02)
"""

PRELUDE = """
import hashlib, json, os, sys
from machinable import Execution, Index, Interface, Project, Storage, get
from machinable.api.models import FindRequest
asked = json.loads(sys.argv[1])
def digest(run, name):
    with open(run.local_directory(name), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
def tell(**told):
    print("\\n" + json.dumps(told), flush=True)
"""

LAUNCH = "tell(uuids=[get('train', config).launch().uuid for config in asked])"

LOOK = """
run = get("train", asked)
run.launch()
tell(uuid=run.uuid, cached=run.cached(), metrics=run.load_file("metrics.json"), weights=digest(run, "weights.bin"),
     executions=[each.uuid for each in run.executions], finished=[each.is_finished() for each in run.executions],
     output=[len(each.output() or "") for each in run.executions],
     hosts=[bool(each.host_info) for each in run.executions])
"""


@dataclass
class Lab:
    """A project, its mount and its one store."""

    project: Project
    mounted: Mounted
    store: Path
    ready: list[str] = field(default_factory=list)  # finished runs that no test has used yet

    @property
    def mnt(self) -> Path:
        return self.mounted.path

    def ask(self, code: str, asked: object = None) -> dict[str, Any]:
        """Run code in a new machinable process; what it `tell`s last."""
        return last(self.project.run(PRELUDE + code, json.dumps(asked)).stdout)

    def fresh(self) -> str:
        """A finished run that nothing has been done with."""
        return self.ready.pop()

    def config(self, uuid: str) -> dict[str, Any]:
        resolved: dict[str, Any] = json.loads(self.project.rows()[uuid]["config_resolved_json"])
        return resolved

    def look(self, uuid: str) -> dict[str, Any]:
        """Get and launch this finished run in a new process."""
        return self.ask(LOOK, self.config(uuid))

    def evict(self, *uuids: str) -> None:
        answer = self.mounted.json("evict", *uuids)
        assert {each["uuid"] for each in answer["evicted"]} == set(uuids)
        assert all(self.project.directory(uuid).is_symlink() for uuid in uuids)

    def fresh_evicted(self) -> str:
        uuid = self.fresh()
        self.evict(uuid)
        return uuid

    def ran(self) -> list[str]:
        return (self.project.path / "ran.txt").read_text().splitlines()

    def stored(self, uuid: str) -> dict[str, dict[str, Any]]:
        """The files the store's manifest of this record lists, by path."""
        manifest = json.loads((self.store / ".runfs" / uuid / "manifest.json").read_text())
        return {file["path"]: file for file in manifest["files"]}

    def stored_bytes(self, uuid: str, path: str) -> bytes:
        key: str = self.stored(uuid)[path]["key"]
        return (self.store / key).read_bytes()

    def sql(self, statement: str, *values: object) -> None:
        """Change the index behind everybody's back."""
        connection = sqlite3.connect(self.project.index)
        try:
            with connection:
                connection.execute(statement, values)
        finally:
            connection.close()


def last(output: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def soon(check: Callable[[], object], limit_s: float = SECOND) -> None:
    """Wait until something is so; fails when it is not within the limit (and a little for this machine's noise)."""
    end = time.monotonic() + limit_s + 0.5
    while not (found := check()):
        assert time.monotonic() < end, f"not within {limit_s} s: {found!r}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def _lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    base = tmp_path_factory.mktemp("m")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        places = {f"RUNFS_{name}_DIR": str(base / name[0]) for name in ("STATE", "CACHE", "RUNTIME")}
        for name, place in {**places, "XDG_CONFIG_HOME": str(base / "config")}.items():
            patch.setenv(name, place)
        project = Project(base / "project")
        project.path.mkdir()
        (project.path / "train.py").write_text(MODULE)
        store = base / "store"
        store.mkdir()
        mounted = Mounted(project, base / "mnt", stores=[f"file://{store}"])
        lab = Lab(project, mounted, store)
        lab.ready = lab.ask(LAUNCH, [{"lr": number / 100} for number in range(1, 27)])["uuids"]
        with mounted:
            yield lab
        assert not is_fuse_mount(mounted.path)


@pytest.fixture
def lab(_lab: Lab) -> Lab:
    """The shared project, mounted, whatever the test before has left."""
    mounted_again(_lab)
    return _lab


@pytest.fixture
def down(lab: Lab) -> Iterator[Callable[[], None]]:
    """Takes the mount down for the rest of the test; it is up again afterwards."""

    def umount() -> None:
        done = lab.mounted.umount()
        assert done.returncode == 0, done.stdout + done.stderr

    yield umount
    mounted_again(lab)


def mounted_again(lab: Lab) -> None:
    if not is_fuse_mount(lab.mnt):
        lab.mounted.kill()
        lab.mounted.start()


# --- an evicted run ------------------------------------------------------------------------------------------------


def test_evicted_run_is_found_and_not_run_again(lab: Lab) -> None:
    uuid = lab.fresh()
    weights = sha(lab.project.directory(uuid) / "weights.bin")
    executions = lab.project.executions(uuid)
    lab.evict(uuid)
    ran = lab.ran()
    told = lab.look(uuid)
    assert told["uuid"] == uuid
    assert told["cached"] is True
    assert lab.ran() == ran
    assert told["metrics"] == {"loss": lab.config(uuid)["lr"] * 2}
    assert told["weights"] == weights
    assert told["executions"] == executions
    assert told["finished"] == [True]
    assert told["hosts"] == [True]
    assert told["output"][0] > 65536  # it was not among what is kept
    assert lab.project.directory(uuid).is_symlink()


def test_file_saved_to_an_evicted_run_is_kept_and_pushed(lab: Lab) -> None:
    uuid = lab.fresh_evicted()
    lab.ask("run = get('train', asked); run.save_file('note.json', {'seen': [1, 2]}); tell()", lab.config(uuid))
    assert json.loads((lab.mnt / uuid / "note.json").read_text()) == {"seen": [1, 2]}
    lab.mounted.json("push", uuid)
    assert json.loads(lab.stored_bytes(uuid, "note.json")) == {"seen": [1, 2]}
    assert lab.project.directory(uuid).is_symlink()
    lab.mounted.json("safe", uuid)


def test_object_loaded_before_the_eviction_reads_and_saves_after_it(lab: Lab) -> None:
    uuid = lab.fresh()
    weights = sha(lab.project.directory(uuid) / "weights.bin")
    code = """
run = get("train", asked)
run.load_file("metrics.json")
print("loaded", flush=True)
sys.stdin.readline()
run.save_file("late.json", {"after": True})
tell(metrics=run.load_file("metrics.json"), late=run.load_file("late.json"), weights=digest(run, "weights.bin"),
     place=run.local_directory(), finished=run.execution.is_finished())
"""
    with machinable(lab, code, lab.config(uuid)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        lab.evict(uuid)
        output, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, errors
    told = last(output)
    assert told["metrics"] == {"loss": lab.config(uuid)["lr"] * 2}
    assert told["weights"] == weights
    assert told["late"] == {"after": True}
    assert told["finished"] is True
    assert told["place"] == str(lab.project.directory(uuid))
    lab.mounted.json("push", uuid)
    assert json.loads(lab.stored_bytes(uuid, "late.json")) == {"after": True}


def machinable(lab: Lab, code: str, asked: object) -> "subprocess.Popen[str]":
    """A machinable process that runs beside the test."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, json.dumps(asked)],
        cwd=lab.project.path,
        env={**os.environ, "PYTHONPATH": str(lab.project.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- executions ----------------------------------------------------------------------------------------------------


def test_new_execution_under_an_evicted_run_lands_in_it(lab: Lab) -> None:
    uuid = lab.fresh_evicted()
    before = lab.project.executions(uuid)
    ran = lab.ran()
    lab.ask("run = get('train', asked); run.cached(False); run.launch(); tell()", lab.config(uuid))
    assert len(lab.ran()) == len(ran) + 1  # asked for
    (execution,) = set(lab.project.executions(uuid)) - set(before)
    place = lab.project.directory(execution)
    assert lab.project.directory(uuid).is_symlink()
    assert place.is_relative_to(lab.project.directory(uuid))
    inside = place.relative_to(lab.project.directory(uuid))
    assert (lab.mnt / uuid / inside / "finished_at").exists()
    soon(lambda: execution in os.listdir(lab.mnt))
    assert os.readlink(lab.mnt / execution) == f"{uuid}/{inside}"
    assert (lab.mnt / execution / "output.log").stat().st_size > 65536
    assert set(lab.look(uuid)["executions"]) == {*before, execution}
    lab.mounted.json("push", uuid)
    assert f"{inside}/output.log" in lab.stored(uuid)
    rows = json.loads((lab.store / ".runfs" / uuid / "manifest.json").read_text())["rows"]
    assert execution in {row["record_id"] for row in rows}
    lab.evict(uuid)
    assert lab.stored(uuid).keys() >= {f"{inside}/.machinable", f"{inside}/id.json"}


def test_run_that_stopped_half_way_is_evicted_and_resumed_in_its_place(lab: Lab) -> None:
    """An execution that was killed is not live; machinable goes on with the same record, header rewritten and all."""
    go_on = lab.project.path / "resume"
    config = {"lr": 51.0, "hold": str(go_on)}
    with machinable(lab, "get('train', asked).launch()", config) as process:
        soon(lambda: rows_with(lab, config) and live_marker(lab, config), 30)
        process.kill()
    uuid = rows_with(lab, config)[0]
    (execution,) = lab.project.executions(uuid)
    (lab.project.directory(execution) / "heartbeat_at").write_text("2020-01-01T00:00:00+00:00")
    lab.evict(uuid)
    header = (lab.mnt / execution / "id.json").read_bytes()
    go_on.touch()
    told = lab.ask(LOOK, config)
    assert told["uuid"] == uuid
    assert told["executions"] == [execution]
    assert told["finished"] == [True]
    assert (lab.mnt / execution / "id.json").read_bytes() == header
    assert (lab.mnt / execution / "resumed_at").exists()


def rows_with(lab: Lab, config: dict[str, Any]) -> list[str]:
    return [
        uuid
        for uuid, row in lab.project.rows().items()
        if row["kind"] == "Interface" and json.loads(row["config_resolved_json"]) == config
    ]


def live_marker(lab: Lab, config: dict[str, Any]) -> bool:
    executions = lab.project.executions(rows_with(lab, config)[0])
    return any((lab.project.directory(each) / "heartbeat_at").exists() for each in executions)


def test_live_run_is_never_evicted(lab: Lab) -> None:
    """A root record whose nested execution is live, and a live record of its own; both when finished."""
    release = lab.project.path / "release"
    config = {"lr": 52.0, "hold": str(release)}
    alone = lab.ask("""
run = Execution().materialize()
run.update_status("started")
run.update_status("heartbeat")
tell(uuid=run.uuid)
""")["uuid"]
    with machinable(lab, "get('train', asked).launch()", config) as process:
        try:
            soon(lambda: rows_with(lab, config) and live_marker(lab, config), 30)
            uuid = rows_with(lab, config)[0]
            (execution,) = lab.project.executions(uuid)
            answer = lab.mounted.json("evict", uuid, alone, exit_code=1)
            assert answer["evicted"] == []
            reasons = {each["uuid"]: each["reason"] for each in answer["stay"]}
            assert reasons == {uuid: f"live ({execution})", alone: "live"}
            answer = lab.mounted.json("evict", "--all")
            assert {uuid, alone}.isdisjoint(each["uuid"] for each in answer["evicted"])
            assert {uuid, alone} <= {each["uuid"] for each in answer["stay"]}
            assert not lab.project.directory(uuid).is_symlink()
            assert not lab.project.directory(alone).is_symlink()
            lab.mounted.json("hydrate", "--restore", *lab.ready)  # for the tests after this one
        finally:
            release.touch()
            _output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lab.ask("Interface.find_by_id(asked).update_status('finished'); tell()", alone)
    lab.evict(uuid, alone)
    assert lab.look(uuid)["finished"] == [True]


# --- the mount is down ---------------------------------------------------------------------------------------------


def test_launch_fails_loudly_while_the_mount_is_down(lab: Lab, down: Callable[[], None]) -> None:
    uuid = lab.fresh_evicted()
    weights = lab.look(uuid)["weights"]
    ran, records = lab.ran(), set(lab.project.rows())
    down()
    failed = lab.project.run(PRELUDE + LOOK, json.dumps(lab.config(uuid)), check=False)
    assert failed.returncode != 0
    assert "Error" in failed.stderr
    assert lab.ran() == ran
    lab.mounted.start()
    told = lab.look(uuid)
    assert (told["uuid"], told["weights"]) == (uuid, weights)
    assert lab.ran() == ran
    assert set(lab.project.rows()) == records


# --- machinable rebuilds its index ---------------------------------------------------------------------------------

MIGRATE = "Index.get().find(FindRequest()); tell()"


def test_rows_of_evicted_records_are_back_after_a_schema_bump(lab: Lab) -> None:
    uuid, resident = lab.fresh_evicted(), lab.fresh()
    header = (lab.mnt / uuid / "id.json").read_bytes()
    before, ran = lab.project.rows(), lab.ran()
    lab.sql("PRAGMA user_version = 10")
    lab.ask(MIGRATE)
    assert resident in lab.project.rows()  # it was rebuilt
    soon(lambda: {uuid, *lab.project.executions(uuid)} <= set(lab.project.rows()))
    assert {each: row["kind"] for each, row in before.items() if each not in lab.project.rows()} == {}
    assert lab.project.rows()[uuid] == before[uuid]
    assert lab.look(uuid)["uuid"] == uuid
    assert len(lab.look(uuid)["executions"]) == 1
    assert lab.ran() == ran
    assert (lab.mnt / uuid / "id.json").read_bytes() == header


def test_process_that_rebuilds_the_index_does_not_overwrite_an_evicted_run(lab: Lab) -> None:
    """It asks for the run in the moment in which its row is gone; the row's return comes too late for it."""
    uuid = lab.fresh_evicted()
    before = {name: (lab.mnt / uuid / name).read_bytes() for name in ("id.json", "model.json", ".machinable")}
    config, ran = lab.config(uuid), lab.ran()
    lab.sql("PRAGMA user_version = 10")
    lab.project.run(PRELUDE + LOOK, json.dumps(config), check=False)
    assert {name: (lab.mnt / uuid / name).read_bytes() for name in before} == before
    assert lab.ran() == ran
    soon(lambda: uuid in lab.project.rows())
    told = lab.ask(LOOK, config)
    assert told["uuid"] == uuid
    assert len(told["executions"]) == 1
    assert lab.ran() == ran


def test_evicted_run_is_readable_while_the_index_has_no_tables(lab: Lab) -> None:
    """What machinable's rebuild goes through; others have the run loaded and know nothing of it."""
    uuid = lab.fresh()
    directory, config = lab.project.directory(uuid), lab.config(uuid)
    weights = sha(directory / "weights.bin")
    lab.evict(uuid)
    for statement in ('DROP TABLE "index"', "DROP TABLE relations", "PRAGMA user_version = 10"):
        lab.sql(statement)
    time.sleep(SECOND / 2)
    assert json.loads((directory / "metrics.json").read_text()) == {"loss": config["lr"] * 2}
    assert sha(directory / "weights.bin") == weights
    (directory / "meanwhile.txt").write_text("kept\n")
    lab.ask(MIGRATE)
    soon(lambda: uuid in lab.project.rows())
    assert lab.ask(LOOK, config)["uuid"] == uuid
    lab.mounted.json("push", uuid)
    assert lab.stored_bytes(uuid, "meanwhile.txt") == b"kept\n"
    rows = json.loads((lab.store / ".runfs" / uuid / "manifest.json").read_text())["rows"]
    assert {row["record_id"] for row in rows} == {uuid, *lab.project.executions(uuid)}


def test_run_whose_row_is_lost_is_not_overwritten(lab: Lab, down: Callable[[], None]) -> None:
    """As above with the race lost for certain. machinable leaves a row of a run that never was, for the same place."""
    uuid = lab.fresh_evicted()
    config, ran, before = lab.config(uuid), lab.ran(), snapshot(lab.mnt / uuid)
    lab.sql('DELETE FROM "index" WHERE record_id = ?', uuid)
    failed = lab.project.run(PRELUDE + LOOK, json.dumps(config), check=False)
    assert failed.returncode != 0
    assert "PermissionError" in failed.stderr
    assert lab.ran() == ran
    (stray,) = [each for each, row in lab.project.rows().items() if json.loads(row["config_resolved_json"]) == config]
    assert stray != uuid
    lab.mounted.json("reindex")
    assert snapshot(lab.mnt / uuid) == before
    told = lab.ask(LOOK, config)
    assert told["uuid"] == uuid
    assert len(told["executions"]) == 1
    assert lab.ran() == ran
    named = [check for check in lab.mounted.json("doctor", exit_code=1)["checks"] if check["ok"] is False]
    assert [check["message"].partition(":")[0] for check in named] == [stray]
    assert f"hide({stray!r})" in named[0]["message"]
    end = time.monotonic() + 20
    while unsafe := lab.mounted.json("safe", exit_code=None)["unsafe"]:  # what holds nothing is no danger
        assert time.monotonic() < end, unsafe
    lab.ask("Index.get().hide(asked); tell()", stray)
    assert not [check for check in lab.mounted.json("doctor")["checks"] if check["ok"] is False]
    down()  # succeeds: nothing is left to be pushed


def test_rows_are_back_when_the_index_was_rebuilt_while_not_mounted(lab: Lab, down: Callable[[], None]) -> None:
    uuid = lab.fresh_evicted()
    header = (lab.mnt / uuid / "id.json").read_bytes()
    before, config, ran = lab.project.rows()[uuid], lab.config(uuid), lab.ran()
    down()
    lab.sql("PRAGMA user_version = 10")
    failed = lab.project.run(PRELUDE + LOOK, json.dumps(config), check=False)
    assert failed.returncode != 0
    assert uuid not in lab.project.rows()
    lab.mounted.start()
    assert lab.project.rows()[uuid] == before
    told = lab.ask(LOOK, config)
    assert told["uuid"] == uuid
    assert len(told["executions"]) == 1
    assert lab.ran() == ran
    assert (lab.mnt / uuid / "id.json").read_bytes() == header


# --- the index -----------------------------------------------------------------------------------------------------


def test_listing_follows_the_index_within_a_second(lab: Lab) -> None:
    uuid = lab.ask(LAUNCH, [{"lr": 61.0}])["uuids"][0]
    soon(lambda: uuid in os.listdir(lab.mnt))
    (execution,) = lab.project.executions(uuid)
    place = lab.project.directory(execution).relative_to(lab.project.directory(uuid))
    assert os.readlink(lab.mnt / execution) == f"{uuid}/{place}"
    assert (lab.mnt / execution / "finished_at").samefile(lab.mnt / uuid / place / "finished_at")
    lab.ask("Interface.find_by_id(asked).hidden(True); tell()", uuid)
    soon(lambda: uuid not in os.listdir(lab.mnt))
    assert (lab.mnt / uuid / "metrics.json").exists()
    assert lab.mounted.runfs("status", str(lab.mnt / uuid)).returncode == 0
    lab.ask("Interface.find_by_id(asked).hidden(False); tell()", uuid)
    soon(lambda: uuid in os.listdir(lab.mnt))
    lab.sql('DELETE FROM "index" WHERE record_id = ?', execution)
    soon(lambda: execution not in os.listdir(lab.mnt))
    soon(lambda: not os.path.lexists(lab.mnt / execution))


def test_project_row_is_never_listed(lab: Lab) -> None:
    told = lab.ask("""
with Project(os.getcwd()):
    run = get("train", {"lr": 62.0}).launch()
    tell(uuid=run.uuid)
""")
    rows = lab.project.rows()
    (project,) = [uuid for uuid, row in rows.items() if row["kind"] == "Project"]
    assert rows[told["uuid"]]["parent_id"] == project
    soon(lambda: told["uuid"] in os.listdir(lab.mnt))
    assert not (lab.mnt / told["uuid"]).is_symlink()  # it is a root record, though it has a parent
    assert project not in os.listdir(lab.mnt)
    assert not os.path.lexists(lab.mnt / project)
    lab.evict(told["uuid"])
    ran = lab.ran()
    again = lab.ask("""
with Project(os.getcwd()):
    run = get("train", {"lr": 62.0}).launch()
    tell(uuid=run.uuid, weights=digest(run, "weights.bin"))
""")
    assert again["uuid"] == told["uuid"]
    assert lab.ran() == ran


# --- written straight into a record's directory --------------------------------------------------------------------


def test_what_is_written_past_the_mount_is_shown_at_once(lab: Lab) -> None:
    uuid = lab.fresh()
    directory, shown = lab.project.directory(uuid), lab.mnt / uuid
    (directory / "log.txt").write_text("one\n")
    assert (shown / "log.txt").read_text() == "one\n"
    for turn in range(20):
        text = f"turn {turn}\n" * (turn + 1)
        (directory / "log.txt").write_text(text)
        assert (shown / "log.txt").stat().st_size == len(text), turn
        assert (shown / "log.txt").read_text() == text, turn
        same = f"TURN {turn}\n" * (turn + 1)  # of the same length
        (directory / "log.txt").write_text(same)
        assert (shown / "log.txt").read_text() == same, turn
        (directory / f"new {turn}").mkdir()
        assert (shown / f"new {turn}").is_dir(), turn
        (directory / f"new {turn}").rename(directory / f"old {turn}")
        assert not (shown / f"new {turn}").exists(), turn
        assert f"old {turn}" in os.listdir(shown), turn
        time.sleep(0.01 * turn)
    (directory / "log.txt").unlink()
    assert not (shown / "log.txt").exists()


def test_open_file_shows_what_is_appended_past_the_mount(lab: Lab) -> None:
    """As `tail -f` of a live run does."""
    uuid = lab.fresh()
    directory = lab.project.directory(uuid)
    (directory / "tail.txt").write_text("0\n")
    with (lab.mnt / uuid / "tail.txt").open() as reader:
        assert reader.read() == "0\n"
        for turn in range(1, 10):
            with (directory / "tail.txt").open("a") as writer:
                writer.write(f"{turn}\n")
            assert reader.read() == f"{turn}\n"
            time.sleep(0.03)


def test_what_is_written_past_the_mount_is_pushed(lab: Lab) -> None:
    uuid = lab.fresh()
    soon(lambda: lab.mounted.runfs("safe", uuid).returncode == 0, 20)
    (lab.mnt / uuid / "metrics.json").read_text()
    lab.ask("run = get('train', asked); run.save_file('extra.json', {'a': 1}); tell()", lab.config(uuid))
    assert json.loads((lab.mnt / uuid / "extra.json").read_text()) == {"a": 1}
    soon(lambda: "extra.json" in lab.stored(uuid), 10)
    assert json.loads(lab.stored_bytes(uuid, "extra.json")) == {"a": 1}
    soon(lambda: lab.mounted.runfs("safe", uuid).returncode == 0, 10)
    lab.evict(uuid)
    assert json.loads((lab.mnt / uuid / "extra.json").read_text()) == {"a": 1}


def test_what_a_script_writes_without_machinable_counts_as_unsafe_and_is_pushed(lab: Lab) -> None:
    """No row changes: only the watch, and the look that `safe` takes itself, can tell."""
    uuid = lab.fresh()
    lab.mounted.json("push", uuid)
    (lab.project.directory(uuid) / "weights.bin").write_bytes(b"other weights")
    answer = lab.mounted.json("safe", uuid, exit_code=None)
    assert answer["safe"] is False or lab.stored_bytes(uuid, "weights.bin") == b"other weights"
    soon(lambda: lab.mounted.runfs("safe", uuid).returncode == 0, 10)
    assert lab.stored_bytes(uuid, "weights.bin") == b"other weights"


# --- restore -------------------------------------------------------------------------------------------------------


def make_odd_tree(directory: Path) -> None:
    """Everything a directory can hold that is easily lost."""
    odd = directory / "odd"
    odd.mkdir()
    (odd / "empty" / "below").mkdir(parents=True)
    (odd / "script.sh").write_text("#!/bin/sh\n")
    (odd / "script.sh").chmod(0o751)
    (odd / "secret").write_bytes(os.urandom(200_000))
    (odd / "secret").chmod(0o600)
    (odd / "read only").write_bytes(os.urandom(70_000))
    (odd / "read only").chmod(0o444)
    os.utime(odd / "read only", ns=(1_000_000_001, 1_234_567_890_123_456_789))
    (odd / "nothing").touch()
    os.symlink("script.sh", odd / "link")
    os.symlink("../../nowhere at all", odd / "dangling")
    os.symlink("/etc/hostname", odd / "absolute")
    os.link(odd / "secret", odd / "also secret")
    os.link(odd / "script.sh", odd / "empty" / "hard")
    Path(os.fsdecode(os.fsencode(odd) + b"/caf\xe9 \xff\n%41")).write_bytes(os.urandom(100_000))
    (odd / "größe ∂").write_text("unicode\n")
    (odd / ("n" * 255)).write_text("long\n")
    with (odd / "sparse").open("wb") as sparse:
        sparse.truncate(3_000_000)
        sparse.seek(2_500_000)
        sparse.write(b"end of a hole")
    os.utime(odd / "link", ns=(5, 1_111_111_111_000_000_007), follow_symlinks=False)
    (odd / "empty").chmod(0o2755)
    os.utime(odd / "empty", ns=(7, 1_000_000_000_000_000_003))
    os.utime(odd, ns=(7, 1_010_000_000_000_000_009))


def snapshot(directory: Path) -> dict[bytes, tuple[object, ...]]:
    """Every path with type, mode, owner, times, links and content; hard links as the first path of the same file."""
    found: dict[bytes, tuple[object, ...]] = {}
    first: dict[int, bytes] = {}
    root = os.fsencode(directory)
    for parent, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = os.path.join(parent, name)
            inside, status = os.path.relpath(path, root), os.lstat(path)
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            found[inside] = (
                status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, content,
                status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
            )  # fmt: skip
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                found[inside] += (first.setdefault(status.st_ino, inside),)
    return found


def test_restored_directory_is_what_it_was(lab: Lab, down: Callable[[], None]) -> None:
    uuid = lab.fresh()
    directory = lab.project.directory(uuid)
    make_odd_tree(directory)
    before, own = snapshot(directory), directory.stat()
    lab.evict(uuid)
    assert snapshot(lab.mnt / uuid) == before
    answer = lab.mounted.json("hydrate", "--restore", uuid)
    assert [each["uuid"] for each in answer["hydrated"]] == [uuid]
    assert not directory.is_symlink()
    assert snapshot(directory) == before
    after = directory.stat()
    assert (after.st_mode, after.st_mtime_ns) == (own.st_mode, own.st_mtime_ns)
    assert snapshot(lab.mnt / uuid) == before
    assert not list(directory.parent.glob(".runfs*"))
    down()
    ran = lab.ran()
    assert snapshot(directory) == before
    assert lab.look(uuid)["uuid"] == uuid
    assert lab.ran() == ran
    lab.mounted.start()
    lab.evict(uuid)
    now = snapshot(lab.mnt / uuid)
    assert {path: now[path] for path in before if path.startswith(b"odd")} == {
        path: before[path] for path in before if path.startswith(b"odd")
    }


# --- reindex -------------------------------------------------------------------------------------------------------


def test_machinables_reindex_leaves_evicted_records_alone(lab: Lab) -> None:
    uuid = lab.fresh_evicted()
    (execution,) = lab.project.executions(uuid)
    before = lab.project.rows()
    told = lab.ask("tell(uuids=Index.get().reindex())")
    assert uuid not in told["uuids"]
    rows = lab.project.rows()
    assert before.keys() <= rows.keys()
    assert rows[uuid] == before[uuid]
    assert rows[execution] == before[execution]
    assert lab.look(uuid)["uuid"] == uuid


def test_runfs_reindex_makes_a_missing_index(lab: Lab, down: Callable[[], None]) -> None:
    uuid, resident = lab.fresh_evicted(), lab.fresh()
    before = {each: row for each, row in lab.project.rows().items() if row["kind"] != "Project"}
    down()
    for leftover in lab.project.path.glob(".machinable.sqlite*"):
        leftover.unlink()
    away = Mounted(lab.project, lab.mnt, environment={**lab.mounted.environment, "RUNFS_MOUNT": ""})
    refused = away.runfs("ls", "--project", str(lab.project.path))
    assert refused.returncode != 0
    assert "runfs reindex" in refused.stderr
    assert away.json("reindex", "--project", str(lab.project.path))["ingested"] >= 2
    rows = lab.project.rows()
    assert {uuid, resident, *lab.project.executions(uuid)} <= set(rows)
    missing = {each for each in before if each not in rows}
    assert not missing
    assert rows[uuid] == before[uuid]
    lab.mounted.start()
    ran = lab.ran()
    assert lab.look(uuid)["uuid"] == uuid
    assert lab.look(resident)["uuid"] == resident
    assert lab.ran() == ran


def test_runfs_reindex_from_a_store_brings_lost_rows(lab: Lab) -> None:
    uuid = lab.fresh()
    lab.ask("run = get('train', asked); run.set_label('kept'); tell()", lab.config(uuid))
    soon(lambda: lab.mounted.runfs("safe", uuid).returncode == 0, 20)
    before = lab.project.rows()[uuid]
    assert before["label"] == "kept"
    (execution,) = lab.project.executions(uuid)
    lab.sql('DELETE FROM "index" WHERE record_id IN (?, ?)', uuid, execution)
    soon(lambda: uuid not in os.listdir(lab.mnt))
    lab.mounted.json("reindex", "--from", f"file://{lab.store}")
    assert lab.project.rows()[uuid] == before
    assert lab.project.executions(uuid) == [execution]
    soon(lambda: {uuid, execution} <= set(os.listdir(lab.mnt)))
    assert not lab.project.directory(uuid).is_symlink()
    assert lab.look(uuid)["uuid"] == uuid


# --- views ---------------------------------------------------------------------------------------------------------


def test_views_list_the_right_records(lab: Lab) -> None:
    uuid = lab.fresh()
    other = lab.ask(LAUNCH, [{"lr": 71.5}])["uuids"][0]
    lab.ask("get('train', asked).set_label('best / 100%'); tell()", lab.config(uuid))
    (execution,) = lab.project.executions(uuid)
    by = lab.mnt / ".by"
    assert ".by" not in os.listdir(lab.mnt)
    assert set(os.listdir(by)) == {"label", "module", "kind", "status", "created_by", "date", "config"}
    rows = lab.project.rows()

    def listed(*parts: str) -> set[str]:
        return set(os.listdir(by.joinpath(*(encoded(part) for part in parts))))

    def expected(**columns: object) -> set[str]:
        return {
            each
            for each, row in rows.items()
            if row["kind"] != "Project" and not row["hidden"] and all(row[c] == v for c, v in columns.items())
        }

    soon(lambda: other in listed("module", "train"))
    rows = lab.project.rows()
    assert "best %2F 100%25" in listed("label")
    assert listed("label") == {encoded(str(row["label"])) for row in rows.values() if row["label"]}
    assert listed("label", "best / 100%") == expected(label="best / 100%") == {uuid}
    assert listed("module", "train") == expected(module="train")
    assert listed("module") == {row["module"] for row in rows.values() if row["kind"] != "Project"}
    assert listed("kind", "Execution") == expected(kind="Execution")
    assert execution in listed("kind", "Execution")
    assert execution not in listed("kind", "Interface")
    assert execution in listed("status", "finished")
    owner = str(rows[uuid]["created_by"])
    assert listed("created_by") == {owner}
    assert listed("created_by", owner) == expected(created_by=owner)
    today = time.strftime("%Y-%m-%d", time.localtime(int(rows[uuid]["created_at_ns"]) / 1e9))
    assert uuid in listed("date", today)
    assert listed("config", "lr", "71.5") == {other}
    assert str(lab.config(uuid)["lr"]) in listed("config", "lr")
    assert (by / "config" / "lr" / "71.5" / other / "metrics.json").exists()
    assert not os.path.lexists(by / "config" / "lr" / "71.5" / uuid)
    assert not os.path.lexists(by / "label" / "nobody has this")
    link = os.readlink(by / "label" / encoded("best / 100%") / uuid)
    assert link == f"../../../{uuid}"


def encoded(value: str) -> str:
    return value.replace("%", "%25").replace("/", "%2F")


def test_views_follow_the_index(lab: Lab) -> None:
    uuid = lab.fresh()
    lab.ask("Interface.find_by_id(asked).set_label('first'); tell()", uuid)
    label = lab.mnt / ".by" / "label"
    soon(lambda: (label / "first" / uuid).is_symlink())
    lab.ask("Interface.find_by_id(asked).set_label('second'); tell()", uuid)
    soon(lambda: (label / "second" / uuid).is_symlink())
    soon(lambda: not os.path.lexists(label / "first" / uuid))
    soon(lambda: not os.path.lexists(label / "first"))


# --- several projects in one index ---------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Two projects with storage of their own, and a storage elsewhere, in one index that lies beside them."""
    index = tmp_path / "index.sqlite"
    made = []
    for first, name in enumerate(("one", "two")):  # machinable finds equal runs across projects
        path = tmp_path / name
        path.mkdir()
        (path / "train.py").write_text(MODULE)
        code = (
            PRELUDE
            + """
with Project(os.getcwd()):
    uuids = [get("train", config).launch().uuid for config in asked["configs"]]
    with Storage(asked["elsewhere"]):
        uuids.append(get("train", {"lr": asked["configs"][0]["lr"] + 0.3}).launch().uuid)
tell(uuids=uuids)
"""
        )
        asked = {"configs": [{"lr": first + 0.5}, {"lr": first + 0.6}], "elsewhere": str(tmp_path / f"scratch {name}")}
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(asked)],
            cwd=path,
            env={**os.environ, "MACHINABLE_INDEX": str(index), "PYTHONPATH": str(path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        made += last(done.stdout)["uuids"]
    store = tmp_path / "store"
    store.mkdir()
    project = SharedIndex(tmp_path, made)
    mounted = Mounted(project, tmp_path / "mnt", stores=[f"file://{store}"])
    at = mounted.command.index("--project")
    mounted.command[at : at + 2] = ["--index", str(index)]
    with mounted:
        yield Lab(project, mounted, store, list(made))


class SharedIndex(Project):
    """A `Project` of tests whose index is not in it."""

    @property
    def index(self) -> Path:
        return self.path / "index.sqlite"


def test_several_projects_and_a_record_that_is_gone(two: Lab) -> None:
    listed = os.listdir(two.mnt)
    assert set(two.ready) <= set(listed)
    assert len(two.ready) == 6
    places = {two.project.directory(uuid).relative_to(two.project.path).parts[0] for uuid in two.ready}
    assert places == {"one", "two", "scratch one", "scratch two"}
    gone, unpushed, *others = two.ready
    two.mounted.json("push")
    before = snapshot(two.project.directory(gone))
    two.evict(*others)
    for uuid in others:
        link = two.project.directory(uuid)
        assert not os.path.isabs(os.readlink(link))
        assert sha(link / "weights.bin") == hashlib.sha256(weights_of(two, uuid)).hexdigest()
    shutil.rmtree(two.project.directory(gone))
    assert set(two.ready) - {gone} <= set(os.listdir(two.mnt))
    assert (two.mnt / unpushed / "metrics.json").exists()
    with pytest.raises(OSError, match=r"error|No such file"):
        os.listdir(two.mnt / gone)
    doctor = two.mounted.json("doctor", exit_code=1)
    named = [check for check in doctor["checks"] if check["ok"] is False]
    assert [check["name"] for check in named] == ["record"]
    assert gone in named[0]["message"]
    assert f"hydrate --restore {gone}" in named[0]["advice"]
    two.mounted.json("hydrate", "--restore", gone)
    assert snapshot(two.project.directory(gone)) == before
    assert sorted(os.listdir(two.mnt / gone)) == sorted(os.listdir(two.project.directory(gone)))
    assert two.mounted.json("doctor", exit_code=None)["checks"]
    assert not [check for check in two.mounted.json("doctor")["checks"] if check["ok"] is False]


def weights_of(lab: Lab, uuid: str) -> bytes:
    """What the body of this run wrote."""
    return random.Random(float(lab.config(uuid)["lr"])).randbytes(WEIGHTS)
