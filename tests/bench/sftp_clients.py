"""SFTP clients in figures, for the choice of the `sftp` store's engine: asyncssh, paramiko, fsspec, sftp(1).

    .venv/bin/python -m tests.bench.sftp_clients --size 256 --files 500

Each client runs in a process of its own (for its memory) against one private sshd on loopback, and does the same: put
and get one large file, write and read many files of 2 kB, 16 at a time where it can. Not a test: nothing here fails
because something is slow. Needs openssh-server, asyncssh, paramiko and fsspec.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.stores.servers_sftp import OpenSsh, openssh

AT_ONCE = 16
SMALL = os.urandom(2000)


class Task:
    """What a client has to do. `place`: a directory of the server; `host`: how to reach it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.port, self.user, self.key = int(given["port"]), str(given["user"]), str(given["key"])
        self.known_hosts = str(given["known_hosts"])
        self.place, self.local = Path(given["place"]), Path(given["local"])
        self.size, self.files = int(given["size"]), int(given["files"])
        self.figures: dict[str, float] = {}

    def timed(self, what: str, amount: float, work: Callable[[], object]) -> None:
        began = time.monotonic()
        work()
        self.figures[what] = amount / (time.monotonic() - began)

    async def timed_async(self, what: str, amount: float, work: Any) -> None:
        began = time.monotonic()
        await work
        self.figures[what] = amount / (time.monotonic() - began)

    @property
    def names(self) -> list[str]:
        return [f"{self.place}/small-{number}" for number in range(self.files)]


def run_asyncssh(task: Task, **options: Any) -> None:
    """asyncssh: one connection, requests pipelined by the library."""
    import asyncssh

    async def small(sftp: asyncssh.SFTPClient, name: str, limit: asyncio.Semaphore, write: bool) -> None:
        async with limit, sftp.open(name, "wb" if write else "rb") as file:
            if write:
                await file.write(SMALL)
            else:
                assert len(await file.read()) == len(SMALL)

    async def work() -> None:
        connection = await asyncssh.connect(
            "127.0.0.1",
            task.port,
            username=task.user,
            client_keys=[task.key],
            known_hosts=task.known_hosts,
            config=None,
            **options,
        )
        async with connection, connection.start_sftp_client() as sftp:
            big = f"{task.place}/big"
            await task.timed_async("put MB/s", task.size, sftp.put(str(task.local), big))
            await task.timed_async("get MB/s", task.size, sftp.get(big, str(task.local) + ".back"))
            limit = asyncio.Semaphore(AT_ONCE)
            for what, write in (("writes/s", True), ("reads/s", False)):
                each = [small(sftp, name, limit, write) for name in task.names]
                await task.timed_async(what, len(each), asyncio.gather(*each))

    asyncio.run(work())


def run_asyncssh_gcm(task: Task) -> None:
    """asyncssh with AES-GCM, which the processor helps with, instead of its own first choice."""
    run_asyncssh(task, encryption_algs=["aes128-gcm@openssh.com"])


def run_paramiko(task: Task) -> None:
    """paramiko: one transport, a channel per thread (a channel is for one thread at a time)."""
    import paramiko

    client = paramiko.SSHClient()
    client.load_host_keys(task.known_hosts)
    client.connect(
        "127.0.0.1", task.port, task.user, key_filename=task.key, allow_agent=False, look_for_keys=False, timeout=10
    )
    sftp = client.open_sftp()
    big = f"{task.place}/big"
    task.timed("put MB/s", task.size, lambda: sftp.put(str(task.local), big))
    task.timed("get MB/s", task.size, lambda: sftp.get(big, str(task.local) + ".back"))
    channels = [client.open_sftp() for _ in range(AT_ONCE)]

    def some(number: int, write: bool) -> None:
        for name in task.names[number::AT_ONCE]:
            with channels[number].open(name, "wb" if write else "rb") as file:
                if write:
                    file.set_pipelined(True)
                    file.write(SMALL)
                else:
                    assert len(file.read()) == len(SMALL)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for what, write in (("writes/s", True), ("reads/s", False)):
            task.timed(
                what,
                task.files,
                lambda write=write: list(pool.map(lambda number: some(number, write), range(AT_ONCE))),  # type: ignore[misc]
            )
    client.close()


