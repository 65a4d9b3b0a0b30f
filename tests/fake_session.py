"""A small real implementation of the control protocol's `Commands`, and a daemon around it, for the tests of both."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from daemon import control, mounts
from daemon.protocol import Progress
from vfs import errors


class FakeSession:
    """Keeps pins and a list of records in memory; some commands exist to fail, to wait or to talk."""

    def __init__(self, mountpoint: str = "/mnt/runs") -> None:
        self.mountpoint = mountpoint
        self.pinned: set[str] = set()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.ended = threading.Event()

    def run(self, command: str, args: dict[str, Any], progress: Progress, /) -> dict[str, Any]:
        self.calls.append((command, args))
        known = getattr(self, f"run_{command}", None)
        if known is None:
            raise errors.UsageError(f"there is no command {command!r}")
        result: dict[str, Any] = known(args, progress)
        return result

    def run_status(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return {
            "mountpoint": self.mountpoint,
            "index": "/study/.machinable.sqlite",
            "records": 1284,
            "states": {"resident": {"records": 961, "bytes": 388_000_000_000}, "evicted": {"records": 5, "bytes": 0}},
            "stores": [{"name": "lab", "url": "s3://lab/study", "reachable": True, "latency_ms": 41.0}],
            "exit": 0,
        }

    def run_pin(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        new = [uuid for uuid in args["uuids"] if uuid not in self.pinned]
        self.pinned |= set(new)
        return {"changed": new, "exit": 0}

    def run_push(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        for done in range(0, 101, 20):
            progress(
                {"what": "push", "uuid": "qcmIdGsGCpwS", "path": "w.npy", "store": "lab", "done": done, "size": 100}
            )
        return {"pushed": [{"uuid": "qcmIdGsGCpwS", "bytes": 100, "files": 1, "store": "lab"}], "failed": [], "exit": 0}

    def run_evict(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        raise errors.Refused("qcmIdGsGCpwS is live; wait until it has finished")

    def run_ls(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        page = {"": ("a" * 12, "a" * 12), "a" * 12: ("b" * 12, None)}[args.get("after", "")]
        record = {"uuid": page[0], "kind": "Execution", "state": "evicted", "size": 2_100_000_000, "label": "x\x1b[31m"}
        return {"records": [record], "next": page[1], "exit": 0}

    def run_safe(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        unsafe = [{"uuid": "qcmIdGsGCpwS", "reason": "log.txt is dirty", "bytes": 1_200_000_000}]
        known = {"safe": False, "records": 1, "files": 5, "bytes": 1_200_000_000, "unsafe": unsafe}
        return {**known, "stores": [{"name": "lab"}], "rate": 118e6, "left_s": 10.9, "exit": 1}

    def run_bug(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        raise ZeroDivisionError("a secret value")

    def run_odd(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return {"rate": float("inf"), "name": b"\xff\n".decode("utf-8", "surrogateescape"), "exit": 0}

    def run_wait(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Works until it is told to stop, as a long push does."""
        self.started.set()
        deadline = time.monotonic() + args.get("seconds", 10.0)
        while not progress.cancelled and time.monotonic() < deadline:
            progress({"what": "push", "done": 1})
            time.sleep(0.005)
        if progress.cancelled:
            self.cancelled.set()
        self.ended.set()
        return {"stopped": progress.cancelled, "exit": 1}

    def run_quiet(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        time.sleep(args["seconds"])
        return {"exit": 0}

    def run_umount(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return {"pending": {"records": 1, "files": 5, "bytes": 1_200_000_000}, "failed": [], "exit": 1}


class FakeDaemon:
    """A control server in a thread of its own, announced in a runtime directory."""

    def __init__(self, socket: Path, session: FakeSession, alive_s: float = 5.0) -> None:
        self.alive_s = alive_s
        self.socket = socket
        self.session = session
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                serve = partial(control.serve, self.socket, self.session, alive_s=self.alive_s)
                await nursery.start(serve)
                self._ready.set()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop_soon(self) -> None:
        """From any thread; those that run get their answers first."""
        if self._thread.is_alive() and self._token is not None and self._scope is not None:
            with suppress(trio.RunFinishedError):  # it has just ended by itself
                self._token.run_sync_soon(self._scope.cancel)

    def stop(self) -> None:
        self.stop_soon()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def fake_daemon(
    runtime_dir: Path, mountpoint: Path, index: Path, session: FakeSession | None = None
) -> Iterator[FakeDaemon]:
    """A daemon for a mountpoint as the command line finds it (nothing is mounted)."""
    with mounts.announced(runtime_dir, mountpoint, index) as socket:
        daemon = FakeDaemon(socket, session or FakeSession(str(mountpoint)))
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.stop()
