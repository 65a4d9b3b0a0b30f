"""`Mounted`: the real daemon as a process of its own on a real mountpoint, for tests marked `mounted`.

Used through the fixture `mount` of conftest.py, or as a context manager. Starting blocks until the mount answers
(about a second), leaving blocks until the daemon is gone; every wait has a limit.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.mounts import fuse_mounts, is_fuse_mount, unmount
from tests.projects import Project

ROOT = Path(__file__).parent.parent
READY_LIMIT_S = 30.0
STOP_LIMIT_S = 60.0
COMMAND_LIMIT_S = 120.0


class Mounted:
    """A project mounted by a daemon of its own. `path` is the mountpoint.

    `stores` are URLs; `options` more arguments of `runfs mount`; `environment` more variables for the daemon and the
    commands.
    """

    def __init__(
        self,
        project: Project,
        mountpoint: Path,
        *,
        stores: Sequence[str] = (),
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.project = project
        self.path = mountpoint
        self.log_path = mountpoint.parent / f"{mountpoint.name}.log"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RUNFS_MOUNT": str(mountpoint),
            **(environment or {}),
        }
        self.command = ["mount", str(mountpoint), "--project", str(project.path), "--foreground"]
        for url in stores:
            self.command += ["--store", url]
        self.command += options
        self.program = [sys.executable, "-m", "daemon.cli"]  # what the daemon is started as
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            self.print_log()

    @property
    def pid(self) -> int:
        assert self.process is not None, "the daemon is not running"
        return self.process.pid

    def start(self) -> None:
        """Start the daemon and wait until its mount answers."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # a dead mount is there: what comes of that is for the daemon
                raise
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, *self.command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Unmount in whatever way works; the daemon is gone and the mountpoint is a plain directory afterwards."""
        if self.process is not None and self.process.poll() is None:
            self.resume()  # a test may have left it paused
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):  # tried; the rest is done below
                self.umount()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def kill(self, *, unmount_stale: bool = True) -> None:
        """SIGKILL the daemon, as a crash would end it; then take its dead mount away, unless told to leave it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_LIMIT_S)
            self.process = None
        if unmount_stale:
            for stale in fuse_mounts():
                if stale.path == self.path:
                    unmount(stale)

    def pause(self) -> None:
        """SIGSTOP the daemon: mounted, and answering nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def umount(self, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """`runfs umount`; when it succeeded the daemon has ended."""
        done = self.runfs("umount", str(self.path), "--timeout", str(timeout))
        if done.returncode == 0 and self.process is not None:
            self.process.wait(STOP_LIMIT_S)
        return done

    def runfs(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command line of runfs about this mount (through RUNFS_MOUNT), whatever it ends with."""
        return self.bounded([sys.executable, "-m", "daemon.cli", *arguments])

    def bounded(self, command: Sequence[str], limit_s: float = COMMAND_LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a command that may hang in the mount; fails when it does not end in time.

        The daemon is ended first then: while it does not answer, not even SIGKILL ends who waits for it.
        """
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                self.kill()
                process.kill()
                raise AssertionError(f"did not end within {limit_s:.0f} s: {command}\n{self.log()}") from None
        return subprocess.CompletedProcess(list(command), process.returncode, output, errors)

    def json(self, *arguments: str, exit_code: int | None = 0) -> dict[str, Any]:
        """The answer of a command with `--json`; fails when it ends with another exit code than this (None: any)."""
        done = self.runfs(*arguments, "--json")
        if exit_code is not None:
            assert done.returncode == exit_code, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def log(self) -> str:
        """What the daemon has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def print_log(self) -> None:
        print(f"--- log of the daemon on {self.path}\n{self.log()}--- end of log")

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + READY_LIMIT_S
        while not (is_fuse_mount(self.path) and self._answers()):
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"runfs mount ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > end:
                raise AssertionError(f"the mount did not answer within {READY_LIMIT_S:.0f} s:\n{self.log()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Asked from another process, which may hang."""
        return self.bounded(["stat", "-f", str(self.path)], READY_LIMIT_S).returncode == 0