def run_fsspec(task: Task) -> None:
    """paramiko through fsspec: one channel, so one thread."""
    from fsspec.implementations.sftp import SFTPFileSystem

    files = SFTPFileSystem("127.0.0.1", port=task.port, username=task.user, key_filename=task.key, allow_agent=False)
    big = f"{task.place}/big"
    task.timed("put MB/s", task.size, lambda: files.put_file(str(task.local), big))
    task.timed("get MB/s", task.size, lambda: files.get_file(big, str(task.local) + ".back"))
    task.timed("writes/s", task.files, lambda: [files.pipe_file(name, SMALL) for name in task.names])
    task.timed("reads/s", task.files, lambda: [files.cat_file(name) for name in task.names])


def run_program(task: Task) -> None:
    """sftp(1) with a batch of commands; its memory is its own process's."""
    source = task.local.parent / "program-small"
    source.write_bytes(SMALL)

    def batch(*lines: str) -> None:
        command = ["sftp", "-q", "-b", "-", "-P", str(task.port), "-i", task.key, "-F", "none"]
        command += ["-o", f"UserKnownHostsFile={task.known_hosts}", f"{task.user}@127.0.0.1"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, stdout=subprocess.DEVNULL)

    back = f"{task.local}.back"
    task.timed("put MB/s", task.size, lambda: batch(f"put {task.local} {task.place}/big"))
    task.timed("get MB/s", task.size, lambda: batch(f"get {task.place}/big {back}"))
    task.timed("writes/s", task.files, lambda: batch(*(f"put {source} {name}" for name in task.names)))
    task.timed("reads/s", task.files, lambda: batch(*(f"get {name} {source}" for name in task.names)))


def run_store(task: Task) -> None:
    """The store that was made of it: bytes synced, names given by the server, everything bounded."""
    from vfs.stores import open_store

    options = {"key_file": task.key, "known_hosts": task.known_hosts, "ssh_config": "none"}
    store = open_store(f"sftp://{task.user}@127.0.0.1:{task.port}{task.place}/store", options=options)
    with task.local.open("rb") as file:
        size = task.size * 10**6

        def source(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        task.timed("put MB/s", task.size, lambda: store.upload("u/big", source, size))
    piece = 8 * 2**20
    with open(f"{task.local}.back", "wb") as back:
        task.timed(
            "get MB/s",
            task.size,
            lambda: [back.write(store.read("u/big", offset, piece)) for offset in range(0, size, piece)],
        )
    keys = [f"u/small-{number}" for number in range(task.files)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        task.timed("writes/s", task.files, lambda: list(pool.map(lambda key: store.write(key, SMALL), keys)))
        task.timed("reads/s", task.files, lambda: list(pool.map(store.read, keys)))
    store.disconnect()


CLIENTS: dict[str, Callable[[Task], None]] = {
    "runfs": run_store,
    "asyncssh": run_asyncssh,
    "asyncssh-gcm": run_asyncssh_gcm,
    "paramiko": run_paramiko,
    "fsspec": run_fsspec,
    "sftp": run_program,
}


def measure(client: str, server: OpenSsh, place: Path, size: int, files: int) -> dict[str, float]:
    """One client's figures, from a process of its own."""
    work = place / client
    work.mkdir()
    local = place / "local"
    given = {
        "port": server.port,
        "user": server.user,
        "key": str(server.key),
        "known_hosts": str(server.known_hosts),
        "place": str(work),
        "local": str(local),
        "size": size,
        "files": files,
    }
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--client", client]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{client} failed:\n{done.stderr}")
    if Path(f"{local}.back").stat().st_size != size * 10**6:
        raise SystemExit(f"{client}: other bytes came back")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run every client, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="MB of the large file")
    parser.add_argument("--files", type=int, default=500, help="number of files of 2 kB")
    parser.add_argument("--only", choices=sorted(CLIENTS))
    parser.add_argument("--client", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        task = Task(json.loads(sys.stdin.read()))
        CLIENTS[asked.client](task)
        own, others = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        task.figures["memory MB"] = max(own, others if asked.client == "sftp" else 0) / 1024
        print(json.dumps(task.figures))
        return
    with tempfile.TemporaryDirectory(prefix="runfs-bench-") as name, openssh(Path(name) / "sshd") as server:
        place = Path(name)
        with (place / "local").open("wb") as file:  # in pieces: a child's memory figure starts with its parent's
            for _ in range(asked.size):
                file.write(os.urandom(10**6))
        for client in [asked.only] if asked.only else CLIENTS:
            figures = measure(client, server, place, asked.size, asked.files)
            print(f"{client:13}", *(f"{what} {value:8.1f}" for what, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
