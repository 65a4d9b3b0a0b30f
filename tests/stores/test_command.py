"""Records made again by a command: the real machinable relaunches a real run."""

import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import unit_of
from tests.projects import Project
from tests.relaunching import COMMAND, make_relaunchable, relaunches
from vfs.cache import read_header
from vfs.errors import ConfigError, Denied, NoReplica, NotFound, RunfsError, StoreError, StoreTimeout, Unreachable
from vfs.events import Ended, Event, Started
from vfs.manifest import CHUNK
from vfs.session import Session
from vfs.settings import CacheSettings, Settings, StoreSettings
from vfs.stores import Store, nature, open_store, validate

Make = Callable[..., Store]


@pytest.fixture
def relaunchable(make_project: Callable[..., Project]) -> Project:
    """A project of one run of 300 kB, with a script that runs it again."""
    return make_relaunchable(make_project(runs=1, size=300_000, report=False))


@pytest.fixture
def make(tmp_path: Path, relaunchable: Project) -> Iterator[Make]:
    made: list[Store] = []

    def make(command: str = COMMAND, **options: Any) -> Store:
        given = {"index": str(relaunchable.index), "place": str(tmp_path / "made"), "enabled": True}
        made.append(open_store("command://again", "again", {"command": command, **given, **options}))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()


def script(tmp_path: Path, code: str) -> str:
    """A command that runs this Python code; its arguments are the directory and the uuid."""
    path = tmp_path / "script.py"
    path.write_text(code)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {{directory}} {{uuid}}"


# --- the store ------------------------------------------------------------------------------------------------------


def test_a_run_is_made_again_once(make: Make, relaunchable: Project) -> None:
    store, uuid = make(), relaunchable.runs[0]
    rows = relaunchable.rows()
    expected = (relaunchable.directory(uuid) / "weights.npy").read_bytes()
    key = f"{uuid}/weights.npy"
    assert list(store.list()) == list(store.list(f"{uuid}/")) == []  # a listing runs nothing
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(lambda number: store.read(key, number, 100), range(6)))
    assert read == [expected[number : number + 100] for number in range(6)]
    assert store.read(key) == expected
    assert store.stat(key).size == len(expected)
    assert make().read(key) == expected  # another process, or this one after a restart
    assert relaunches(relaunchable) == 1
    assert {stat.key for stat in store.list()} >= {key, f"{uuid}/id.json", f"{uuid}/model.json"}
    assert relaunchable.rows() == rows  # the project's index knows nothing of it
    assert store.sweep(0) == 1
    assert list(store.list()) == []


def test_what_it_is(make: Make, relaunchable: Project) -> None:
    store = make()
    info = store.info()
    assert (info.calculates, info.read_only) == (True, True)
    found = nature({"url": "command://again", "command": COMMAND})
    assert (found.read_only, found.calculates) == (True, True)
    check = store.check()
    assert (check.reachable, check.readable, check.writable, check.problems) == (True, True, False, [])
    for change in (
        lambda: store.write(f"{relaunchable.runs[0]}/new", b"x"),
        lambda: store.delete(f"{relaunchable.runs[0]}/id.json"),
    ):
        with pytest.raises(Denied, match="read-only"):
            change()
    assert relaunches(relaunchable) == 0


def test_it_is_off_unless_enabled(make: Make, relaunchable: Project) -> None:
    store = make(enabled=False)
    with pytest.raises(Denied, match=r"switched off; it would run: .*relaunch.py \{module\}"):
        store.read(f"{relaunchable.runs[0]}/weights.npy")
    assert not store.check().reachable
    assert relaunches(relaunchable) == 0
    assert "switched off" in validate("command://again", options={"command": COMMAND})[0]
    shown = validate("command://again", options={"command": COMMAND, "enabled": True})[0]
    assert f"runs, when no other store has a record: {COMMAND}" == shown


def test_the_command_is_told_before_it_runs(
    make: Make, relaunchable: Project, caplog: pytest.LogCaptureFixture
) -> None:
    store: Any = make()
    seen: list[tuple[Event, int]] = []
    store.events.subscribe(lambda event: seen.append((event, relaunches(relaunchable))))
    store.read(f"{relaunchable.runs[0]}/weights.npy")
    began, ended = seen[0][0], seen[-1][0]
    assert isinstance(began, Started)
    assert began.what == "calculate"
    assert seen[0][1] == 0
    assert shlex.split(began.name)[1:3] == [str(relaunchable.path / "relaunch.py"), "mymodel"]
    assert isinstance(ended, Ended)
    assert ended.error is None
    assert began.name in caplog.text


