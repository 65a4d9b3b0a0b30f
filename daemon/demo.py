"""`make demo`: the main job on a small machinable project, every command and its real output, every step checked.

A program of its own (`python -m daemon.demo [--s3]`); nothing imports it. Everything it makes is in one temporary
directory, state and cache of runfs included, and is gone when it ends, however it ends. Exit status 1 when a step did
not do what it says.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from daemon.demo_server import Server
from daemon.mounts import mount_table
from vfs.errors import RunfsError

COMMAND_LIMIT_S = 120.0
RUNS = 3
MEGABYTES = 24  # of weights a run: enough to see on the disk, little enough to be quick

STUDY = f'''
"""Three small training runs; those that are finished are found, not run again."""

import json
from pathlib import Path

import numpy as np
from machinable import Interface, get
from pydantic import BaseModel


class Train(Interface):
    class Config(BaseModel):
        lr: float = 0.1

    def __call__(self):
        print(f"training with lr={{self.config.lr}} ...")
        weights = np.random.default_rng(int(self.config.lr * 100)).standard_normal({MEGABYTES} * 125_000)
        np.save(self.local_directory("weights.npy"), weights)
        self.save_file("metrics.json", {{"lr": self.config.lr, "loss": round(float(weights.std()), 4)}})
'''

LAUNCH = f"""
from machinable import get
for lr in {[round(0.1 * (run + 1), 1) for run in range(RUNS)]}:
    print(get("study", {{"lr": lr}}).launch().uuid)
