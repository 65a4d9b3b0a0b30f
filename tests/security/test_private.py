"""State, cache and sockets are one user's: made 0700 and 0600, looked at at each start, refused when not so."""

import os
import resource
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon import mounts
from daemon.directories import meeting_places, runtime_dir
from tests.core.making import Place
from tests.mounting import Mounted
from tests.mounts import is_fuse_mount
from tests.projects import Project
from tests.security.others import NOBODY
from vfs import linux, mountinfo, places
from vfs.errors import ConfigError
from vfs.private import private_directory, private_files

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


class TestADirectory:
    def test_it_is_made_for_us_alone(self, tmp_path: Path) -> None:
        made = private_directory(tmp_path / "a" / "b", "RUNFS_X")
        assert mode(made) == 0o700
        assert private_directory(made, "RUNFS_X") == made

    @pytest.mark.parametrize("wrong", [0o755, 0o750, 0o711, 0o702, 0o777])
    def test_one_that_is_open_is_refused_with_the_command_that_mends_it(self, tmp_path: Path, wrong: int) -> None:
        made = private_directory(tmp_path / "a", "RUNFS_X")
        made.chmod(wrong)
        with pytest.raises(ConfigError, match=f"mode {wrong:04o}.*chmod 700 {made}"):
            private_directory(made, "RUNFS_X")
        assert mode(made) == wrong, "somebody may have been there: nothing is hidden by mending it quietly"
        made.chmod(0o700)
        private_directory(made, "RUNFS_X")

    @as_root
    def test_somebody_elses_is_refused(self, tmp_path: Path) -> None:
        made = private_directory(tmp_path / "a", "RUNFS_X")
        os.chown(made, NOBODY, NOBODY)
        with pytest.raises(ConfigError, match=f"uid {NOBODY}.*RUNFS_X"):
            private_directory(made, "RUNFS_X")

    @pytest.mark.parametrize("kind", ["link", "file", "fifo"])
    def test_what_is_no_directory_is_refused(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        there = tmp_path / "there"
        make: dict[str, Callable[[], object]] = {
            "link": lambda: there.symlink_to("real"),
            "file": there.touch,
            "fifo": lambda: os.mkfifo(there),
        }
        make[kind]()
        with pytest.raises(ConfigError, match="RUNFS_X"):
            private_directory(there, "RUNFS_X")

    def test_one_that_others_can_exchange_is_refused(self, tmp_path: Path) -> None:
        made = private_directory(tmp_path / "above" / "a", "RUNFS_X")
        made.parent.chmod(0o777)
        with pytest.raises(ConfigError, match=f"chmod o-w {made.parent}"):
            private_directory(made, "RUNFS_X")
        made.parent.chmod(0o1777)  # as /tmp: only its owner can
        private_directory(made, "RUNFS_X")

    @as_root
    def test_files_that_a_start_with_sudo_left_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "journal.sqlite").touch(mode=0o644)
        private_files(tmp_path)
        assert mode(tmp_path / "journal.sqlite") == 0o600
        os.chown(tmp_path / "journal.sqlite", NOBODY, NOBODY)
        with pytest.raises(ConfigError, match=f"journal.sqlite: belongs to uid {NOBODY}.*chown -R"):
            private_files(tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "host")


@pytest.mark.parametrize("which", ["state", "cache"])
def test_a_session_starts_with_nothing_that_others_reach(place: Place, which: str) -> None:
    place.record()
    settings = place.settings()
    with place.session():
        pass
    directory = settings.state if which == "state" else settings.cache_place
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match=f"chmod 700 {directory}"), place.session():
        pass


@pytest.mark.mounted
def test_everything_a_mount_makes_is_closed_to_others(
    project: Project, mount: Callable[..., Mounted], tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    for name in ("s", "c", "r"):
        assert not (tmp_path / name).exists()
    before = os.umask(0)  # the worst that a shell can have
    try:
        mounted = mount(project, stores=[f"file://{tmp_path}/store"])
    finally:
        os.umask(before)
    mounted.json("evict", project.runs[0])
    tops = [*(tmp_path / "s").iterdir(), *(tmp_path / "c").iterdir(), tmp_path / "r"]
    assert len(tops) == 3
    for top in tops:
        assert mode(top) == 0o700, top
    for path in [*tops[0].iterdir(), *(tmp_path / "r").iterdir()]:
        assert mode(path) == 0o600, path
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in (tmp_path / "r").iterdir()}
    assert kinds == {stat.S_IFSOCK, stat.S_IFREG}


@pytest.mark.mounted
def test_a_mount_is_refused_before_anything_is_mounted(project: Project, tmp_path: Path) -> None:
    mounted = Mounted(project, tmp_path / "mnt")
    (tmp_path / "r").mkdir(mode=0o755)
    (tmp_path / "r").chmod(0o755)
    with pytest.raises(AssertionError, match=f"chmod 700 {tmp_path}/r"):
        mounted.start()
    assert not list((tmp_path / "r").iterdir())
    assert not is_fuse_mount(mounted.path)


