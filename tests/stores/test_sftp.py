"""What only an sftp store must do, on OpenSSH's own server: log in safely, keep the file store's layout, let the server
decide, and come back from every fault."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.faults import FaultProxy
from tests.stores.kinds import Maker
from tests.stores.kinds_sftp import maker_on
from tests.stores.servers_sftp import PASSPHRASE, OpenSsh, openssh, password_server
from vfs.errors import ConfigError, Conflict, Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.stores import Store, broker, open_store, places, validate
from vfs.stores.file import FileStore
from vfs.stores.limits import Limits
from vfs.stores.sftp.config import target
from vfs.stores.sftp.session import Calls, Connection

MIB = 1024 * 1024
DEADLINE_S = 2.0
MARGIN_S = 1.5
SMALL = b"small content"
LARGE = random.Random(5).randbytes(3 * MIB)
BIG = 20 * MIB


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the keys, agent or SSH configuration of the person who runs it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "store"


@pytest.fixture
def make(sftp_server: OpenSsh, root: Path) -> Iterator[Maker]:
    root.parent.mkdir()
    maker = maker_on(sftp_server, root)
    yield maker
    maker.close()


@pytest.fixture
def store(make: Maker) -> Store:
    return make()


def names(store: Store) -> set[str]:
    return {stat.key for stat in store.list()}


def area(root: Path) -> set[str]:
    """What is in the temporary area, once what is cleared up in the background is."""
    end = time.monotonic() + 3
    while (left := set(os.listdir(root / places.TEMPORARY))) and time.monotonic() < end:
        time.sleep(0.02)
    return left


class Writer:
    """A process that writes b"mine" to a key and is held at a point; it goes on at the end. `said`: how it ended."""

    def __init__(self, make: Maker, point: Path, name: str, key: str, **condition: object) -> None:
        config = {"url": make.url, **make.options}
        code = (
            "from vfs.stores import open_store\n"
            f"store = open_store({config!r})\n"
            f"try: print(store.write({key!r}, b'mine', deadline=30, **{condition!r}).version)\n"
            "except Exception as error: print(type(error).__name__)\n"
        )
        self.said = ""
        self._point = point
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "RUNFS_FAULT": f"{name}=hold:{point}"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Writer":
        end = time.monotonic() + 30
        while not os.path.exists(f"{self._point}.here") and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        Path(f"{self._point}.go").touch()
        self.said = self.process.communicate(timeout=60)[0].strip()


class TestLoggingIn:
    def test_with_a_key_behind_a_passphrase(
        self, make: Maker, sftp_server: OpenSsh, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked = str(sftp_server.locked_key)
        assert make(key_file=locked, passphrase=PASSPHRASE).check().problems == []
        for wrong in ({"passphrase": "not this one"}, {}):
            with pytest.raises(Denied, match="RUNFS_SFTP_PASSPHRASE") as refused:
                make(key_file=locked, **wrong).stat("u/a")
            assert "not this one" not in str(refused.value)
        monkeypatch.setenv("RUNFS_SFTP_PASSPHRASE", PASSPHRASE)
        assert make(key_file=locked).check().problems == []

    def test_a_key_that_is_not_let_in(self, make: Maker, sftp_server: OpenSsh) -> None:
        with pytest.raises(Denied, match="ssh-copy-id"):
            make(key_file=str(sftp_server.other_key)).stat("u/a")

    def test_a_password_that_is_not_let_in_is_never_shown(self, make: Maker, sftp_server: OpenSsh) -> None:
        store = make(key_file=str(sftp_server.other_key), password="a-secret-of-mine")
        with pytest.raises(Denied, match="and the password") as refused:
            store.stat("u/a")
        assert "a-secret-of-mine" not in str(refused.value) + repr(vars(store))

    def test_with_a_password_on_another_server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """asyncssh's own server: not OpenSSH, with the same extensions."""
        with password_server(tmp_path, "a-secret-of-mine") as port:
            known = {"known_hosts": str(tmp_path / "known_hosts"), "ssh_config": "none"}
            maker = Maker(f"sftp://me@127.0.0.1:{port}{tmp_path}/store", **known)
            with pytest.raises(Denied, match="RUNFS_SFTP_PASSWORD"):
                maker().stat("u/a")
            store = maker(password="wrong")
            with pytest.raises(Denied, match="and the password"):
                store.stat("u/a")
            store.connect({"password": "a-secret-of-mine"})
            assert store.check().problems == []
            monkeypatch.setenv("RUNFS_SFTP_PASSWORD", "a-secret-of-mine")
            other = maker()
            first = other.write("u/a", b"one", if_absent=True).version
            other.write("u/a", b"two", if_version=first)
            with pytest.raises(Conflict):
                store.write("u/a", b"three", if_version=first)
            data = random.Random(2).randbytes(9 * MIB)
            other.upload("u/a", lambda offset, length: data[offset : offset + length], len(data))
            assert store.copy("u/a", "u/b").size == len(data)
            assert store.read("u/b") == data
            assert names(store) == {"u/a", "u/b"}
            maker.close()

    def test_with_the_agent(self, sftp_server: OpenSsh, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir(parents=True)
        socket = root.parent / "agent"
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 10
            while not socket.exists() and time.monotonic() < end:
                time.sleep(0.02)
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            subprocess.run(["ssh-add", "-q", sftp_server.key], check=True, capture_output=True)
            store = open_store(sftp_server.url(root), options={"known_hosts": str(sftp_server.known_hosts)})
            assert store.check().problems == []
            store.disconnect()
        finally:
            agent.kill()
            agent.wait(10)

    def test_a_host_key_that_is_not_known_is_refused(self, make: Maker, tmp_path: Path) -> None:
        empty = tmp_path / "known"
        empty.touch()
        with pytest.raises(
            Denied, match=r"is not known.*ssh-keyscan -p \d+ 127.0.0.1 \| ssh-keygen -lf -.*fingerprint"
        ):
            make(known_hosts=str(empty)).stat("u/a")

    def test_without_any_known_hosts_nothing_is_trusted(self, sftp_server: OpenSsh, root: Path) -> None:
        store = open_store(sftp_server.url(root), options={"key_file": str(sftp_server.key), "ssh_config": "none"})
        with pytest.raises(Denied, match=r"is not known.*>> ~/.ssh/known_hosts"):
            store.stat("u/a")
        store.disconnect()

    def test_another_host_key_than_before_is_an_alarm(self, make: Maker, sftp_server: OpenSsh, tmp_path: Path) -> None:
        other = sftp_server.other_key.with_suffix(".pub").read_text().split()
        changed = tmp_path / "known"
        changed.write_text(f"[127.0.0.1]:{sftp_server.port} {other[0]} {other[1]}\n")
        with pytest.raises(Denied, match=r"another host key.*Somebody may be in between"):
            make(known_hosts=str(changed)).stat("u/a")

    def test_the_users_configuration_is_honoured(self, sftp_server: OpenSsh, root: Path, tmp_path: Path) -> None:
        root.mkdir(parents=True)
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "config").write_text(
            f"Host lab\n  HostName 127.0.0.1\n  Port {sftp_server.port}\n  User {sftp_server.user}\n"
            f"  IdentityFile {sftp_server.key}\n  UserKnownHostsFile {sftp_server.known_hosts}\n"
        )
        store = open_store(f"sftp://lab{root}")
        assert store.check().problems == []
        assert store.name == "lab"
        store.disconnect()

    def test_a_configuration_cannot_turn_the_host_key_check_off(
        self, sftp_server: OpenSsh, root: Path, tmp_path: Path
    ) -> None:
        config = tmp_path / "config"
        config.write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile none\n")
        options = {"key_file": str(sftp_server.key), "ssh_config": str(config)}
        store = open_store(sftp_server.url(root), options=options)
        with pytest.raises(ConfigError, match="known_hosts"):
            store.stat("u/a")
        config.write_text("Host *\n  StrictHostKeyChecking no\n")
        with pytest.raises(Denied, match="is not known"):
            store.stat("u/a")
        store.disconnect()