"""


class StepFailed(Exception):
    """A step of the demo did not do what it says."""


class Demo:
    """The steps, in the order they are shown. `directory` is theirs alone; `url` is the second store."""

    def __init__(self, directory: Path, url: str, credentials: dict[str, str]) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.url = url
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RUNFS_", "MACHINABLE_"))},
            **credentials,
            "RUNFS_MOUNT": str(self.mountpoint),
            "RUNFS_STATE_DIR": str(directory / "state"),
            "RUNFS_CACHE_DIR": str(directory / "cache"),
            "RUNFS_RUNTIME_DIR": str(directory / "run"),
            "XDG_CONFIG_HOME": str(directory / "config"),
        }

    def show(self) -> None:
        """Run every step. Raises StepFailed at the first that is not as it should be."""
        uuids = self.make_project()
        self.mount(uuids)
        before = self.read(uuids[0])
        full = self.push()
        self.evict(full)
        self.read_back(uuids, before)
        self.run_again(uuids)
        self.write(uuids[0])
        self.safe()
        self.unmount()

    # -- the steps

    def make_project(self) -> list[str]:
        self.say(f"A machinable project, really run: {RUNS} runs, {MEGABYTES} MB of weights each")
        (self.directory / "study").mkdir()
        (self.directory / "study" / "study.py").write_text(STUDY)
        (self.directory / "study" / "launch.py").write_text(LAUNCH)
        return self.launch()

    def launch(self) -> list[str]:
        output = self.run("cd study && python launch.py")
        uuids = [line for line in output.splitlines() if " " not in line]
        self.check(len(set(uuids)) == RUNS, f"{RUNS} runs are expected, not {len(set(uuids))}")
        return uuids

    def mount(self, uuids: list[str]) -> None:
        self.say("Mount it, with a second store for the bytes")
        self.mountpoint.mkdir()
        self.run(f"runfs mount mnt --project study --store '{self.url}'")
        listed = self.run("ls mnt").split()
        self.check(set(uuids) <= set(listed), "ls does not list every run")

    def read(self, uuid: str) -> str:
        self.say("A record's files are plain files")
        listed = self.run(f"ls -l mnt/{uuid}")
        self.check("weights.npy" in listed, "weights.npy is not listed")
        self.run(f"cat mnt/{uuid}/metrics.json && echo")
        return self.digest(uuid)

    def push(self) -> int:
        self.say("Push every run to the second store: nothing is dropped before it is proven to be there")
        self.run("runfs push")
        return self.disk_use()

    def evict(self, full: int) -> None:
        self.say("Evict: the local bytes go, the records stay")
        self.run("runfs evict --all --dry-run")
        self.run("runfs evict --all")
        freed = full - self.disk_use()
        least = RUNS * MEGABYTES * 1000 * 1000 * 9 // 10
        self.check(freed > least, f"only {freed / 1e6:.1f} MB of {RUNS * MEGABYTES} MB were freed")
        self.say(f"{freed / 1e6:.0f} MB freed on this disk; sizes and small files need no network", step=False)
        self.run("ls -l mnt/*/weights.npy")

    def read_back(self, uuids: list[str], before: str) -> None:
        self.say("Reading brings the bytes back by itself, checked against the manifest")
        self.check(self.digest(uuids[0]) == before, "weights.npy has other bytes than before the eviction")
        whole = self.disk_use(show=False)
        self.say(
            "The same bytes. Reading a part of another one brings only that part (and a little ahead):", step=False
        )
        self.run(f"tail -c 24 mnt/{uuids[1]}/weights.npy | od -A n -t f8")
        self.run(f"runfs status mnt/{uuids[1]}/weights.npy")
        brought = self.disk_use(show=False) - whole
        self.check(0 < brought < MEGABYTES * 1000 * 1000 // 2, f"24 bytes brought {brought / 1e6:.1f} MB")
        self.run("runfs status")

    def run_again(self, uuids: list[str]) -> None:
        self.say("machinable finds the evicted runs and does not run them again")
        self.check(self.launch() == uuids, "machinable ran something again")

    def write(self, uuid: str) -> None:
        self.say("Writing to an evicted record works, too")
        self.run(f"echo 'looks good' >> mnt/{uuid}/notes.txt")
        self.check(self.run(f"cat mnt/{uuid}/notes.txt") == "looks good\n", "the note does not read back")

    def safe(self) -> None:
        self.say("Could this machine be lost now? (The note is on its way to the store; push waits for it)")
        self.run("runfs push")
        self.run("runfs safe")

    def unmount(self) -> None:
        self.say("Unmount")
        self.run("runfs umount mnt")
        self.check(not self.is_mounted(), "it is still mounted")

    # -- how a step is done

    def digest(self, uuid: str) -> str:
        return self.run(f"sha256sum mnt/{uuid}/weights.npy").split()[0]

    def disk_use(self, *, show: bool = True) -> int:
        """Bytes that project and cache take on this disk."""
        (self.directory / "cache").mkdir(exist_ok=True)
        command = "du --summarize --total --block-size=1K study cache"
        output = self.run(command) if show else self._shell(command).stdout
        return int(output.splitlines()[-1].split()[0]) * 1024

    def say(self, text: str, *, step: bool = True) -> None:
        bold = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"\n{bold[0]}# {text}{bold[1]}" if step else f"# {text}", flush=True)

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise StepFailed(otherwise)

    def run(self, command: str) -> str:
        """Show a command as a person would type it, run it as that, show what it says. Raises StepFailed."""
        print(f"$ {command}", flush=True)
        done = self._shell(command)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise StepFailed(f"this ended with {done.returncode}: {command}")
        return done.stdout

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        # So that `python` and `runfs` are this installation's, whatever the person's own are.
        python = f"'{sys.executable}'"
        functions = f'python() {{ {python} "$@"; }}; runfs() {{ {python} -m daemon.cli "$@"; }}; '
        here = str(Path(__file__).parent.parent)
        try:
            return subprocess.run(
                ["/bin/sh", "-c", functions + command],
                cwd=self.directory,
                env={**self.environment, "PYTHONPATH": here},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise StepFailed(f"this did not end within {COMMAND_LIMIT_S:.0f} s: {command}") from None

    def is_mounted(self) -> bool:
        return any(mount.mountpoint == str(self.mountpoint) for mount in mount_table())

    def clean_up(self) -> None:
        """Leave nothing mounted; without its mount the daemon ends."""
        if self.is_mounted():
            with contextlib.suppress(StepFailed):
                self._shell("runfs umount mnt --timeout 20")
        if self.is_mounted():
            subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], check=False)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


def demonstrate(*, s3: bool) -> None:
    """The whole demo in a directory of its own. Raises StepFailed."""
    directory = Path(tempfile.mkdtemp(prefix="runfs-demo-")).resolve()
    server = Server(directory / "seaweedfs") if s3 else None
    url = server.url if server else (directory / "store").as_uri()
    demo = Demo(directory, url, server.credentials if server else {})
    try:
        if server:
            print("Starting a SeaweedFS S3 server on this machine ...", flush=True)
            server.start()
        else:
            (directory / "store").mkdir()
        demo.show()
    finally:
        demo.clean_up()
        if server:
            server.stop()
        if not demo.is_mounted():  # never delete through a mount
            _remove(directory)


def _remove(directory: Path) -> None:
    """Remove it all; a daemon that is just ending may still write its last line, so a few times."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    print(f"Could not remove {directory}", file=sys.stderr)


def main() -> int:
    """Exit status 0 when every step did what it says, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m daemon.demo", description="Shows the main job, step by step.")
    parser.add_argument("--s3", action="store_true", help="the second store is a SeaweedFS S3 server")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # clean up then, too
    try:
        demonstrate(s3=arguments.s3)
    except (StepFailed, RunfsError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    program = Path(sys.executable).parent / "runfs"
    print(f"\nFor your own project:\n\n  {program} mount MOUNTPOINT --project DIRECTORY --store URL\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
