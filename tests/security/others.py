"""Doing things as another user of this machine, and as one that has a name and may mount.

`as_user` runs a call in a forked child with another uid. `Ordinary` runs programs as a user who exists in a mount
namespace of their own only: there the interpreter is reachable, /dev/fuse is as on most machines (0666), and
/etc/passwd has one line more; nothing of this machine is changed. Both need root. Blocks until the child has ended.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOBODY = 65534
UID = 54321  # of nobody's account
LIMIT_S = 90.0


def as_user(uid: int, call: Callable[[], Any]) -> Any:
    """What `call` returns (JSON's types) when run as `uid`; AssertionError with its traceback when it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            said = {"result": call()}
        except BaseException:
            said = {"error": traceback.format_exc()}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer: dict[str, Any] = json.loads(pipe.read())
    os.waitpid(child, 0)
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["result"]


def cannot_be_another() -> str | None:
    """Why no mount namespace of one's own can be had here; None when it can."""
    if os.geteuid() != 0:
        return "only root can become another user; without root all tests that mount run as an ordinary user anyway"
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    return f"no mount namespace: {done.stderr.strip()}" if done.returncode else None


class Ordinary:
    """A user with the name `runfstest`, a home, and `place` as a directory to work in."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "home"
        self.home.mkdir(mode=0o700)
        os.chown(self.home, UID, UID)
        place.chmod(0o711)

    def own(self, path: Path) -> None:
        """Give everything below a path to the user."""
        for base, names, files in os.walk(path):
            for name in [base, *(os.path.join(base, each) for each in names + files)]:
                os.chown(name, UID, UID, follow_symlinks=False)

    def run(
        self, script: str, *, beside: str = "true", fuse_conf: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A shell script as that user, with `$RUNFS` for the command; what it mounts ends with it. `beside`: another
        one that root runs in the same namespace meanwhile; `fuse_conf`: what /etc/fuse.conf holds."""
        script_file = self.place / "script"
        script_file.write_text(script)
        script_file.chmod(0o644)
        own = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LC_ALL": "C",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RUNFS": f"{sys.executable} -m daemon.cli",
            **environment,
        }
        as_them = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--", "env", "-i"]
        as_them += [f"{name}={value}" for name, value in own.items()]
        as_them += ["bash", "-euo", "pipefail", str(script_file)]
        # In a process namespace too: when the script has ended, whatever it left running ends with its first process.
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            "-c",
            _SET_UP,
        ]
        setting = {"place": str(self.place), "home": str(self.home), "uid": UID, "run": as_them, "reach": _reach()}
        setting |= {"beside": beside, "fuse_conf": fuse_conf}
        return subprocess.run(
            [*command, json.dumps(setting)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )


def _reach() -> list[list[str]]:
    """Directories that others cannot pass, each with those below it that they need: the interpreter, and this code."""
    needed = {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), str(Path(shutil.which("bash") or "/bin"))}
    closed: dict[str, list[str]] = {}
    for each in sorted(needed):
        real = Path(os.path.realpath(each))
        shut = [above for above in reversed(real.parents) if not above.stat().st_mode & 0o001]
        if shut:
            closed.setdefault(str(shut[0]), []).append(str(real))
    return [[top, *below] for top, below in closed.items()]


_SET_UP = """
import json, os, subprocess, sys
setting = json.loads(sys.argv[1])
place = setting["place"]
def mount(*words): subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
with open("/etc/passwd") as known, open(place + "/passwd", "w") as file:
    file.write(known.read() + f"runfstest:x:{setting['uid']}:{setting['uid']}::{setting['home']}:/bin/sh\\n")
mount("--bind", place + "/passwd", "/etc/passwd")
os.mknod(place + "/fuse", 0o20666, os.stat("/dev/fuse").st_rdev)
os.chmod(place + "/fuse", 0o666)
mount("--bind", place + "/fuse", "/dev/fuse")
for number, (top, *below) in enumerate(setting["reach"]):
    for each, path in enumerate(below):
        os.mkdir(f"{place}/reach-{number}-{each}")
        mount("--bind", path, f"{place}/reach-{number}-{each}")
    mount("-t", "tmpfs", "-o", "mode=755", "none", top)
    for each, path in enumerate(below):
        os.makedirs(path)
        mount("--bind", f"{place}/reach-{number}-{each}", path)
with open(place + "/fuse.conf", "w") as file:
    file.write(setting["fuse_conf"] + "\\n")
if os.path.exists("/etc/fuse.conf"):
    mount("--bind", place + "/fuse.conf", "/etc/fuse.conf")
subprocess.Popen(["bash", "-c", setting["beside"]], cwd=place, env={**os.environ, "PLACE": place})
os.execvp(setting["run"][0], setting["run"])
"""
