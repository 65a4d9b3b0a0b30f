"""What is shipped beside the packages: the lock, the units and the mount helper."""

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELPER = ROOT / "systemd" / "mount.runfs"
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# -- requirements.lock


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sections() -> dict[str, list[str]]:
    """Names in each section of the lock."""
    found: dict[str, list[str]] = {}
    for part in LOCK.split("# section: ")[1:]:
        title, _, body = part.partition("\n")
        found[title] = re.findall(r"^([A-Za-z0-9._-]+)==", body, re.MULTILINE)
    return found


def test_every_requirement_is_exact_and_hashed() -> None:
    body = re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE).replace("\\\n", " ")
    lines = body.splitlines()
    assert len(lines) > 40
    for line in lines:
        assert re.match(r"[a-z0-9.-]+==\S+( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*$", line), line[:100]


def test_the_lock_holds_no_address() -> None:
    assert "://" not in LOCK
    assert not re.search(r"--(index|extra-index|find-links|trusted)|^-[if] ", LOCK, re.MULTILINE)


SECTIONS = ["runtime", "demo", "test", "bench"]  # each is installed after those before it


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_holds_what_pyproject_asks_for(section: str) -> None:
    """`make lock` was not forgotten after a change of dependencies."""
    asked = PROJECT["dependencies"] if section == "runtime" else PROJECT["optional-dependencies"][section]
    names = {canonical(re.split(r"[<>=!~ ;\[]", each)[0]) for each in asked}
    assert names <= {name for each in SECTIONS[: SECTIONS.index(section) + 1] for name in sections()[each]}


def test_no_requirement_is_in_two_sections() -> None:
    found = sections()
    assert list(found) == SECTIONS
    every = [name for section in SECTIONS for name in set(found[section])]  # one Python may want another version
    assert sorted(every) == sorted(set(every))


# -- systemd units


@pytest.mark.parametrize(("unit", "options"), [("runfs@", []), ("runfs-user@", ["--user"])])
def test_systemd_accepts_the_unit(unit: str, options: list[str], tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (ROOT / "systemd" / f"{unit}.service").read_text()
    # systemd looks for the programs named, and runfs is installed nowhere on this machine.
    text = re.sub(r"(/usr/local|%h/.local)/bin/runfs", "/bin/true", text)
    (tmp_path / f"{unit}mnt-runs.service").write_text(text)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        ["systemd-analyze", *options, "verify", str(tmp_path / f"{unit}mnt-runs.service")],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "mnt-runs.service" not in done.stderr  # no warning about it either


@pytest.mark.parametrize("unit", ["runfs@", "runfs-user@"])
def test_a_unit_waits_longer_than_the_drain_it_starts(unit: str) -> None:
    text = (ROOT / "systemd" / f"{unit}.service").read_text()
    drain = re.search(r"^ExecStop=\S+ umount %f --timeout (\d+)$", text, re.MULTILINE)
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert drain is not None
    assert stop is not None
    assert int(stop[1]) > int(drain[1])
    assert "Type=notify" in text
    # With a mount namespace of its own nobody else would see the mount.
    assert not re.search(r"^(Private|Protect|ReadOnly|Inaccessible|NoNewPrivileges)", text, re.MULTILINE)


# -- mount.runfs

Mount = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mount_runfs(tmp_path: Path) -> Mount:
    """Runs the helper with a `runfs` on the PATH that prints its arguments, one a line."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "runfs"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit "${FAKE_EXIT:-0}"\n')
    fake.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [str(HELPER), *arguments], env={"PATH": path, **environment}, capture_output=True, text=True, timeout=20
        )

    return run


@pytest.fixture
def spec(tmp_path: Path) -> str:
    place = tmp_path / "my study"
    place.mkdir()
    return str(place)


def test_a_directory_is_a_project_and_a_file_an_index(mount_runfs: Mount, spec: str) -> None:
    assert mount_runfs(spec, "/mnt/x").stdout.splitlines() == ["mount", "/mnt/x", "--project", spec]
    index = Path(spec) / "index.sqlite"
    index.touch()
    assert mount_runfs(str(index), "/mnt/x").stdout.splitlines() == ["mount", "/mnt/x", "--index", str(index)]


def test_a_line_of_fstab_becomes_a_command_line(mount_runfs: Mount, spec: str) -> None:
    line = "rw,_netdev,nofail,x-systemd.automount,noauto,user,allow_other,config=/etc/runfs/a.toml,store=file:///b?x=1"
    done = mount_runfs(spec, "/mnt/my runs", "-n", "-s", "-t", "runfs", "-o", line + ",max_read=131072,noatime,store=s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("mount", "/mnt/my runs", "--project", spec, "--allow-other", "--config", "/etc/runfs/a.toml"),
        *("--store", "file:///b?x=1", "--store", "s", "-o", "max_read=131072,noatime"),
    ]


def test_options_are_never_taken_for_patterns_or_words(mount_runfs: Mount, spec: str) -> None:
    done = mount_runfs(spec, "/mnt/x", "-o", "ro,fsname=a b *,subtype=$(id)")
    assert done.stdout.splitlines()[4:] == ["--read-only", "-o", "fsname=a b *,subtype=$(id)"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{spec}"], 1, "are needed"),
        (["{spec}", "/mnt/x", "/mnt/y"], 1, "one argument too many: /mnt/y"),
        (["{spec}", "/mnt/x", "-o"], 1, "-o needs options"),
        (["{spec}", "/mnt/x", "-o", "config="], 1, "the option config needs a value"),
        (["{spec}", "/mnt/x", "-o", "remount,ro"], 32, "cannot be remounted"),
        (["/nowhere/at/all", "/mnt/x"], 32, "neither a project directory nor an index file"),
    ],
)
def test_wrong_usage_is_explained(mount_runfs: Mount, spec: str, arguments: list[str], code: int, message: str) -> None:
    done = mount_runfs(*(each.format(spec=spec) for each in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def test_a_failed_mount_ends_with_32(mount_runfs: Mount, spec: str) -> None:
    assert mount_runfs(spec, "/mnt/x", FAKE_EXIT="2").returncode == 32


def test_fake_does_nothing(mount_runfs: Mount, spec: str) -> None:
    done = mount_runfs(spec, "/mnt/x", "-f")
    assert (done.returncode, done.stdout) == (0, "")


def test_without_runfs_it_says_where_it_looked(spec: str) -> None:
    if Path("/usr/local/bin/runfs").exists():
        pytest.skip("runfs is installed in /usr/local/bin")
    done = subprocess.run(
        [str(HELPER), spec, "/mnt/x"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 32
    assert "no runfs on the PATH (/usr/bin:/bin:/usr/local/bin)" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_setuid_runs_the_daemon_as_that_user(spec: str) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are closed to other users
        Path(place).chmod(0o755)
        program = Path(place) / "runfs"
        program.write_text('#!/bin/sh\nid -un\nprintf "%s\\n" "$HOME" "$1"\n')
        program.chmod(0o755)
        done = subprocess.run(
            [str(HELPER), spec, "/mnt/x", "-o", "setuid=nobody"],
            env={"PATH": f"{place}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["nobody", "/nonexistent", "mount"]
