"""The storage module of machinable projects, used by real machinable in processes of its own: what machinable's own
storage does, on a directory and on S3. No mount, and no runfs importable beside it.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.projects import MODEL, REPORT
from tests.servers import Seaweed

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
LIMIT_S = 120.0


@dataclass
class Lab:
    """A project directory with the module in it, and a store."""

    path: Path
    url: str
    environment: dict[str, str]
    options: dict[str, str] = field(default_factory=dict)

    def run(self, code: str, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run code in the project; `storage` is the connected storage, `say(value)` prints JSON."""
        body = textwrap.indent(textwrap.dedent(code), "    ")
        source = f"""
import json, os, sys
from machinable import Index, Project, get
from machinable.errors import StorageError
from runfs_storage import RunfsStorage
def say(value): print(json.dumps(value))
assert "vfs" not in sys.modules and "apsw" not in sys.modules
with Project("."), Index(), RunfsStorage({dict(store=self.url, **self.options)!r}) as storage:
{body}
assert "vfs" not in sys.modules
"""
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", source, *arguments],
            cwd=self.path,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == exit_code, f"{done.stdout}\n{done.stderr}"
        return done

    def said(self, code: str, *arguments: str) -> list[object]:
        return [json.loads(line) for line in self.run(code, *arguments).stdout.splitlines() if line[:1] in '["{tfn0']


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `runfs` program that works from this checkout; nothing of it is on the project's import path."""
    program = tmp_path_factory.mktemp("bin") / "runfs"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from daemon.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def make_lab(tmp_path: Path, command: Path) -> Callable[..., Lab]:
    """Makes projects: two with one URL are two machines."""

    def make(name: str, url: str, environment: dict[str, str] | None = None) -> Lab:
        path = tmp_path / name / "study"  # machinable tells projects apart by this name
        path.mkdir(parents=True)
        (path / "mymodel.py").write_text(MODEL)
        (path / "report.py").write_text(REPORT)
        subprocess.run([command, "config", "storage-module", path / "runfs_storage.py"], check=True, timeout=LIMIT_S)
        places = {
            "RUNFS_COMMAND": str(command),
            "RUNFS_STATE_DIR": str(tmp_path / name / "s"),
            "RUNFS_CACHE_DIR": str(tmp_path / name / "c"),
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": str(path),
        }
        return Lab(path, url, {**places, **(environment or {})})

    return make


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    if request.param == "file":
        yield f"file://{tmp_path}/store", {}
        return
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    url = f"s3://{seaweed.bucket}/t-{os.urandom(6).hex()}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    yield url, seaweed.environment()