def test_what_is_not_there_runs_nothing(make: Make, relaunchable: Project) -> None:
    store, uuid = make(), relaunchable.runs[0]
    for key in ("nobody123456/x", f".runfs/{uuid}/manifest.json", uuid):
        with pytest.raises(NotFound):
            store.read(key)
    assert relaunches(relaunchable) == 0
    with pytest.raises(NotFound):
        store.read(f"{uuid}/never made")


def test_arguments_are_data(make: Make, relaunchable: Project, tmp_path: Path) -> None:
    code = "import sys; print(*map(repr, sys.argv), sep='\\n'); sys.exit(7)"
    (tmp_path / "show.py").write_text(code)
    command = f"{sys.executable} {tmp_path}/show.py '{{config}}; touch {tmp_path}/pwned' '$(id)' x={{module}}"
    with pytest.raises(StoreError, match="status 7"):
        make(command).read(f"{relaunchable.runs[0]}/x")
    said = (tmp_path / "made" / f"{relaunchable.runs[0]}.log").read_text().splitlines()
    config = relaunchable.rows()[relaunchable.runs[0]]["config_resolved_json"]
    assert said[1:] == [repr(f"{config}; touch {tmp_path}/pwned"), "'$(id)'", "'x=mymodel'"]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("module", ["-c__import__", "--help", "a\0b"])
def test_a_value_is_never_an_option(make: Make, relaunchable: Project, module: str) -> None:
    relaunchable.run(
        "import sqlite3, sys\nc = sqlite3.connect('.machinable.sqlite')\n"
        f"c.execute('UPDATE \"index\" SET module = ?', ({module!r},))\nc.commit()"
    )
    with pytest.raises(StoreError, match=r"\{module\} .* a program could misunderstand; not run"):
        make().read(f"{relaunchable.runs[0]}/weights.npy")
    assert relaunches(relaunchable) == 0