class TestWhereADaemonIsFound:
    """The command line and the daemon may not agree on the runtime directory."""

    def announced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        monkeypatch.delenv("RUNFS_RUNTIME_DIR", raising=False)
        return {"RUNFS_STATE_DIR": str(tmp_path / "state"), "XDG_RUNTIME_DIR": str(tmp_path / "xdg")}

    def test_by_a_shell_with_another_xdg_runtime_dir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        environ = self.announced(tmp_path, monkeypatch)
        index, mountpoint = tmp_path / "index", tmp_path / "mnt"
        state = private_directory(places.state_of(tmp_path / "state", index), "RUNFS_STATE_DIR")
        with mounts.announced(tmp_path / "other", mountpoint, index, state) as address:
            for shell in (environ, {**environ, "XDG_RUNTIME_DIR": ""}, {**environ, "RUNFS_RUNTIME_DIR": "/nowhere"}):
                assert mounts.runtime_of(shell, mountpoint) == tmp_path / "other"
                (found,) = [each for each in mounts.running_anywhere(shell) if each.index == str(index)]
                assert (found.socket, found.pid) == (address, os.getpid())
        assert mounts.runtime_of(environ, mountpoint) == runtime_dir(environ) == tmp_path / "xdg" / "runfs"
        assert not list(state.iterdir())

    def test_the_living_one_of_two(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A daemon that was killed in another shell has left its word."""
        environ = self.announced(tmp_path, monkeypatch)
        index, mountpoint = tmp_path / "index", tmp_path / "mnt"
        usual = private_directory(tmp_path / "xdg" / "runfs", "RUNFS_RUNTIME_DIR")
        left = places.info_of(usual, mountpoint)
        left.write_text(f'{{"pid": {2**22 + 1}, "mountpoint": "{mountpoint}", "index": "x", "started_at": 9e12}}')
        assert mounts.runtime_of(environ, mountpoint) == usual
        state = private_directory(places.state_of(tmp_path / "state", index), "RUNFS_STATE_DIR")
        with mounts.announced(tmp_path / "other", mountpoint, index, state):
            assert mounts.runtime_of(environ, mountpoint) == tmp_path / "other"

    @as_root
    def test_not_where_somebody_else_made_the_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Anybody can make /tmp/runfs-1000 first."""
        environ = self.announced(tmp_path, monkeypatch)
        with mounts.announced(tmp_path / "xdg" / "runfs", tmp_path / "mnt", tmp_path / "index"):
            assert [each.mountpoint for each in mounts.running_anywhere(environ)].count(str(tmp_path / "mnt")) == 1
            os.chown(tmp_path / "xdg" / "runfs", NOBODY, NOBODY)
            assert str(tmp_path / "mnt") not in [each.mountpoint for each in mounts.running_anywhere(environ)]

    def test_every_place_that_could_be_meant(self) -> None:
        uid = os.geteuid()
        assert meeting_places({"RUNFS_RUNTIME_DIR": "/x"}) == (Path("/x"),)
        found = meeting_places({"XDG_RUNTIME_DIR": "/y"})
        assert {Path("/y/runfs"), Path(f"/run/user/{uid}/runfs"), Path(f"/tmp/runfs-{uid}")} <= set(found)

    @pytest.mark.mounted
    def test_a_mount_of_another_shell_is_not_taken_for_dead(
        self, project: Project, mount: Callable[..., Mounted], tmp_path: Path
    ) -> None:
        """Mounting there again, and umount, took it away from under its users."""
        mounted = mount(project)
        elsewhere = {"RUNFS_RUNTIME_DIR": str(tmp_path / "r2")}
        environment = dict(mounted.environment)
        mounted.environment |= elsewhere
        assert mounted.json("status")["mountpoint"] == str(mounted.path)  # found through the state directory
        again = mounted.runfs("mount", str(mounted.path), "--project", str(project.path))
        assert again.returncode == 2
        assert "is mounted already" in again.stderr
        mounted.environment |= {"RUNFS_STATE_DIR": str(tmp_path / "s2")}  # nothing in common any more
        again = mounted.runfs("mount", str(mounted.path), "--project", str(project.path))
        assert (again.returncode, "RUNFS_RUNTIME_DIR" in again.stderr) == (2, True)
        gone = mounted.runfs("umount", str(mounted.path))
        assert (gone.returncode, "no control socket of it is known" in gone.stderr) == (2, True)
        assert mountinfo.is_served(mounted.path)
        mounted.environment = environment


def test_the_kernel_writes_no_dump_of_a_daemon(tmp_path: Path) -> None:
    """RLIMIT_CORE is of no use where core_pattern is a pipe, as with systemd-coredump."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        linux.keep_out_of_core_dumps()
        os.write(writing, b"%d" % os.stat("/proc/self/environ").st_uid)
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.kill(os.getpid(), signal.SIGQUIT)
    _pid, status = os.waitpid(child, 0)
    os.close(writing)
    os.close(reading)
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert not list(tmp_path.glob("core*"))


def test_a_socket_is_made_in_a_private_directory_only(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        private_directory(tmp_path / "r", "RUNFS_RUNTIME_DIR")
        probe.bind(str(tmp_path / "r" / "x.sock"))
    (tmp_path / "r").chmod(0o770)
    with pytest.raises(ConfigError), mounts.announced(tmp_path / "r", tmp_path / "mnt", tmp_path / "index"):
        pass
