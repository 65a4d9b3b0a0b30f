"""What `Info` says about bytes that travel, counted on the wire: for every kind of store that has a server."""

import random
import re
from collections.abc import Callable, Iterator

import pytest

from tests.faults import FaultProxy, FtpFaultProxy
from tests.stores.kinds import Maker, WebMaker
from vfs.stores import Store

MIB = 1024 * 1024
CONTENT = random.Random(3).randbytes(6 * MIB)
LITTLE = MIB  # what logins, listings and headers may take, and what servers send ahead
KINDS = {
    "s3": "s3",
    "s3-rclone": "rclone_s3_stores",
    "webdav": "webdav_stores",
    "ftp": "ftp_stores",
    "sftp": "sftp_stores",
    "http": "web_stores",
}
CLAIMED = [kind for kind in KINDS if kind != "http"]


@pytest.fixture
def maker(request: pytest.FixtureRequest) -> Maker:
    made: Maker = request.getfixturevalue(KINDS[request.param])
    return made


@pytest.fixture
def proxy(maker: Maker) -> Iterator[FaultProxy]:
    port = re.search(r"127\.0\.0\.1:(\d+)", maker.url)
    assert port is not None
    with (FtpFaultProxy if maker.url.startswith("ftp:") else FaultProxy)(int(port[1])) as made:
        yield made


@pytest.fixture
def store(maker: Maker, proxy: FaultProxy, request: pytest.FixtureRequest) -> Store:
    """The store through the proxy; it has connected, and `u/large` is there."""
    (maker.writer() if isinstance(maker, WebMaker) else maker()).write("u/large", CONTENT)
    if maker.url.startswith("s3:"):
        store = maker(endpoint=proxy.endpoint)
    else:
        if maker.url.startswith("sftp:"):
            request.getfixturevalue("sftp_server").know(proxy.port)
        store = maker.through(proxy.port)
    assert store.stat("u/large").size == len(CONTENT)
    return store


def traffic(proxy: FaultProxy, call: Callable[[], object]) -> int:
    before = proxy.moved
    call()
    return proxy.moved - before


@pytest.mark.parametrize("maker", KINDS, indirect=True)
def test_ranges(store: Store, proxy: FaultProxy) -> None:
    start = 3 * MIB
    moved = traffic(proxy, lambda: store.read("u/large", start, 1000))
    assert store.info().ranges == (moved < LITTLE), f"{moved:,} bytes for a thousand"
    assert traffic(proxy, lambda: store.read("u/large")) >= len(CONTENT), "the wire is what is counted"


@pytest.mark.parametrize("maker", CLAIMED, indirect=True)
def test_copies(store: Store, proxy: FaultProxy) -> None:
    moved = traffic(proxy, lambda: store.copy("u/large", "u/copy"))
    assert store.info().server_copy == (moved < LITTLE), f"{moved:,} bytes for a copy"


@pytest.mark.parametrize("maker", CLAIMED, indirect=True)
def test_moves(store: Store, proxy: FaultProxy) -> None:
    """On a store that can only copy by itself, a move is such a copy and a delete."""
    moved = traffic(proxy, lambda: store.move("u/large", "u/moved"))
    info = store.info()
    assert (info.server_move or info.server_copy) == (moved < LITTLE), f"{moved:,} bytes for a move"
