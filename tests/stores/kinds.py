"""The fixtures behind the table of `conftest.py`: stores on real servers, one server of each kind for a session."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rclone import JSON_LISTING, Rclone, rclone
from tests.servers import Seaweed
from vfs.stores import Store, open_store

MakeStore = Callable[..., Store]
# `make test-large`: what takes minutes, and tens of GB of disk.
LARGE = os.environ.get("RUNFS_TEST_LARGE", "") not in ("", "0")


class Maker:
    """Makes stores of one configuration; `close` lets go of all of them."""

    _PORT = re.compile(r"(?<=\d):\d+/")
    many = 1100  # objects: more than S3 lists in one answer

    def __init__(self, url: str, **options: object) -> None:
        self.url = url
        self.options = options
        self.made: list[Store] = []

    def __call__(self, **options: object) -> Store:
        self.made.append(open_store({"url": self.url, **self.options, **options}))
        return self.made[-1]

    @property
    def port(self) -> int:
        """The server's, as the URL has it."""
        found = self._PORT.search(self.url)
        assert found is not None
        return int(found[0].strip(":/"))

    def through(self, port: int, **options: object) -> Store:
        """A store at the same place by way of another port: a proxy's."""
        self.made.append(open_store({"url": self._PORT.sub(f":{port}/", self.url), **self.options, **options}))
        return self.made[-1]

    def close(self) -> None:
        for store in self.made:
            store.disconnect()


def own_prefix() -> str:
    return "t-" + os.urandom(6).hex()


@pytest.fixture
def memory_stores() -> MakeStore:
    return Maker(f"memory://{os.urandom(6).hex()}")


@pytest.fixture
def file_stores(tmp_path: Path) -> MakeStore:
    return Maker(f"file://{tmp_path}/store")


@pytest.fixture
def s3(seaweed: Seaweed) -> Iterator[MakeStore]:
    """S3 stores on SeaweedFS, all of one test under one prefix of their own."""
    url = f"s3://{seaweed.bucket}/{own_prefix()}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    maker = Maker(url, **seaweed.options())
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with rclone("s3", tmp_path_factory.mktemp("rclone") / "s3", "--dir-cache-time=1ms") as server:
        yield server


@pytest.fixture
def rclone_s3_stores(rclone_s3: Rclone) -> Iterator[MakeStore]:
    url = f"s3://{rclone_s3.bucket}/{own_prefix()}?endpoint=http://127.0.0.1:{rclone_s3.port}&region=us-east-1"
    maker = Maker(url, **rclone_s3.credentials(), conditional_writes=False)
    maker.many = 120  # slow to fill; pages are proven on SeaweedFS
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def webdav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with rclone("webdav", tmp_path_factory.mktemp("rclone") / "webdav") as server:
        yield server


@pytest.fixture
def webdav_stores(webdav: Rclone) -> Iterator[MakeStore]:
    maker = Maker(f"webdav+http://127.0.0.1:{webdav.port}/{own_prefix()}", **webdav.credentials())
    maker.many = 120  # it lists whole directories, and is slow to fill
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with rclone("ftp", tmp_path_factory.mktemp("rclone") / "ftp") as server:
        yield server


@pytest.fixture
def ftp_stores(ftp: Rclone) -> Iterator[MakeStore]:
    maker = Maker(f"ftp://127.0.0.1:{ftp.port}/{own_prefix()}", **ftp.credentials())
    maker.many = 200  # it lists whole directories, and is slow to fill
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    """A web server whose directories answer as nginx's `autoindex_format json` does."""
    place = tmp_path_factory.mktemp("rclone")
    template = place / "listing.json"
    template.write_text(JSON_LISTING)
    with rclone("http", place / "http", f"--template={template}", "--dir-cache-time=1ms") as server:
        yield server


class WebMaker(Maker):
    """Read-only stores, and what puts content into the directory that is served."""

    def __init__(self, web: Rclone) -> None:
        prefix = own_prefix()
        super().__init__(f"http://127.0.0.1:{web.port}/{prefix}", listing="json")
        self._behind = Maker(f"file://{web.directory}/{prefix}")
        self._behind()  # makes the directory: without it there is no listing

    def writer(self, **options: object) -> Store:
        return self._behind(**options)


@pytest.fixture
def web_stores(web: Rclone) -> Iterator[MakeStore]:
    maker = WebMaker(web)
    yield maker
    maker.close()
