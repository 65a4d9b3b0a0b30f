"""Real machinable projects for tests: made by machinable itself in a process of its own, copied for each test.

Used through the fixtures `project` and `make_project` of conftest.py. A project is made once per set of arguments
(0.6 s) and copied after that: rows hold absolute file:// addresses, so a copy gets its own written into it.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

RUN_LIMIT_S = 120.0

MODEL = '''
"""A small training run: two small files, one large one, a nested directory."""

import json
from pathlib import Path

import numpy as np
from machinable import Interface
from pydantic import BaseModel


class Train(Interface):
    class Config(BaseModel):
        lr: float = 0.1
        size: int = 1000  # bytes of numbers in weights.npy
        seed: int = 1

    def __call__(self):
        numbers = np.random.default_rng(self.config.seed).integers(0, 256, self.config.size, dtype=np.uint8)
        np.save(self.local_directory("weights.npy"), numbers)
        self.save_file("metrics.json", {"loss": self.config.lr * 2, "sum": int(numbers.sum())})
        notes = Path(self.local_directory("notes", "by step", create=True))
        for step in range(3):
            (notes / f"{step}.txt").write_text(f"step {step}, lr {self.config.lr}\\n")
        Path(self.local_directory("log.txt")).write_text(json.dumps({"done": True}) + "\\n")
'''

REPORT = '''
"""A run that uses another one: gives the index a relation."""

from machinable import Interface


class Report(Interface):
    def __call__(self):
        self.save_file("report.json", {"of": [used.uuid for used in self.uses]})
'''

MAKE = """
import json, sys
from machinable import get
asked = json.loads(sys.argv[1])
runs = [get("mymodel", config).launch() for config in asked["configs"]]
uuids = [run.uuid for run in runs]
if asked["report"]:
    uuids.append(get("report", uses=[runs[0]]).launch().uuid)
print(json.dumps(uuids))
"""


@dataclass(frozen=True, slots=True)
class Project:
    """A machinable project on disk. `runs` are the uuids of its root records, in the order they ran."""

    path: Path
    runs: list[str] = field(default_factory=list)

    @property
    def index(self) -> Path:
        return self.path / ".machinable.sqlite"

    def run(self, code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python code in the project, with machinable importable, in a new process."""
        environment = {**os.environ, "PYTHONPATH": str(self.path)}
        environment.pop("MACHINABLE_INDEX", None)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        if check and done.returncode:
            raise AssertionError(f"code in the project failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
        return done

    def launch(self, **config: object) -> str:
        """Run `mymodel` with this configuration in a new process; its uuid."""
        asked = json.dumps({"configs": [config], "report": False})
        return str(json.loads(self.run(MAKE, asked).stdout.splitlines()[-1])[0])

    def directory(self, uuid: str) -> Path:
        """Where the index says that the record's directory is."""
        return Path(unquote(urlsplit(self.rows()[uuid]["storage_uri"]).path))

    def rows(self) -> dict[str, dict[str, str]]:
        """Every row of the index by its uuid."""
        connection = sqlite3.connect(self.index)
        try:
            connection.row_factory = sqlite3.Row
            return {row["record_id"]: dict(row) for row in connection.execute('SELECT * FROM "index"')}
        finally:
            connection.close()

    def executions(self, uuid: str) -> list[str]:
        """The uuids of the records directly in this one."""
        return [each for each, row in self.rows().items() if row["parent_id"] == uuid]


def create(path: Path, configs: list[dict[str, object]], *, report: bool) -> Project:
    """A new project in `path`, whose runs really ran, one for each configuration."""
    path.mkdir(parents=True)
    (path / "mymodel.py").write_text(MODEL)
    (path / "report.py").write_text(REPORT)
    project = Project(path)
    done = project.run(MAKE, json.dumps({"configs": configs, "report": report}))
    return Project(path, json.loads(done.stdout.splitlines()[-1]))


def copy(template: Project, path: Path) -> Project:
    """The same project in another place, as if it had been made there."""
    shutil.copytree(template.path, path, symlinks=True)
    connection = sqlite3.connect(path / ".machinable.sqlite")
    try:
        with connection:
            for column in ("storage_uri", "local_uri"):
                connection.execute(
                    f'UPDATE "index" SET {column} = replace({column}, ?, ?)',
                    (template.path.as_uri() + "/", path.as_uri() + "/"),
                )
    finally:
        connection.close()
    return Project(path, list(template.runs))