def test_a_failing_command(make: Make, relaunchable: Project, tmp_path: Path) -> None:
    store = make(script(tmp_path, "import sys; print('out of luck'); open('x', 'w').write('y'); sys.exit(3)"))
    uuid = relaunchable.runs[0]
    with pytest.raises(StoreError, match=rf"ended with status 3: .*{uuid}.log has what it said.*out of luck") as first:
        store.read(f"{uuid}/weights.npy")
    (tmp_path / "script.py").unlink()
    with pytest.raises(StoreError) as second:
        store.read(f"{uuid}/id.json")  # not run again at once
    assert str(second.value) == str(first.value)
    assert not list((tmp_path / "made").glob("*.making-*"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", "left no record"),
        ("import os, sys; open(os.path.join(sys.argv[1], '.machinable'), 'w')", "has no id.json"),
        (
            "import os, sys, json; d = sys.argv[1]; open(d + '/.machinable', 'w'); json.dump({'format': 1, 'uuid': "
            "sys.argv[2], 'kind': 'Interface', 'identity_key': 'x', 'predicate_key': 'y'}, open(d + '/id.json', 'w'))",
            "it left Interface x/y.*Has the code or the configuration changed",
        ),
        ("import os, sys; os.symlink('/', sys.argv[1] + '/link')", "left no record"),
    ],
)
def test_what_is_no_such_record_is_refused(
    make: Make, relaunchable: Project, tmp_path: Path, code: str, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        make(script(tmp_path, code)).read(f"{relaunchable.runs[0]}/id.json")


def test_a_record_without_its_model_is_refused(make: Make, relaunchable: Project, tmp_path: Path) -> None:
    source = relaunchable.directory(relaunchable.runs[0])
    copy = f"import shutil, sys; d = sys.argv[1] + '/r'; shutil.copytree({str(source)!r}, d)"
    assert make(script(tmp_path, copy)).read(f"{relaunchable.runs[0]}/id.json")
    shutil.rmtree(tmp_path / "made")
    broken = f"{copy}; open(d + '/model.json', 'w').write('{{')"
    with pytest.raises(StoreError, match=r"no valid record: .*model.json: is not JSON"):
        make(script(tmp_path, broken)).read(f"{relaunchable.runs[0]}/id.json")


def test_a_command_that_does_not_end(make: Make, relaunchable: Project, tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('thinking', flush=True)\ntime.sleep(300)"
    )
    store = make(script(tmp_path, code), limit_s=1.5)
    key = f"{relaunchable.runs[0]}/weights.npy"
    with pytest.raises(StoreTimeout, match="still being brought, ask again"):
        store.read(key, deadline=0.1)
    with pytest.raises(StoreTimeout, match=r"ended after 1.5 s.*thinking"):
        store.read(key, deadline=20)
    end = time.monotonic() + 5  # a signal takes its moment
    while (living := alive(int((tmp_path / "pid").read_text()))) and time.monotonic() < end:
        time.sleep(0.01)
    assert not living


def test_disconnect_ends_it(make: Make, relaunchable: Project, tmp_path: Path) -> None:
    store = make(script(tmp_path, f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(300)"))
    seen: list[RunfsError] = []

    def read() -> None:
        try:
            store.read(f"{relaunchable.runs[0]}/x")
        except RunfsError as error:
            seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    store.disconnect()
    reader.join(10)
    assert not reader.is_alive()
    assert "status -9" in str(seen[0])
    with pytest.raises(Unreachable):
        store.read(f"{relaunchable.runs[0]}/x")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "command: give the command"),
        ({"command": "  "}, "command: give the command"),
        ({"command": "run 'it"}, "No closing quotation"),
        ({"command": "run {secret}"}, r"no placeholder \{secret\}; there are \{config\}, \{directory\}"),
        ({"command": "{module} x"}, "must not come from the record"),
        ({"command": "./run"}, "full path, or its bare name"),
        ({"command": "run", "limit_s": 0}, "limit_s"),
        ({"command": "run", "enabled": "perhaps"}, "enabled"),
        ({"command": "run", "enable": True}, "did you mean enabled"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate("command://again", options=options)


def test_a_url_cannot_switch_it_on() -> None:
    with pytest.raises(ConfigError, match="not in a URL"):
        validate("command://again?enabled=true&command=rm")


# --- its place among the others -------------------------------------------------------------------------------------


@pytest.fixture
def open_session(tmp_path: Path, relaunchable: Project) -> Iterator[Callable[..., Session]]:
    """Sessions on the project, with a directory and the command as stores."""
    opened: list[Session] = []

    def start(**over: Any) -> Session:
        options = {"command": COMMAND, "enabled": True, "limit_s": 60}
        given: dict[str, Any] = {
            "index": relaunchable.index,
            "stores": (
                StoreSettings(name="again", url="command://again", options=options),
                StoreSettings(name="lab", url=(tmp_path / "lab").as_uri()),
            ),
            "state_dir": tmp_path / "state",
            "cache_dir": tmp_path / "cache",
            "runtime_dir": tmp_path / "run",
            "mountpoint": tmp_path / "mnt",
            "deadline_s": 10.0,
            "cache": CacheSettings(high=None, low=None),
        }
        opened.append(Session.open(Settings(**{**given, **over})))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


class Quiet:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


def run(session: Session, command: str, **args: Any) -> dict[str, Any]:
    return session.run(command, args, Quiet())


def weights(session: Session, uuid: str) -> bytes:
    """All of the file through the hydrator, as a reader of the mount gets it."""
    path = os.path.join(unit_of(session, uuid).shadow, b"weights.npy")
    fd = os.open(path, os.O_RDONLY)
    try:
        session.hydrator.complete(fd, uuid, b"weights.npy")
        session.core.settle()
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def lose(directory: Path) -> None:
    """The store loses every object, but stays a store."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def test_a_lost_file_is_calculated_and_nothing_else_asks_for_that(
    open_session: Callable[..., Session], relaunchable: Project, tmp_path: Path
) -> None:
    uuid = relaunchable.runs[0]
    expected = (relaunchable.directory(uuid) / "weights.npy").read_bytes()
    assert len(expected) > 64 * 1024
    session = open_session()
    assert [home.name for home in session.core.homes] == ["lab"]
    pushed = run(session, "push", uuids=[uuid])
    assert pushed["failed"] == []
    assert {each["store"] for each in pushed["pushed"]} == {"lab"}
    assert run(session, "safe", uuids=[uuid])["safe"]
    assert run(session, "verify", uuids=[uuid])["bad"] == []
    session.evictor.evict(unit_of(session, uuid))
    assert {proof["store"] for proof in session.core.journal.receipts(uuid)} <= {"", "lab"}
    shown = {store["name"]: store for store in run(session, "stores")["stores"]}
    assert shown["again"]["ok"]
    assert "relaunch.py" in shown["again"]["warnings"][0]
    assert shown["again"]["info"]["calculates"]
    assert weights(session, uuid) == expected  # from the store: that comes first
    session.evictor.evict(unit_of(session, uuid))
    assert relaunches(relaunchable) == 0

    lose(tmp_path / "lab")
    assert weights(session, uuid) == expected
    assert relaunches(relaunchable) == 1
    assert run(session, "verify", uuids=[uuid])["bad"] != []  # what is calculated is no copy


def test_other_bytes_are_an_error_that_says_so(
    open_session: Callable[..., Session], relaunchable: Project, tmp_path: Path
) -> None:
    uuid = relaunchable.runs[0]
    session = open_session()
    run(session, "push", uuids=[uuid])
    session.evictor.evict(unit_of(session, uuid))
    lose(tmp_path / "lab")
    model = relaunchable.path / "mymodel.py"
    model.write_text(model.read_text().replace("default_rng(self.config.seed)", "default_rng()"))
    with pytest.raises(NoReplica, match=r"again: it was calculated again, with other bytes than the record has"):
        weights(session, uuid)
    with pytest.raises(NoReplica, match="other bytes"):
        weights(session, uuid)
    assert relaunches(relaunchable) == 1
    header = read_header(os.path.join(unit_of(session, uuid).shadow, b"weights.npy"))
    assert header is not None
    assert header.local_bytes == 0
    assert "other bytes" in (session.core.trouble(uuid, b"weights.npy") or "")


def test_a_reader_that_goes_on_gets_the_rest_too(
    open_session: Callable[..., Session], make_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = make_relaunchable(make_project("large", runs=1, size=2 * CHUNK + 5000, report=False))
    uuid = project.runs[0]
    expected = (project.directory(uuid) / "weights.npy").read_bytes()
    session = open_session(index=project.index)
    session.evictor.evict(unit_of(session, uuid))
    lose(tmp_path / "lab")
    fd = os.open(os.path.join(unit_of(session, uuid).shadow, b"weights.npy"), os.O_RDONLY)
    partial = session.core.partial(fd)
    assert partial is not None
    try:
        session.hydrator.bring(partial, [1], uuid, b"", 20)  # as what is brought ahead of a reader
        session.hydrator.bring(partial, [0, 2], uuid, b"weights.npy", 20)
        assert os.pread(partial.fd, len(expected), 0) == expected
    finally:
        session.core.release(partial)
        os.close(fd)
    assert relaunches(project) == 1


def test_touching_a_record_calculates_nothing_ahead(
    open_session: Callable[..., Session], relaunchable: Project
) -> None:
    uuid = relaunchable.runs[0]
    session = open_session()
    session.evictor.evict(unit_of(session, uuid))
    session.core.journal.forget_replicas(uuid, "lab")
    began: list[Event] = []
    session.core.events.subscribe(began.append, Started)
    session.hydrator.ahead.touched(unit_of(session, uuid))
    time.sleep(0.5)  # it works in threads of its own
    assert began == []


def test_other_readers_do_not_wait_for_a_calculation(
    open_session: Callable[..., Session], make_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = make_project("two", runs=2, size=300_000, report=False)
    command = script(tmp_path, "import time; time.sleep(60)")
    options = {"command": command, "enabled": True}
    stores = (
        StoreSettings(name="lab", url=(tmp_path / "lab").as_uri()),
        StoreSettings(name="again", url="command://again", options=options),
    )
    session = open_session(index=project.index, stores=stores)
    lost, kept = project.runs
    for uuid in project.runs:
        session.evictor.evict(unit_of(session, uuid))
    shutil.rmtree(tmp_path / "lab" / lost)
    fd = os.open(os.path.join(unit_of(session, lost).shadow, b"weights.npy"), os.O_RDONLY)
    partial = session.core.partial(fd)
    assert partial is not None
    failed: list[RunfsError | None] = []
    partial.when_here(0, failed.append)
    for _ in range(20):  # more than there are threads for readers
        partial.flying.clear()
        session.hydrator.request(partial, [0], lost, b"weights.npy")
    began = time.monotonic()
    assert len(weights(session, kept)) > 300_000
    assert time.monotonic() - began < 10
    session.hydrator.close()  # ends the command too
    assert time.monotonic() - began < 20
    os.close(fd)


def test_min_copies_counts_homes_only(open_session: Callable[..., Session], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"min_copies is 2 but only 1 of the stores can be pushed to \(lab\)"):
        open_session(min_copies=2)


def test_a_read_only_store_is_a_source_and_no_home(
    open_session: Callable[..., Session], relaunchable: Project, tmp_path: Path
) -> None:
    uuid = relaunchable.runs[0]
    first = open_session(stores=(StoreSettings(name="archive", url=(tmp_path / "archive").as_uri()),))
    run(first, "push", uuids=[uuid])
    first.evictor.evict(unit_of(first, uuid))
    first.close()

    stores = (
        StoreSettings(name="archive", url=(tmp_path / "archive").as_uri(), options={"read_only": True}),
        StoreSettings(name="lab", url=(tmp_path / "lab").as_uri()),
    )
    session = open_session(stores=stores)
    assert ([home.name for home in session.core.homes], [home.name for home in session.core.sources]) == (
        ["lab"],
        ["archive"],
    )
    assert not run(session, "safe", uuids=[uuid])["safe"]  # the archive's copy does not count
    assert run(session, "stores")["exit"] == 0
    pushed = run(session, "push", uuids=[uuid])  # reads from the archive, writes to the lab
    assert pushed["failed"] == []
    assert {each["store"] for each in pushed["pushed"]} == {"lab"}
    assert run(session, "safe", uuids=[uuid])["safe"]
