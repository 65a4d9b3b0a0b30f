"""A user who is not root mounts, works, evicts and unmounts: by fusermount3, without passthrough."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import projects
from tests.projects import Project
from tests.security.others import UID, Ordinary, cannot_be_another

_why = cannot_be_another()
pytestmark = [pytest.mark.mounted, pytest.mark.skipif(_why is not None, reason=_why or "")]

WORK = """
cd $PLACE/project
$RUNFS mount $PLACE/mnt --project $PLACE/project --store file://$PLACE/store
test "$(stat -c %u $PLACE/mnt)" = $(id -u)
grep -q " $PLACE/mnt .*nosuid,nodev.* fuse.runfs .*user_id=$(id -u)," /proc/self/mountinfo
! grep " $PLACE/mnt " /proc/self/mountinfo | grep -q allow_other
$RUNFS status --json >$PLACE/out/status.json
sha256sum <$PLACE/mnt/$UUID/weights.npy
$RUNFS evict $UUID --json >$PLACE/out/evict.json
test -L $PLACE/project/storage/*/*
sha256sum <$PLACE/mnt/$UUID/weights.npy
echo more >>$PLACE/mnt/$UUID/log.txt
dd if=/dev/zero of=$PLACE/mnt/$UUID/zeros bs=1M count=3 status=none
chmod 600 $PLACE/mnt/$UUID/zeros
ln $PLACE/mnt/$UUID/zeros $PLACE/mnt/$UUID/second
mv $PLACE/mnt/$UUID/second $PLACE/mnt/$UUID/third
$RUNFS push $UUID
$RUNFS safe
env -u HOME XDG_RUNTIME_DIR=/nowhere $RUNFS status --mount $PLACE/mnt --json >$PLACE/out/other.json || true
XDG_RUNTIME_DIR=$PLACE/out $RUNFS status --mount $PLACE/mnt --json >$PLACE/out/shell.json
$RUNFS hydrate --restore $UUID
test -d $PLACE/project/storage/*/* -a ! -L $PLACE/project/storage/*/*
sha256sum <$PLACE/mnt/$UUID/weights.npy
$RUNFS doctor --json >$PLACE/out/doctor.json || true
$RUNFS umount $PLACE/mnt
! grep -q " $PLACE/mnt " /proc/self/mountinfo
test "$(cat $PLACE/project/storage/*/*/log.txt)" = "$(printf '{"done": true}\\nmore')"
stat -c '%u %a %s' $PLACE/project/storage/*/*/third
"""


@pytest.fixture
def user(reachable: Path, make_project: Callable[..., Project]) -> Ordinary:
    project = make_project(runs=1, report=False)
    projects.copy(project, reachable / "project")
    for name in ("mnt", "store", "out"):
        (reachable / name).mkdir()
    user = Ordinary(reachable)
    for name in ("project", "mnt", "store", "out"):
        user.own(reachable / name)
    (reachable / "uuid").write_text(project.runs[0])
    return user


def work(user: Ordinary, script: str, **more: str) -> list[str]:
    done = user.run(script, PLACE=str(user.place), UUID=(user.place / "uuid").read_text(), **more)
    log = "".join(path.read_text() for path in user.home.glob(".local/state/runfs/*/daemon.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    assert "Traceback" not in log
    return done.stdout.splitlines()


def test_the_main_job(user: Ordinary) -> None:
    said = work(user, WORK)
    digests = [line for line in said if line.endswith("  -")]
    assert len(digests) == 3
    assert len(set(digests)) == 1
    assert said[-1] == f"{UID} 600 {3 << 20}"
    out = {path.stem: json.loads(path.read_text() or "{}") for path in (user.place / "out").glob("*.json")}
    assert out["status"]["passthrough"].startswith("off: it needs CAP_SYS_ADMIN")
    assert out["evict"]["exit"] == 0
    assert out["shell"]["mountpoint"] == str(user.place / "mnt"), "found by a shell with another XDG_RUNTIME_DIR"
    wrong = [check for check in out["doctor"]["checks"] if check["ok"] is False]
    assert not wrong
    for path in (user.home / ".local/state/runfs").rglob("*"):
        assert not path.lstat().st_mode & 0o077, path


MOUNT = """
$RUNFS mount $PLACE/mnt --project $PLACE/project $OPTION
ls $PLACE/mnt/$UUID/id.json >/dev/null
touch $PLACE/out/mounted
while [ ! -e $PLACE/out/looked ]; do sleep 0.05; done
$RUNFS umount $PLACE/mnt || true  # there is no store to push to
cat $PLACE/out/saw
"""
LOOK = """
while [ ! -e $PLACE/out/mounted ]; do sleep 0.05; done
(setpriv --reuid=65534 --regid=65534 --clear-groups ls $PLACE/mnt | wc -l; ls $PLACE/mnt | wc -l) >$PLACE/out/saw
touch $PLACE/out/looked
"""


def test_nobody_else_enters_without_allow_other(user: Ordinary) -> None:
    """Not even root: the kernel asks for the very user who mounted."""
    assert [line.strip() for line in work(user, MOUNT, beside=LOOK, OPTION="")[-2:]] == ["0", "0"]


def test_others_enter_with_allow_other(user: Ordinary) -> None:
    """And there the modes count, as `default_permissions` is always on."""
    script = MOUNT.replace("touch $PLACE/out/mounted", "chmod 700 $PLACE/mnt/$UUID/notes; touch $PLACE/out/mounted")
    look = LOOK.replace("ls $PLACE/mnt | wc -l; ls $PLACE/mnt", "ls $PLACE/mnt/*/notes | wc -l; ls $PLACE/mnt/")
    said = work(user, script, beside=look, OPTION="--allow-other", fuse_conf="user_allow_other")
    assert [line.strip() for line in said[-2:]] == ["0", "2"]


def test_allow_other_says_what_it_needs(user: Ordinary) -> None:
    script = "! $RUNFS mount $PLACE/mnt --project $PLACE/project --allow-other 2>&1"
    said = "\n".join(work(user, script))
    assert "user_allow_other" in said
    assert "/etc/fuse.conf" in said
