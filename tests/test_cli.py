"""The command line as people and scripts use it: text, JSON, exit codes, and where a command finds its daemon."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import cli, complete, launch, mounts, systemd, unmount
from daemon.terminal import Reporter
from tests.fake_session import FakeSession, fake_daemon
from vfs.errors import MountpointError, RunfsError
from vfs.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command of a test works in a directory of its own, with no configuration and no mount."""
    for name in [name for name in os.environ if name.startswith(("RUNFS_", "MACHINABLE_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"RUNFS_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


@pytest.fixture
def session(place: Path) -> Iterator[FakeSession]:
    """The only daemon there is; it serves the project of the current directory."""
    index = place / "work" / ".machinable.sqlite"
    index.touch()
    with fake_daemon(place / "runtime", place / "mnt", index) as daemon:
        yield daemon.session


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        code = cli.main(arguments)
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err)


@pytest.fixture
def runfs(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


class TestAnswers:
    def test_text_and_exit_code(self, runfs: Shell, session: FakeSession) -> None:
        ran = runfs("safe")
        assert ran.code == 1
        assert ran.out.splitlines() == [
            "not yet: 5 files (1.2 GB) are only on this disk; lab takes them at 118 MB/s, about 11 s",
            "qcmIdGsGCpwS: log.txt is dirty, 1.2 GB",
        ]
        assert ran.err == ""

    def test_json(self, runfs: Shell, session: FakeSession) -> None:
        ran = runfs("status", "--json")
        assert (ran.code, ran.json["records"], ran.out.count("\n")) == (0, 1284, 1)

    def test_an_error_is_one_line_and_json(self, runfs: Shell, session: FakeSession) -> None:
        ran = runfs("evict", "qcmIdGsGCpwS", "--json")
        assert ran.code == 1
        assert ran.err == "runfs: qcmIdGsGCpwS is live; wait until it has finished\n"
        assert ran.json == {
            "error": {"type": "Refused", "message": "qcmIdGsGCpwS is live; wait until it has finished", "exit": 1}
        }

    def test_a_listing_in_pages(self, runfs: Shell, session: FakeSession) -> None:
        ran = runfs("ls", "--json")
        assert [record["uuid"] for record in ran.json["records"]] == ["a" * 12, "b" * 12]
        text = runfs("ls", "--where", "kind=Execution").out
        assert "a" * 12 in text
        assert "b" * 12 in text
        assert "2.1 GB" in text
        assert "\x1b" not in text  # a label must not move the cursor
        assert session.calls[-1][1]["where"] == "kind=Execution"

    def test_arguments_as_the_session_gets_them(self, runfs: Shell, session: FakeSession) -> None:
        runfs("evict", "--where", "age>30d", "--older-than", "12h", "--until-free", "1.5GiB", "--dry-run")
        assert session.calls[-1] == (
            "evict",
            {
                "uuids": [],
                "all": False,
                "where": "age>30d",
                "older_than": 43200.0,
                "until_free": 1_610_612_736,
                "dry_run": True,
            },
        )
        runfs("push", "a", "b")
        assert session.calls[-1] == ("push", {"uuids": ["a", "b"], "dry_run": False})

    def test_paths_and_uuids_for_status(self, runfs: Shell, session: FakeSession, place: Path) -> None:
        runfs("status", "qcmIdGsGCpwS", "dir/file", "/abs")
        assert session.calls[-1][1] == {"paths": ["qcmIdGsGCpwS", str(place / "work" / "dir" / "file"), "/abs"]}

    def test_uuids_from_stdin(self, place: Path, session: FakeSession) -> None:
        done = in_process("pin", "-", "--json", input_text="a\n\nb\n")
        assert json.loads(done.stdout)["changed"] == ["a", "b"]


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("evct",), "Did you mean 'evict'?"),
            (("evict",), "--where, --older-than, --until-free or --all"),
            (("evict", "a", "--all"), "not both"),
            (("evict", "--older-than", "30"), "--older-than: '30' is not an age"),
            (("evict", "--until-free", "much"), "--until-free: 'much' is not a size"),
            (("evict", "--where", "lable=x"), "did you mean label"),
            (("ls", "--where", "kind"), "kind=Execution"),
            (("pin",), "at least one uuid"),
            (("hydrate",), "at least one uuid"),
            (("push", "--stroe", "x"), "--store"),
            (("mount",), "mountpoint"),
            (("umount", "/x", "--timeout", "-1"), "--timeout"),
            (("umount", "/x", "--timeout", "nan"), "--timeout"),
            (("mount", "/x", "-o", "alow_other"), "allow_other"),
            (("config", "shw"), "show"),
            (("status", "--config", "/nonexistent.toml", "--index", "x"), "no such configuration file"),
            (("safe",), "no index here"),
        ],
    )
    def test_wrong_usage(self, runfs: Shell, arguments: tuple[str, ...], says: str) -> None:
        ran = runfs(*arguments)
        assert ran.code == 2
        assert says in ran.err
        assert ran.err.startswith("runfs: ")
        assert ran.err.count("\n") == 1
        assert runfs(*arguments, "--json").json["error"]["exit"] == 2

    @pytest.mark.parametrize("group", [(), ("config",), ("versions",), ("transaction",)])
    def test_a_group_alone_asks_which_command(self, runfs: Shell, group: tuple[str, ...]) -> None:
        ran = runfs(*group)
        assert ran.code == 2
        assert ran.err.startswith("runfs: which command? (see ")

    @pytest.mark.parametrize("url", ["s3://b?secret_access_key=hush", "http://user:hush@host/"])
    def test_a_secret_in_the_url_of_a_store_is_never_repeated(self, runfs: Shell, place: Path, url: str) -> None:
        for verb in ("check", "sweep"):
            ran = runfs("stores", verb, url)
            assert ran.code == 2
            assert "the environment or [stores.NAME.options]" in ran.err
            assert "hush" not in ran.out + ran.err
        assert not list(place.rglob("trace-*"))

    def test_help_names_every_command(self, runfs: Shell) -> None:
        text = runfs("--help").out
        commands = (
            "mount umount status ls evict hydrate pin unpin push safe verify reindex import stores receipts doctor"
        )
        for command in [*commands.split(), "config", "systemd"]:
            assert f" {command} " in text
            ran = runfs(command, "--help")
            assert ran.code == 0
            if command not in ("config", "systemd"):
                assert "--json" in ran.out

    def test_what_was_not_expected_is_one_line_and_a_kept_trace(
        self, runfs: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise LookupError("odd")

        monkeypatch.setattr(cli, "perform", broken)
        ran = runfs("doctor")
        assert ran.code == 1
        assert ran.err.startswith("runfs: unexpected LookupError: odd. The traceback is in ")
        (trace,) = (place / "state").glob("trace-*.txt")
        assert "LookupError: odd" in trace.read_text()
        monkeypatch.setenv("RUNFS_DEBUG", "1")
        with pytest.raises(LookupError):
            cli.main(["doctor"])


class TestTarget:
    """Whom a command asks."""

    def test_by_mountpoint(self, runfs: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with (
            fake_daemon(place / "runtime", place / "one", place / "i1") as one,
            fake_daemon(place / "runtime", place / "two", place / "i2") as two,
        ):
            assert runfs("pin", "a", "--mount", str(place / "one")).code == 0
            assert (len(one.session.calls), len(two.session.calls)) == (1, 0)
            monkeypatch.setenv("RUNFS_MOUNT", str(place / "two"))
            assert runfs("pin", "a").code == 0
            assert (len(one.session.calls), len(two.session.calls)) == (1, 1)
            assert runfs("pin", "a", "--mount", str(place / "one")).code == 0
            assert len(one.session.calls) == 2

    def test_by_project_and_else_it_must_be_clear(self, runfs: Shell, place: Path) -> None:
        (place / "work" / "deep").mkdir()
        (place / "work" / ".machinable.sqlite").touch()
        os.chdir(place / "work" / "deep")
        with (
            fake_daemon(place / "runtime", place / "one", place / "work" / ".machinable.sqlite") as one,
            fake_daemon(place / "runtime", place / "two", place / "i2") as two,
        ):
            assert runfs("pin", "a").code == 0
            assert (len(one.session.calls), len(two.session.calls)) == (1, 0)
            assert runfs("pin", "a", "--index", str(place / "i2")).code == 0
            assert (len(one.session.calls), len(two.session.calls)) == (1, 1)
            os.chdir(place)
            ran = runfs("pin", "a")
            assert ran.code == 2
            assert f"{place / 'one'}" in ran.err
            assert f"{place / 'two'}" in ran.err
            assert "--mount" in ran.err

    def test_the_only_mount(self, runfs: Shell, place: Path) -> None:
        os.chdir(place)
        with fake_daemon(place / "runtime", place / "one", place / "i1") as one:
            assert runfs("pin", "a").code == 0
            assert len(one.session.calls) == 1

    def test_a_mount_that_is_not_there(self, runfs: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = runfs("status", "--mount", str(place / "none"))
        assert ran.code == 2
        assert "nothing mounted at" in ran.err
        monkeypatch.setenv("RUNFS_MOUNT", str(place / "none"))
        assert "unset it" in runfs("status").err
        with fake_daemon(place / "runtime", place / "one", place / "i1"):
            assert str(place / "one") in runfs("status").err

    def test_a_mount_has_its_own_stores(self, runfs: Shell, session: FakeSession) -> None:
        ran = runfs("push", "--store", "memory://x")
        assert ran.code == 2
        assert "leave out --store" in ran.err

    def test_a_dead_daemons_announcement_is_passed_over(self, runfs: Shell, place: Path) -> None:
        os.chdir(place)
        with mounts.announced(place / "runtime", place / "dead", place / "i"):
            ran = runfs("status")
        assert ran.code == 2
        assert "no index here" in ran.err


def in_process(*arguments: str, input_text: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    program = ["-m", "daemon.cli"] if not code else ["-c", code]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", *program, *arguments],
        input=input_text,
        capture_output=True,
        text=True,
        env=environ,
        check=False,
        timeout=60,
    )


class TestProcess:
    def test_a_command_that_a_daemon_answers_loads_nothing_heavy(self, session: FakeSession) -> None:
        heavy = ("pyfuse3", "opendal", "trio", "apsw", "rich", "asyncio", "vfs.session")
        code = "import sys; from daemon.cli import main; code = main(sys.argv[1:]); "
        code += f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
        done = in_process("status", code=code)
        assert done.stdout.startswith("resident  961 records  388.0 GB")
        assert done.stderr == "[]\n"

    def test_a_reader_that_stops_early(self, session: FakeSession) -> None:
        command = f"{sys.executable} -m daemon.cli status --json | true"
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environ, check=False)
        assert done.stderr == ""

    def test_names_that_are_no_text_can_be_printed(self, place: Path) -> None:
        done = in_process("status", "--mount", os.fsdecode(b"/x\xff"))
        assert done.returncode == 2
        assert "nothing mounted" in done.stderr

    def test_version_and_module(self) -> None:
        assert in_process("--help").returncode == 0


class TestCompletion:
    def complete(self, words: str) -> list[str]:
        environ = {
            "_RUNFS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        os.environ.update(environ)
        try:
            return in_process(code="import sys; from daemon.cli import main; sys.exit(main([]))").stdout.split()
        finally:
            for name in environ:
                del os.environ[name]

    def test_commands(self) -> None:
        assert self.complete("runfs ev") == ["evict"]

    def test_uuids_from_the_index(self, place: Path) -> None:
        make_rows(place / "work" / ".machinable.sqlite", ("abc1", "abc2", "b1"))
        assert self.complete("runfs status abc") == ["abc1", "abc2"]
        assert self.complete("runfs evict abc1") == ["abc1"]

    def test_mountpoints(self, place: Path) -> None:
        with mounts.announced(place / "runtime", place / "mnt", place / "i"):
            assert self.complete("runfs umount /") == [str(place / "mnt")]
            assert complete.mountpoints("/nowhere") == []

    def test_trouble_offers_nothing(self, place: Path) -> None:
        (place / "work" / ".machinable.sqlite").write_text("this is no database")
        assert self.complete("runfs status a") == []


def make_rows(index: Path, uuids: tuple[str, ...]) -> None:
    from vfs.index import Index

    Index.open(index, create=True).close()
    import apsw

    connection = apsw.Connection(str(index))
    needed = [name for _, name, _, needed, default, _ in connection.execute('PRAGMA table_info("index")') if needed]
    names = list(dict.fromkeys(["record_id", "kind", "storage_uri", *needed]))
    marks = ", ".join("?" for _ in names)
    for uuid in uuids:
        known = {"record_id": uuid, "kind": "Execution", "storage_uri": f"file:///{uuid}"}
        values = [known.get(name, 0) for name in names]
        connection.execute(f'INSERT INTO "index" ({", ".join(names)}) VALUES ({marks})', values)
    connection.close()


class TestLaunch:
    """The background daemon, with a small program in its place."""

    def settings(self, place: Path) -> Settings:
        return Settings(
            index=place / "index",
            mountpoint=place / "mnt",
            state_dir=place / "state",
            cache_dir=place / "cache",
            runtime_dir=place / "runtime",
        )

    def start(self, place: Path, body: str) -> dict[str, Any]:
        script = place / "fake.py"
        head = "import os, sys, time\nfd = int(sys.argv[sys.argv.index('--ready-fd') + 1])\n"
        script.write_text(head + body)
        return launch.start(self.settings(place), ["mount", "x"], [sys.executable, str(script)])

    def test_it_returns_when_the_mount_answers(self, place: Path) -> None:
        ready_line = 'b\'{"ready": {"pid": %d, "session": %d}}\\n\' % (os.getpid(), os.getsid(0))'
        body = f"time.sleep(0.3); os.write(fd, {ready_line})\n"
        body += "time.sleep(1)\nopen('" + str(place / "lived") + "', 'w').close()"
        started = time.monotonic()
        ready = self.start(place, body)
        assert 0.3 <= time.monotonic() - started < 1.2
        assert ready["session"] == ready["pid"] != os.getsid(0)
        wait_for(lambda: (place / "lived").exists())
        os.waitpid(ready["pid"], 0)

    def test_its_error_is_ours(self, place: Path) -> None:
        error = '{"error": {"type": "MountpointError", "message": "it is busy", "exit": 2}}'
        with pytest.raises(MountpointError, match="it is busy"):
            self.start(place, f"os.write(fd, b'{error}\\n'); sys.exit(2)")

    def test_one_that_dies_leaves_the_end_of_its_log(self, place: Path) -> None:
        with pytest.raises(RunfsError, match=r"exit 3.*daemon\.log.*the disk is on fire") as caught:
            self.start(place, "print('the disk is on fire', file=sys.stderr); sys.exit(3)")
        assert caught.value.exit_code == 1

    def test_the_mountpoint(self, place: Path) -> None:
        settings = self.settings(place)
        (place / "mnt").mkdir()
        assert launch.check_mountpoint(settings) == []
        (place / "mnt" / "file").touch()
        cases = {place / "mnt": "not empty", place / "none": "mkdir -p", place / "mnt" / "file": "not a directory"}
        cases |= {Path("/proc"): "proc is mounted there"}
        for path, says in cases.items():
            with pytest.raises(MountpointError, match=says):
                launch.check_mountpoint(settings.model_copy(update={"mountpoint": path}))

    def test_a_mountpoint_that_would_hide_the_index(self, place: Path) -> None:
        (place / "empty").mkdir()
        settings = self.settings(place).model_copy(
            update={"mountpoint": place / "empty", "index": place / "empty" / "i"}
        )
        with pytest.raises(MountpointError, match="holds the index"):
            launch.check_mountpoint(settings)

    def test_dry_run(self, runfs: Shell, place: Path) -> None:
        (place / "work" / ".machinable.sqlite").touch()
        (place / "mnt").mkdir()
        ran = runfs("mount", str(place / "mnt"), "--store", "memory://a", "-o", "cache.high=50%", "--dry-run", "--json")
        assert ran.code == 0
        assert ran.json["settings"]["cache"]["high"] == "50%"
        assert ran.json["settings"]["mountpoint"] == str(place / "mnt")
        assert "would serve" in runfs("mount", str(place / "mnt"), "--dry-run").out


def wait_for(condition: Any, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestUmount:
    def test_nothing_there(self, runfs: Shell, place: Path) -> None:
        ran = runfs("umount", str(place / "mnt"))
        assert (ran.code, ran.err) == (2, f"runfs: runfs has nothing mounted at {place / 'mnt'}\n")

    def test_somebody_elses(self, runfs: Shell) -> None:
        ran = runfs("umount", "/proc")
        assert ran.code == 2
        assert "not runfs; use umount /proc" in ran.err

    def test_a_dry_run_says_what_is_pending(self, runfs: Shell, session: FakeSession, place: Path) -> None:
        ran = runfs("umount", str(place / "mnt"), "--dry-run")
        assert ran.code == 1
        assert ran.out.startswith("not yet: 5 files (1.2 GB)")

    def test_what_could_not_be_pushed_is_said(self, runfs: Shell, place: Path) -> None:
        class Ending(FakeSession):
            """Ends its daemon with the answer, as the real one does."""

            def run_umount(self, args: dict[str, Any], progress: Any) -> dict[str, Any]:
                assert args == {"timeout": 3.0}
                answer = super().run_umount(args, progress)
                daemon.stop_soon()
                return answer

        with fake_daemon(place / "runtime", place / "mnt", place / "i", Ending()) as daemon:
            ran = runfs("umount", str(place / "mnt"), "--timeout", "3")
        assert ran.code == 1
        assert "5 files (1.2 GB) not yet in the homes" in ran.out

    @pytest.mark.mounted
    def test_a_dead_mount_is_taken_away(self, runfs: Shell, dead_mount: Path) -> None:
        assert "its daemon is gone" in runfs("status", "--mount", str(dead_mount)).err
        ran = runfs("umount", str(dead_mount), "--json")
        assert (ran.code, ran.json["how"]) == (0, "stale")
        assert mounts.mounted_at(dead_mount) is None

    @pytest.mark.mounted
    def test_a_new_mount_takes_a_dead_one_away(self, place: Path, dead_mount: Path) -> None:
        (note,) = launch.check_mountpoint(TestLaunch().settings(place))
        assert "cleaned up" in note
        assert mounts.mounted_at(dead_mount) is None
        assert launch.check_mountpoint(TestLaunch().settings(place)) == []

    @pytest.mark.mounted
    def test_a_dead_mount_with_an_announced_live_process_is_left_alone(self, place: Path, dead_mount: Path) -> None:
        with (
            mounts.announced(place / "runtime", dead_mount, place / "i"),
            pytest.raises(MountpointError, match="does not answer"),
        ):
            launch.check_mountpoint(TestLaunch().settings(place))

    def test_it_waits_until_the_daemon_has_gone(self, place: Path) -> None:
        with fake_daemon(place / "runtime", place / "mnt", place / "i") as daemon:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(unmount, "GONE_S", 0.1)
                with pytest.raises(MountpointError, match="still mounted"):
                    unmount.unmount(place / "runtime", place / "mnt", 1.0, Reporter(shown=False))
            assert daemon.session.calls == [("umount", {"timeout": 1.0})]


@pytest.mark.mounted
class TestRealMount:
    """The daemon itself, in the background, on a real mountpoint."""

    @pytest.fixture
    def mountpoint(self, place: Path) -> Iterator[Path]:
        make_rows(place / "work" / ".machinable.sqlite", ())
        (place / "mnt").mkdir()
        yield place / "mnt"
        for entry in mounts.running(place / "runtime"):
            os.kill(entry.pid, 9)
        if mounts.mounted_at(place / "mnt") is not None:
            unmount.detach(place / "mnt")

    def test_from_mount_to_umount(self, runfs: Shell, place: Path, mountpoint: Path) -> None:
        ran = runfs("mount", str(mountpoint), "--store", f"lab=file://{place / 'home'}")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"{mountpoint}: 0 records, 0 evicted; lab: reachable")
        found = mounts.mounted_at(mountpoint)
        assert found is not None
        assert found.is_runfs
        (entry,) = mounts.running(place / "runtime")
        assert runfs("status", "--json").json["mountpoint"] == str(mountpoint)
        again = runfs("mount", str(mountpoint))
        assert again.code == 2
        assert "mounted already" in again.err
        (place / "other").mkdir()
        second = runfs("mount", str(place / "other"))
        assert second.code == 2
        assert f"process {entry.pid}" in second.err
        ran = runfs("umount", str(mountpoint))
        assert (ran.code, ran.out) == (0, f"{mountpoint}: unmounted; nothing is left to push\n")
        assert mounts.mounted_at(mountpoint) is None
        assert mounts.running(place / "runtime") == []
        ran = runfs("mount", str(mountpoint))  # at once, and with the same stores
        assert ran.code == 0
        assert "lab: reachable" in ran.out
        assert "using the last mount's: lab" in ran.err
        assert runfs("umount", str(mountpoint), "--json").json["how"] == "drained"

    def test_after_a_kill_the_next_mount_starts(self, runfs: Shell, place: Path, mountpoint: Path) -> None:
        assert runfs("mount", str(mountpoint)).code == 0
        (entry,) = mounts.running(place / "runtime")
        os.kill(entry.pid, 9)
        os.waitpid(entry.pid, 0)
        assert "its daemon is gone" in runfs("status", "--mount", str(mountpoint)).err
        ran = runfs("mount", str(mountpoint), "--json")
        assert (ran.code, ran.json["records"]) == (0, 0)
        assert "cleaned up" in ran.err
        assert os.listdir(mountpoint) == []
        assert runfs("umount", str(mountpoint)).code == 0

    def test_a_start_that_fails_says_why(self, runfs: Shell, place: Path, mountpoint: Path) -> None:
        (place / "work" / ".machinable.sqlite").write_bytes(b"this is no database, but it is long enough" * 100)
        ran = runfs("mount", str(mountpoint), "--json")
        assert ran.code == 2
        assert ran.json["error"]["type"] == "IndexCorrupt"
        assert mounts.mounted_at(mountpoint) is None

    def test_in_the_foreground_until_it_is_told_to_stop(self, place: Path, mountpoint: Path) -> None:
        command = [sys.executable, "-m", "daemon.cli", "mount", str(mountpoint), "--foreground"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdout.readline().startswith(f"{mountpoint}: 0 records")
            daemon.terminate()
            assert daemon.wait(30) == 0
        assert mounts.mounted_at(mountpoint) is None


@pytest.fixture
def dead_mount(place: Path) -> Iterator[Path]:
    """What a daemon leaves that was killed."""
    mountpoint = place / "mnt"
    mountpoint.mkdir()
    code = (
        "import os, sys, pyfuse3; pyfuse3.init(pyfuse3.Operations(), sys.argv[1], {'fsname=runfs', 'subtype=runfs'}); "
    )
    code += "os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(mountpoint)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert mounts.mounted_at(mountpoint) is not None
    yield mountpoint
    if mounts.mounted_at(mountpoint) is not None:
        unmount.detach(mountpoint)


class TestSystemd:
    def test_units_have_the_path_of_this_program(self, runfs: Shell, place: Path) -> None:
        (place / "root").mkdir()
        result = systemd.install(user=False, mountpoint=Path("/mnt/my-runs"), dry_run=False, root=place / "root")
        unit = place / "root" / "etc/systemd/system/runfs@.service"
        command = " ".join(systemd.runfs_command())
        assert f"ExecStart={command} mount %f --foreground" in unit.read_text()
        assert f"ExecStop={command} umount %f" in unit.read_text()
        assert os.access(place / "root" / "sbin/mount.runfs", os.X_OK)
        assert any(r"runfs@mnt-my\x2druns.service" in step for step in result["next"])

    def test_user_units_and_dry_run(self, runfs: Shell, place: Path) -> None:
        ran = runfs("systemd", "install", "--user", "--dry-run", "--json")
        (entry,) = ran.json["files"]
        assert entry["path"] == str(place / "home/.config/systemd/user/runfs-user@.service")
        assert not Path(entry["path"]).exists()
        assert runfs("systemd", "install", "--user").code == 0
        assert Path(entry["path"]).read_text() == entry["content"]

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("/mnt/runs", "mnt-runs"),
            ("/", "-"),
            ("/home/me/my runs", r"home-me-my\x20runs"),
            ("/.a/.b", r"\x2ea-.b"),
            ("/a-b//c/", r"a\x2db-c"),
            ("/é", r"\xc3\xa9"),
        ],
    )
    def test_escaping(self, path: str, name: str) -> None:
        assert systemd.escaped(Path(path)) == name


def test_config_commands(runfs: Shell, place: Path) -> None:
    assert runfs("config", "path").out == f"{place / 'home/.config/runfs/config.toml'}\n"
    assert runfs("config", "show", "--json").json["settings"]["min_copies"] == {"value": 1, "origin": "default"}
    assert "min_copies = 1  # default" in runfs("config", "show").out
    assert runfs("config", "check").code == 0
    bad = place / "bad.toml"
    bad.write_text("min_copis = 1")
    ran = runfs("config", "check", "--config", str(bad))
    assert ran.code == 2
    assert "did you mean 'min_copies'?" in ran.err


def test_the_names_of_records(place: Path) -> None:
    assert cli.record_names(["abc", "abc/"]) == ["abc", str(place / "work" / "abc")]
    assert cli.record_names(None) == []