class TestConfiguration:
    @pytest.mark.parametrize(
        ("url", "match"),
        [
            ("sftp://me:secret@host/dir", "no user or password"),
            ("sftp:///dir", "name the server"),
            ("sftp://host", "name a directory"),
            ("sftp://host/~", "name a directory"),
            ("sftp://host/a/../b", r"'\.\.'"),
            ("sftp://host/d?pasword=x", "no pasword in a URL|no such option"),
            ("sftp://host/d?passphrase=x", "no passphrase in a URL"),
            ("sftp://host/d?port=0", "65535"),
            ("sftp://host/d?key_file=/no/such", "key_file"),
            ("sftp://me@host/d?user=you", "user"),
        ],
    )
    def test_bad_ones(self, url: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            open_store(url)

    def test_warnings_and_names(self) -> None:
        assert validate("sftp://host/dir") == []
        assert "ssh-copy-id" in validate("sftp://host/dir", options={"password": "x"})[0]
        assert open_store("sftp://me@host:2222/dir").url == "sftp://me@host:2222/dir"
        assert broker("sftp").volume({"url": "sftp://host/dir"}) is None

    def test_below_the_home(self, sftp_server: OpenSsh, make: Maker) -> None:
        """The user lands in the home on the server, where this test makes nothing."""
        store = open_store(
            f"sftp://{sftp_server.user}@127.0.0.1:{sftp_server.port}/~/no/such/dir", options=make.options
        )
        with pytest.raises(Unreachable, match="mkdir"):
            store.write("u/a", b"x")
        store.disconnect()


class TestTheDirectory:
    def test_what_the_file_store_wrote_reads_the_same_and_the_other_way_round(self, store: Store, root: Path) -> None:
        local = FileStore(root)
        content = {"u/a": b"1", "u/a/b": b"22", "u/" + "y" * 600: b"333", ".runfs/u/manifest": b"4444", "x": b""}
        for number, (key, data) in enumerate(content.items()):
            (store if number % 2 else local).write(key, data)
        for each in (store, local):
            assert {stat.key: stat.size for stat in each.list()} == {key: len(data) for key, data in content.items()}
            assert all(each.read(key) == data for key, data in content.items())
        store.delete("u/a")
        local.delete("u/a/b")
        assert names(store) == names(local) == content.keys() - {"u/a", "u/a/b"}
        with pytest.raises(Conflict):
            store.write("x", b"y", if_absent=True)
        with pytest.raises(Conflict):
            local.write(".runfs/u/manifest", b"y", if_absent=True)

    def test_a_disk_of_the_server_that_vanishes(self, make: Maker, store: Store, root: Path) -> None:
        store.write("u/a", b"x")
        aside = root.with_name("aside")
        root.rename(aside)
        root.mkdir()
        calls: list[Callable[[], object]] = [
            lambda: store.stat("u/a"),
            lambda: store.read("u/a"),
            lambda: store.write("u/b", b"x"),
            lambda: list(store.list()),
            lambda: store.delete("u/a"),
        ]
        for call in calls:
            with pytest.raises(Unreachable, match="disk mounted"):
                call()
        with pytest.raises(Unreachable, match="disk mounted"):
            make(used=True).stat("u/a")
        assert list(root.iterdir()) == []
        root.rmdir()
        aside.rename(root)
        assert store.read("u/a") == b"x"

    def test_another_disk_in_its_place(self, make: Maker, store: Store, root: Path) -> None:
        store.write("u/a", b"x")
        root.rename(root.with_name("aside"))
        make().write("u/a", b"y")
        with pytest.raises(Unreachable, match="another store"):
            store.stat("u/nothing")

    def test_no_directory_to_make_it_in(self, sftp_server: OpenSsh, tmp_path: Path) -> None:
        maker = maker_on(sftp_server, tmp_path / "no" / "store")
        with pytest.raises(Unreachable, match="mkdir"):
            maker().write("u/a", b"x")
        assert list(maker().list()) == []
        assert not (tmp_path / "no").exists()
        maker.close()

    def test_reading_leaves_no_marker(self, store: Store, root: Path) -> None:
        with pytest.raises(NotFound):
            store.stat("u/a")
        assert not root.exists()

    def test_odd_things_are_reported_and_not_touched(self, store: Store, root: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        store.write("u/a", b"x")
        (root / "u" / "link").symlink_to(outside / "secret")
        (root / "linked").symlink_to(outside)
        os.mkfifo(root / "u" / "fifo")
        (root / "u" / os.fsdecode(b"bad\xff")).write_bytes(b"x")
        assert names(store) == {"u/a"}
        assert len(store.problems) == 4
        for key in ("u/link", "u/fifo"):
            with pytest.raises(NotFound):
                store.read(key)
            store.write(key, b"mine")
            assert store.read(key) == b"mine"
        assert (outside / "secret").read_bytes() == b"secret"


class TestWhatTheServerDecides:
    def test_info_tells_after_the_first_call(self, store: Store) -> None:
        assert not store.info().conditional_write
        list(store.list())
        info = store.info()
        assert (info.atomic_replace, info.conditional_write, info.server_copy, info.server_move) == (True,) * 4
        assert info.exact_versions

    def test_nobody_loses_an_update(self, make: Maker, root: Path) -> None:
        """Eight stores of their own count up with if_version, and each success counts."""
        make().write("u/count", b"000")
        won = [0] * 8

        def count(number: int) -> None:
            store = make()
            while won[number] < 5:
                found = store.stat("u/count")
                value = int(store.read("u/count"))
                try:
                    store.write("u/count", b"%03d" % (value + 1), if_version=found.version)
                    won[number] += 1
                except Conflict:
                    pass

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(count, range(8)))
        assert make().read("u/count") == b"040"
        assert area(root) == set()

    def test_a_claim_that_nobody_finishes_is_taken_over(
        self, store: Store, make: Maker, root: Path, tmp_path: Path
    ) -> None:
        """A writer that stops between claiming and renaming loses the claim, and notices it when it goes on."""
        version = store.write("u/a", b"one").version
        with Writer(make, tmp_path / "point", "sftp.replacing", "u/a", if_version=version) as slow:
            began = time.monotonic()
            store.write("u/a", b"taken over", if_version=version)
            assert 1.5 < time.monotonic() - began < 15
        assert slow.said == "Conflict"
        assert store.read("u/a") == b"taken over"
        assert area(root) == set()

    def test_a_writer_killed_with_a_claim(self, store: Store, make: Maker, root: Path, tmp_path: Path) -> None:
        version = store.write("u/a", b"one").version
        with Writer(make, tmp_path / "point", "sftp.replacing", "u/a", if_version=version) as killed:
            killed.process.kill()
        assert store.read("u/a") == b"one"
        store.write("u/a", b"two", if_version=version)
        assert store.read("u/a") == b"two"

    def test_without_the_extensions_less_is_claimed_and_it_works(self, tmp_path: Path) -> None:
        refused = "internal-sftp -P posix-rename,hardlink,fsync,copy-data,limits,statvfs"
        with openssh(tmp_path / "sshd", refused) as server:
            maker = maker_on(server, tmp_path / "store")
            store = maker()
            store.write("u/a", b"first", if_absent=True)
            with pytest.raises(Conflict):
                store.write("u/a", b"second", if_absent=True)
            info = store.info()
            assert (info.atomic_replace, info.conditional_write, info.server_copy, info.server_move) == (False,) * 4
            first = store.stat("u/a").version
            assert store.write("u/a", b"third", if_version=first).version != first
            with pytest.raises(Conflict):
                store.write("u/a", b"fourth", if_version=first)
            data = random.Random(1).randbytes(9 * MIB)
            store.upload("u/big", lambda offset, length: data[offset : offset + length], len(data))
            store.copy("u/big", "u/copied")
            store.move("u/big", "u/a")
            assert store.read("u/copied") == store.read("u/a") == data
            assert names(store) == {"u/a", "u/copied"}
            assert area(tmp_path / "store") == set()
            maker.close()

    def test_a_full_disk(self, sftp_server: OpenSsh, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "runfs-test", disk]).returncode:
            pytest.skip("only root can mount a small disk")
        try:
            maker = maker_on(sftp_server, disk / "store")
            store = maker()
            store.write("u/a", b"x" * MIB)
            with pytest.raises(StoreFull, match="is full"):
                store.write("u/b", bytes(5 * MIB))
            with pytest.raises(StoreFull, match="is full"):
                store.upload("u/b", lambda offset, length: bytes(length), BIG)
            assert names(store) == {"u/a"}
            assert area(disk / "store") == set()
            store.write("u/b", b"x" * MIB)
            maker.close()
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