def test_a_run_is_in_the_store_and_back_on_another_machine(
    make_lab: Callable[..., Lab], place: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """Commit at each step of a run; contains, search, retrieve, download with relations, index; not run again."""
    one, two = make_lab("one", *place), make_lab("two", *place)
    uuid, report, execution, found, uri = one.said(
        """
        run = get("mymodel", {"lr": 0.5}).launch()
        report = get("report", uses=[run]).launch()
        say(run.uuid)
        say(report.uuid)
        say(run.executions[0].uuid)
        say(storage.search_for(get("mymodel", {"lr": 0.5})))
        say(storage.home_uri(run.uuid))
        assert storage.contains(run.uuid) and storage.contains(run.executions[0].uuid)
        assert not storage.contains("nosuchrecord")
        assert storage.search_for(get("mymodel", {"lr": 0.7})) == []
        storage.update(run)
        assert storage.retrieve(run.executions[0].uuid, "../execution")
        assert not storage.retrieve("nosuchrecord", "../none") and not os.path.exists("../none")
        """
    )
    assert found == [uuid]
    assert uri == place[0].partition("?")[0] + f"/{uuid}" + (
        "?" + place[0].partition("?")[2] if "?" in place[0] else ""
    )
    header = json.loads((tmp_path / "one" / "execution" / "id.json").read_text())
    assert header["uuid"] == execution
    got = two.said(
        """
        uuid, report = sys.argv[1:]
        assert Index.get().get_by_id(uuid) is None
        say(sorted(os.path.basename(each) for each in storage.download(report)))
        run = get("mymodel", {"lr": 0.5})
        say([run.uuid, run.cached(), run.load_file("metrics.json")["loss"], len(run.executions)])
        say(get("mymodel", {"lr": 0.5}).launch().uuid)
        say([used.uuid for used in get.by_id(report).uses])
        """,
        str(uuid),
        str(report),
    )
    assert got[0] == sorted([str(uuid), str(report)])
    assert got[1] == [uuid, True, 1.0, 1]
    assert got[2] == uuid, "found, and not run again"
    assert got[3] == [uuid]


def test_the_other_verbs(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """upload, download and their depths; pull, push, delete, walk and reindex, fetch, ensure_materialized, id, root."""
    url = f"file://{tmp_path}/store"
    one, two = make_lab("one", url), make_lab("two", url)
    one.run(
        """
        from machinable.storage import fetch
        run = get("mymodel", {"lr": 0.1}).launch()
        report = get("report", uses=[run]).launch()
        assert storage.id == "store" and storage.root() == os.path.abspath("storage")
        assert storage.ensure_materialized().kind == "Storage"
        for uuid in (run.uuid, report.uuid):
            assert storage.delete(uuid) and not storage.contains(uuid)
        assert not storage.delete(run.uuid)
        storage.upload(report, related=0)
        assert storage.contains(report.uuid) and not storage.contains(run.uuid)
        storage.upload(report)
        assert storage.contains(run.uuid)
        storage.upload(report, related=2)
        assert storage.download(report.uuid, "../only", related=0) == [os.path.abspath(f"../only/{report.uuid}")]
        assert len(storage.download(report.uuid, "../both", related=2)) == 2
        assert storage.download("nosuchrecord", "../none") == []
        here = run.local_directory()
        assert storage.pull(run.uuid) == "file://" + here
        assert storage.pull(run.uuid, "../pulled").endswith("/one/pulled")
        assert storage.pull("nosuchrecord") is None
        assert storage.push("../pulled", run.uuid) == storage.home_uri(run.uuid)
        assert fetch(run.uuid, "../fetched") and os.path.isfile("../fetched/metrics.json")
        assert not fetch("nosuchrecord", "../none")
        run.save_file("later.json", {"later": 1})
        storage.update(run)
        """
    )
    two.run(
        """
        assert len(Index.get().reindex(storage)) == 4  # two runs and their executions
        run = get("mymodel", {"lr": 0.1})
        assert run.cached() and run.load_file("later.json") == {"later": 1}
        assert sorted(os.listdir("storage"))
        assert len(Index.get().reindex(storage)) == 4  # nothing is brought twice
        import shutil
        shutil.rmtree(run.local_directory())
        assert Index.get().resolve(run.uuid) is not None  # machinable asks the connected storages for it
        assert get.by_id(run.uuid).load_file("later.json") == {"later": 1}
        """
    )


def test_machinables_own_storage_beside_it(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """Connected inside a disk storage: each keeps its copy."""
    lab = make_lab("one", f"file://{tmp_path}/store")
    lab.run(
        """
        from machinable import Storage
        with Storage("./disk") as disk:
            run = get("mymodel", {"lr": 0.1}).launch()
            assert run.local_directory().startswith(os.path.abspath("disk"))
        assert storage.contains(run.uuid)
        """
    )


class TestErrors:
    def test_the_program_is_not_there(self, make_lab: Callable[..., Lab], tmp_path: Path) -> None:
        lab = make_lab("one", f"file://{tmp_path}/store")
        lab.environment["RUNFS_COMMAND"] = "/nowhere/runfs"
        done = lab.run('get("mymodel", {"lr": 0.1}).launch()', exit_code=1)
        assert "StorageError: the program '/nowhere/runfs' is not there: install runfs" in done.stderr

    def test_a_store_that_is_wrong_or_gone(self, make_lab: Callable[..., Lab]) -> None:
        lab = make_lab("one", "lap")
        done = lab.run('get("mymodel", {"lr": 0.1}).launch()', exit_code=1)
        assert "'lap' is neither a URL nor a store in the configuration" in done.stderr
        lab.url = "s3://x/y?endpoint=http://127.0.0.1:9&region=r"
        assert "StorageError: runfs:" in lab.run('storage.contains("a")', exit_code=1).stderr

    def test_no_store_at_all(self, make_lab: Callable[..., Lab]) -> None:
        done = make_lab("one", "").run('storage.contains("a")', exit_code=1)
        assert "no store is configured: name one with --store URL, or in the configuration file" in done.stderr

    def test_a_run_may_go_on_without_its_store(self, make_lab: Callable[..., Lab]) -> None:
        """With `on_error` it warns, and its record is on this machine."""
        lab = make_lab("one", "lap")
        lab.options["on_error"] = "warn"
        done = lab.run(
            """
            import warnings
            warnings.simplefilter("default")
            assert get("mymodel", {"lr": 0.1}).launch().cached()
            """
        )
        assert "is on this machine only" in done.stderr

    def test_wrong_bytes_and_changed_files(self, make_lab: Callable[..., Lab], tmp_path: Path) -> None:
        lab = make_lab("one", f"file://{tmp_path}/store")
        (uuid,) = lab.said('say(get("mymodel", {"lr": 0.1}).launch().uuid)')
        lab.run(
            """
            assert storage.retrieve(sys.argv[1], "../copy")
            open("../copy/metrics.json", "w").write("changed")
            try:
                storage.retrieve(sys.argv[1], "../copy")
            except StorageError as error:
                assert "'metrics.json' is not what the store holds" in str(error), error
            else:
                raise AssertionError
            assert open("../copy/metrics.json").read() == "changed"
            """,
            str(uuid),
        )
        metrics = tmp_path / "store" / str(uuid) / "metrics.json"
        metrics.chmod(0o600)
        metrics.write_bytes(bytes(len(metrics.read_bytes())))
        done = lab.run('storage.retrieve(sys.argv[1], "../other")', str(uuid), exit_code=1)
        assert "does not hold the right bytes" in done.stderr
        assert not (tmp_path / "one" / "other").exists()


class TestTheCommand:
    def test_writes_the_module_once(self, command: Path, tmp_path: Path) -> None:
        file = tmp_path / "runfs_storage.py"

        def write(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [command, "config", "storage-module", *more], capture_output=True, text=True, timeout=LIMIT_S
            )

        assert write(str(file), "--dry-run").returncode == 0
        assert not file.exists()
        assert write(str(file)).returncode == 0
        assert file.read_text() == (ROOT / "vfs" / "machinable_storage.py").read_text() == write().stdout
        assert write(str(file)).returncode == 0
        file.write_text("# mine")
        refused = write(str(file))
        assert (refused.returncode, file.read_text()) == (1, "# mine")
        assert "is there already and is something else" in refused.stderr
        nowhere = write(str(tmp_path / "nowhere" / "runfs_storage.py"))
        assert (nowhere.returncode, "there is no directory" in nowhere.stderr) == (1, True)

    def test_needs_nothing_of_runfs(self) -> None:
        """What it imports is machinable, pydantic (which machinable needs) and the standard library."""
        import ast

        tree = ast.parse((ROOT / "vfs" / "machinable_storage.py").read_text())
        nodes = list(ast.walk(tree))
        names = {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        names |= {each.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for each in node.names}
        assert names - set(sys.stdlib_module_names) == {"machinable", "pydantic"}
