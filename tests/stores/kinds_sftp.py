"""The stores on OpenSSH's server that the contract suite and the sftp tests run on; one server for a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.stores.kinds import Maker, MakeStore
from tests.stores.servers_sftp import PASSPHRASE, OpenSsh, openssh, sshd_program


@pytest.fixture(scope="session")
def sftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSsh]:
    """One SFTP server for the whole session; use a directory of your own on it."""
    if sshd_program() is None:
        reason = "sshd is not installed (apt-get install openssh-server)"
        pytest.fail(reason, pytrace=False) if in_ci() else pytest.skip(reason)
    with openssh(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def maker_on(server: OpenSsh, directory: Path, **options: object) -> Maker:
    """Makes stores in a directory of a server."""
    return Maker(server.url(directory), **{"ssh_config": "none", **server.options(), **options})


@pytest.fixture
def sftp_stores(sftp_server: OpenSsh, tmp_path: Path) -> Iterator[MakeStore]:
    """Sftp stores that log in with a key behind a passphrase."""
    key = {"key_file": str(sftp_server.locked_key), "passphrase": PASSPHRASE}
    maker = maker_on(sftp_server, tmp_path / f"store-{os.urandom(3).hex()}", **key)
    yield maker
    maker.close()