class TestLeftovers:
    def test_a_killed_writer_leaves_nothing_visible_and_sweep_removes_the_rest(
        self, make: Maker, store: Store, sftp_server: OpenSsh, root: Path
    ) -> None:
        store.write("u/a", b"x")
        config = {"url": sftp_server.url(root), "ssh_config": "none", **sftp_server.options()}
        code = (
            "import os, signal\n"
            "from vfs.stores import open_store\n"
            f"store = open_store({config!r})\n"
            "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
            "store.upload('u/new', lambda offset, length: kill() if offset else bytes(length), 20 * 2**20)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert names(store) == {"u/a"}
        left = set(os.listdir(root / places.TEMPORARY))
        assert len(left) == 1
        assert store.sweep() == 0
        assert set(os.listdir(root / places.TEMPORARY)) == left
        os.utime(root / places.TEMPORARY / left.pop(), (1, 1))
        claim = root / places.TEMPORARY / "claim-0123"
        claim.mkdir()
        (claim / "file").write_bytes(b"x")
        os.utime(claim, (1, 1))
        assert store.sweep() == 2
        assert area(root) == set()
        assert names(store) == {"u/a"}

    def test_the_file_store_sweeps_claims_too(self, root: Path) -> None:
        root.mkdir(parents=True)
        local = FileStore(root)
        local.write("u/a", b"x")
        claim = root / places.TEMPORARY / "claim-0123"
        claim.mkdir()
        (claim / "file").write_bytes(b"x")
        os.utime(claim, (1, 1))
        assert local.sweep() == 1
        assert not claim.exists()
        assert local.read("u/a") == b"x"


# Faults
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(sftp_server: OpenSsh) -> Iterator[FaultProxy]:
    with FaultProxy(sftp_server.port) as made:
        sftp_server.know(made.port)
        yield made


@pytest.fixture
def direct(store: Store) -> Store:
    """The same content, past the proxy."""
    store.write("u/small", SMALL)
    store.upload("u/large", lambda offset, length: LARGE[offset : offset + length], len(LARGE))
    return store


@pytest.fixture
def faulty(proxy: FaultProxy, direct: Store, sftp_server: OpenSsh, root: Path) -> Iterator[Store]:
    """The store through the proxy, with limits short enough for a test."""
    limits = {"deadline_s": DEADLINE_S, "window_s": 0.5, "least_throughput": 200_000}
    options = {"ssh_config": "none", **sftp_server.options(), **limits}
    store = open_store(sftp_server.url(root, proxy.port), options=options)
    yield store
    store.disconnect()


def zeros(offset: int, length: int) -> bytes:
    return bytes(length)


CALLS: dict[str, Callable[[Store], object]] = {
    "stat": lambda store: store.stat("u/small", deadline=DEADLINE_S),
    "read": lambda store: store.read("u/small", deadline=DEADLINE_S),
    "read large": lambda store: store.read("u/large", 0, len(LARGE), deadline=DEADLINE_S),
    "write": lambda store: store.write("u/written", b"x" * 1000, if_absent=True, deadline=DEADLINE_S),
    "upload": lambda store: store.upload("u/new", zeros, BIG, if_absent=True, deadline=DEADLINE_S),
    "list": lambda store: list(store.list(deadline=DEADLINE_S)),
    "delete": lambda store: store.delete("u/nothing", deadline=DEADLINE_S),
    "copy": lambda store: store.copy("u/small", "u/copied", deadline=DEADLINE_S),
    "move": lambda store: store.move("u/nothing", "u/moved", deadline=DEADLINE_S),
    "sweep": lambda store: store.sweep(deadline=DEADLINE_S),
}


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except StoreError as error:
        return error


def timed(call: Callable[[], object]) -> tuple[float, object]:
    began = time.monotonic()
    result = outcome(call)
    return time.monotonic() - began, result


class TestNothingHangs:
    @pytest.mark.parametrize(
        ("mode", "connected"),
        [("refuse", True), ("silent", True), ("dribble", True), ("busy", True), ("refuse", False), ("silent", False)],
    )
    def test_every_call_ends_in_time_and_says_why(
        self, proxy: FaultProxy, faulty: Store, direct: Store, mode: str, connected: bool
    ) -> None:
        if connected:
            faulty.stat("u/small", deadline=20)
        proxy.set(mode)
        with ThreadPoolExecutor(len(CALLS)) as pool:
            running = {what: pool.submit(timed, partial(call, faulty)) for what, call in CALLS.items()}
            results = {what: each.result() for what, each in running.items()}
        expected = Unreachable if mode in ("refuse", "busy") else StoreTimeout
        assert {what: type(result) for what, (_, result) in results.items()} == dict.fromkeys(CALLS, expected)
        for took, result in results.values():
            assert took < DEADLINE_S + MARGIN_S
            assert isinstance(result, StoreError)
            assert result.temporary
            assert f"127.0.0.1:{proxy.port}" in str(result)
        assert names(direct) - {"u/written", "u/copied"} == {"u/small", "u/large"}

    def test_a_stalled_store_does_not_hold_up_another(self, proxy: FaultProxy, faulty: Store, direct: Store) -> None:
        proxy.set("silent")
        stuck = threading.Thread(target=lambda: outcome(lambda: list(faulty.list())))
        stuck.start()
        time.sleep(0.1)
        took, result = timed(lambda: direct.read("u/small"))
        stuck.join()
        assert result == SMALL
        assert took < 1

    @pytest.mark.parametrize("connected", [False, True])
    def test_an_expired_call_closes_its_socket(
        self, proxy: FaultProxy, direct: Store, sftp_server: OpenSsh, root: Path, connected: bool
    ) -> None:
        """Also one that ends long before a window has: the next call must not wait on the same dead connection."""
        options = {"ssh_config": "none", **sftp_server.options(), "window_s": 10 if connected else 1}
        store = open_store(sftp_server.url(root, proxy.port), options=options)
        if connected:
            store.stat("u/small", deadline=20)
        proxy.set("silent")
        assert isinstance(outcome(lambda: store.stat("u/small", deadline=1.2)), StoreTimeout)
        end = time.monotonic() + 5
        while proxy.open_connections() and time.monotonic() < end:
            time.sleep(0.02)
        assert proxy.open_connections() == 0
        proxy.set("pass")
        assert store.read("u/small", deadline=20) == SMALL
        store.disconnect()

    def test_a_disconnected_store_holds_no_connection(self, proxy: FaultProxy, faulty: Store) -> None:
        faulty.stat("u/small", deadline=20)
        assert proxy.open_connections()
        faulty.disconnect()
        end = time.monotonic() + 4
        while proxy.open_connections() and time.monotonic() < end:
            time.sleep(0.02)
        assert proxy.open_connections() == 0

    def test_a_read_that_trickles_is_broken_off_long_before_the_deadline(
        self, proxy: FaultProxy, faulty: Store
    ) -> None:
        faulty.stat("u/small", deadline=20)
        proxy.rate = 20_000
        proxy.set("dribble")
        took, result = timed(lambda: faulty.read("u/large", 0, len(LARGE), deadline=60))
        assert isinstance(result, StoreTimeout)
        assert took < 10  # four tries of a window or of connecting, and the pauses between them

    def test_a_slow_read_above_it_succeeds(self, proxy: FaultProxy, faulty: Store) -> None:
        faulty.stat("u/small", deadline=20)
        proxy.rate = 1_500_000
        proxy.set("dribble")
        took, result = timed(lambda: faulty.read("u/large", 0, len(LARGE), deadline=60))
        assert result == LARGE
        assert took > 1

    def test_an_upload_into_silence_is_broken_off_long_before_the_deadline(
        self, proxy: FaultProxy, faulty: Store, direct: Store
    ) -> None:
        def source(offset: int, length: int) -> bytes:
            if offset >= 16 * MIB:
                proxy.set("silent")
            return bytes(length)

        took, result = timed(lambda: faulty.upload("u/new", source, 60 * MIB, deadline=60))
        assert isinstance(result, StoreTimeout)
        assert took < 30
        assert names(direct) == {"u/small", "u/large"}


class TestNothingIsWrong:
    @pytest.mark.parametrize("after", [100, 5_000, 2 * MIB])
    @pytest.mark.parametrize("length", [None, len(LARGE)])
    def test_a_cut_answer_is_never_taken_for_the_whole(
        self, proxy: FaultProxy, faulty: Store, after: int, length: int | None
    ) -> None:
        proxy.cut_after = after
        proxy.set("cut")
        _, result = timed(lambda: faulty.read("u/large", 0, length, deadline=DEADLINE_S))
        assert isinstance(result, StoreError) or result == LARGE

    @pytest.mark.parametrize("mode", ["refuse", "silent", "cut"])
    def test_an_upload_broken_in_the_middle_leaves_nothing_visible(
        self, proxy: FaultProxy, faulty: Store, direct: Store, mode: str
    ) -> None:
        def source(offset: int, length: int) -> bytes:
            if offset >= 8 * MIB:
                proxy.cut_after = 10
                proxy.set(mode)
            return bytes(length)

        took, result = timed(lambda: faulty.upload("u/new", source, BIG, deadline=5))
        assert isinstance(result, StoreError)
        assert not isinstance(result, Conflict)
        assert took < 5 + MARGIN_S
        assert names(direct) == {"u/small", "u/large"}

    def test_an_upload_survives_a_dropped_connection(self, proxy: FaultProxy, faulty: Store, direct: Store) -> None:
        data = random.Random(9).randbytes(BIG)

        def source(offset: int, length: int) -> bytes:
            if offset == 8 * MIB:
                proxy.set("refuse")
                threading.Timer(0.3, lambda: proxy.set("pass")).start()
            return data[offset : offset + length]

        stat = faulty.upload("u/new", source, BIG, if_absent=True, deadline=30)
        assert stat.size == BIG
        assert direct.read("u/new") == data

    @pytest.mark.parametrize("how", ["if_absent", "if_version"])
    def test_a_write_whose_answer_was_lost_is_not_taken_for_a_lost_race(
        self, proxy: FaultProxy, direct: Store, sftp_server: OpenSsh, root: Path, tmp_path: Path, how: str
    ) -> None:
        """The server gives the name, its answer is cut; the second try finds the first: it is ours, so no Conflict."""
        version = None if how == "if_absent" else direct.write("u/new", b"before").version
        options = {"ssh_config": "none", **sftp_server.options()}
        through = Maker(sftp_server.url(root, proxy.port), **options)
        point = "sftp.naming" if how == "if_absent" else "sftp.replacing"
        with Writer(
            through, tmp_path / "point", point, "u/new", if_absent=version is None, if_version=version
        ) as writer:
            proxy.cut_after = 0
            proxy.set("cut")
            threading.Timer(0.3, lambda: proxy.set("pass")).start()
        assert direct.read("u/new") == b"mine"
        assert writer.said == direct.stat("u/new").version

    @pytest.mark.parametrize("after", [0, 300, 600])
    def test_a_write_cut_anywhere_is_done(self, proxy: FaultProxy, faulty: Store, direct: Store, after: int) -> None:
        version = direct.write("u/new", b"before").version
        faulty.stat("u/small", deadline=20)
        proxy.cut_after = after
        proxy.set("cut")
        threading.Timer(0.25, lambda: proxy.set("pass")).start()
        stat = faulty.write("u/new", b"mine", if_version=version, deadline=20)
        assert direct.read("u/new") == b"mine"
        assert direct.stat("u/new").version == stat.version

    def test_a_write_whose_answer_was_lost_still_loses_to_another(
        self, proxy: FaultProxy, faulty: Store, direct: Store
    ) -> None:
        direct.write("u/new", b"another's")
        proxy.cut_after = 0
        proxy.set("cut")
        threading.Timer(0.25, lambda: proxy.set("pass")).start()
        with pytest.raises(Conflict):
            faulty.write("u/new", b"mine", if_absent=True, deadline=20)
        assert direct.read("u/new") == b"another's"


class TestRecovery:
    @pytest.mark.parametrize("mode", ["refuse", "silent", "busy", "cut"])
    def test_after_the_fault_all_is_well(self, proxy: FaultProxy, faulty: Store, mode: str) -> None:
        faulty.stat("u/small", deadline=20)
        proxy.set(mode)
        outcome(lambda: faulty.stat("u/small", deadline=0.7))
        proxy.set("pass")
        assert faulty.read("u/small", deadline=20) == SMALL
        assert faulty.write("u/new", b"x", if_absent=True, deadline=20).size == 1
        assert names(faulty) == {"u/small", "u/large", "u/new"}

    def test_a_slow_answer_is_not_a_fault(self, proxy: FaultProxy, faulty: Store) -> None:
        faulty.stat("u/small", deadline=20)
        proxy.set("delay")
        assert faulty.read("u/small", deadline=20) == SMALL

    def test_a_restarted_server(self, tmp_path: Path) -> None:
        with openssh(tmp_path / "sshd") as server:
            maker = maker_on(server, tmp_path / "store")
            store = maker()
            store.write("u/a", b"before")
            server.stop()
            took, result = timed(lambda: store.read("u/a"))
            assert isinstance(result, Unreachable)
            assert took < 4
            server.start()
            assert store.read("u/a") == b"before"
            for child in server.children():
                os.kill(child, signal.SIGKILL)
            assert store.write("u/b", b"after", if_absent=True).size == 5
            maker.close()

    @pytest.mark.parametrize("mode", ["pass", "silent"])
    def test_a_server_that_is_quiet_while_it_syncs_is_waited_for(
        self, proxy: FaultProxy, sftp_server: OpenSsh, tmp_path: Path, mode: str
    ) -> None:
        """As long as another lane answers."""

        async def prepare(link: Connection) -> None:
            pass

        async def work(link: Connection) -> str:
            async with link.lane():
                with link.quiet():
                    proxy.set(mode)
                    await asyncio.sleep(2)
            return "done"

        config = {"url": sftp_server.url(tmp_path, proxy.port), "ssh_config": "none", **sftp_server.options()}
        calls = Calls(target(config), Limits(window_s=0.4), prepare)
        took, result = timed(lambda: calls.run("sync", "", work, Limits().budget(20), attempts=1))
        calls.close()
        if mode == "pass":
            assert result == "done"
        else:
            assert isinstance(result, StoreTimeout)
            assert took < 2
