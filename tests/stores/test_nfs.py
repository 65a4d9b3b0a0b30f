"""A directory on a mount: refused while the mount is not there, whatever is below it; opened anew when it is stale."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfs.errors import ConfigError, NotFound, Unreachable
from vfs.stores import Volume, broker, open_store, validate
from vfs.stores.nfs import NfsStore


class Share:
    """A directory that is mounted on another one, and unmounted again."""

    def __init__(self, place: Path) -> None:
        self.exported = place / "exported"
        self.point = place / "mnt with space"
        for each in (self.exported, self.point):
            each.mkdir()

    def mount(self) -> None:
        subprocess.run(["mount", "--bind", self.exported, self.point], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.point], check=False, capture_output=True)

    def store(self, **options: object) -> NfsStore:
        url = f"nfs://{self.point}/dir".replace(" ", "%20")
        made = open_store({"url": url, "mount": str(self.point), "remote": "server:/export", **options})
        assert isinstance(made, NfsStore)
        return made


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    made = Share(tmp_path)
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount one directory on another")
    made.mount()
    yield made
    made.unmount()


class TestTheMount:
    def test_is_insisted_on_at_every_call(self, share: Share) -> None:
        store = share.store()
        store.write("u/a", b"x")
        assert store.info().broker == "nfs"
        share.unmount()
        calls: list[Callable[[], object]] = [
            lambda: store.stat("u/a"),
            lambda: store.read("u/a"),
            lambda: store.read_into("u/a", memoryview(bytearray(1))),
            lambda: store.write("u/b", b"x"),
            lambda: store.upload("u/b", lambda offset, length: bytes(length), 1),
            lambda: list(store.list()),
            lambda: store.delete("u/a"),
            lambda: store.copy("u/a", "u/b"),
            lambda: store.move("u/a", "u/b"),
            lambda: store.local_path("u/a"),
            lambda: store.sweep(),
            share.store,
        ]
        for call in calls:
            with pytest.raises(Unreachable, match=r"is not mounted; mount server:/export there"):
                call()
        found = store.check()
        assert not found.reachable
        assert "mount server:/export" in found.problems[0]
        assert list(share.point.iterdir()) == []
        share.mount()
        assert store.read("u/a") == b"x"
        assert store.local_path("u/a") == share.point / "dir" / "u" / "a"

    def test_nothing_is_made_below_a_directory_that_is_no_mount(self, tmp_path: Path) -> None:
        with pytest.raises(Unreachable, match=r"is not mounted.*mount=DIRECTORY"):
            open_store(f"nfs://{tmp_path}/store")
        assert list(tmp_path.iterdir()) == []

    def test_another_share_in_its_place(self, share: Share, tmp_path: Path) -> None:
        store = share.store()
        store.write("u/a", b"x")
        share.unmount()
        share.exported.rename(tmp_path / "aside")
        share.exported.mkdir()
        share.mount()
        with pytest.raises(Unreachable, match="disk mounted"):
            store.read("u/a")

    def test_the_directory_of_a_mount_that_was_removed_on_the_server(self, share: Share) -> None:
        """The mount is there, what it shows is not any more: nothing can be made in it, and it says so."""
        store = share.store()
        store.write("u/a", b"x")
        shutil.rmtree(share.exported)
        for call in (lambda: store.stat("u/a"), lambda: store.write("u/b", b"x")):
            with pytest.raises(Unreachable, match="cannot be opened"):
                call()


OF_THE_ROOT, OF_WHAT_IS_IN_IT = 3, 4  # the calls before belong to opening the store
STALE = """
import sys
from vfs.errors import StoreError
from vfs.stores import open_store
store = open_store(sys.argv[1])
try: print(store.{call})
except StoreError as error: print(type(error).__name__, error)
"""


STALE_CALLS = ["read('u/a')", "write('u/a', b'y').size", "stat('u/a').size", "delete('u/a')", "copy('u/a', 'u/b').size"]


class TestStale:
    """The kernel's own answer, put into the process by strace: the n-th openat of that path gives ESTALE."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Iterator[Callable[..., str]]:
        strace = shutil.which("strace")
        if strace is None:
            pytest.skip("strace is not installed")
        directory = Path("/dev/shm") / f"runfs-stale-{os.getpid()}"
        directory.mkdir()

        def go(call: str, when: str, scheme: str = "nfs") -> str:
            open_store(f"file://{directory}/store").write("u/a", b"content")
            url = f"{scheme}://{directory}/store" + ("?mount=/dev/shm" if scheme == "nfs" else "")
            inject = ["-e", "trace=openat", "-e", f"inject=openat:error=ESTALE:when={when}"]
            only = ["-P", str(directory / "store")]
            command = [strace, "-f", "-o", "/dev/null", *inject, *only, sys.executable, "-c"]
            done = subprocess.run(
                [*command, STALE.format(call=call), url], capture_output=True, text=True, check=True, timeout=60
            )
            return done.stdout.strip()

        yield go
        shutil.rmtree(directory)

    @pytest.mark.parametrize("when", [OF_THE_ROOT, OF_WHAT_IS_IN_IT])
    @pytest.mark.parametrize("call", STALE_CALLS)
    def test_a_stale_directory_is_opened_anew(self, run: Callable[..., str], call: str, when: int) -> None:
        assert "Unreachable" not in run(call, f"{when}")
        assert "Unreachable" in run(call, f"{when}", "file")

    def test_one_that_stays_stale_is_unreachable(self, run: Callable[..., str]) -> None:
        said = run("read('u/a')", f"{OF_THE_ROOT}+")
        assert said.startswith("Unreachable")
        assert "tale" in said


class TestConfiguration:
    @pytest.mark.parametrize(
        ("url", "match"),
        [
            ("nfs://host/export", "three slashes"),
            ("nfs:///", "three slashes"),
            ("nfs:///mnt/a?mount=/mnt/b", "mount"),
            ("nfs:///mnt/a?mount=mnt", "mount"),
            ("nfs:///mnt/a?mount=/", "mount"),
            ("nfs:///mnt/a?remote=/export", "host:/export"),
            ("nfs:///mnt/a?remot=h:/e", "remote"),
        ],
    )
    def test_bad_ones(self, url: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            validate(url)

    def test_the_volume(self) -> None:
        url = "nfs:///mnt/share/dir?mount=/mnt/share&remote=host:/export"
        assert validate(url) == []
        assert broker("nfs").volume({"url": url}) == Volume("nfs", "host:/export", Path("/mnt/share"))
        assert broker("nfs").volume({"url": "nfs:///mnt/share"}) is None

    def test_what_is_not_there_is_still_not_found(self, share: Share) -> None:
        with pytest.raises(NotFound):
            share.store().stat("u/a")
