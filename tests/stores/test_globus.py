"""The Globus store against the SDK's own testing responses. What the service itself does is not claimed."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import responses
from globus_sdk.testing import RegisteredResponse, load_response

from tests.stores.servers_globus import OPTIONS, OURS, THEIRS, Globus, document
from tests.stores.servers_globus import globus as globus
from tests.stores.servers_globus import globus_stores as globus_stores
from vfs.errors import (
    ConfigError,
    Conflict,
    Denied,
    NotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unreachable,
    UsageError,
)
from vfs.stores import Store, open_store, validate

URL = f"globus://{THEIRS}/share"


@pytest.fixture
def store(globus_stores: Callable[..., Store]) -> Store:
    return globus_stores()


def put(globus: Globus, key: str, data: bytes) -> None:
    place = globus.remote / "share" / key
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def operations(globus: Globus) -> list[str]:
    return [name for name, _asked in globus.asked]


def test_an_upload_is_sent_under_a_temporary_name_and_renamed(store: Store, globus: Globus, tmp_path: Path) -> None:
    stat = store.write("u/deep/a.bin", b"content")
    assert (stat.key, stat.size) == ("u/deep/a.bin", 7)
    assert (globus.remote / "share/u/deep/a.bin").read_bytes() == b"content"
    sent = next(asked for name, asked in globus.asked if name == "transfer")
    assert (sent["source_endpoint"], sent["destination_endpoint"]) == (OURS, THEIRS)
    assert sent["verify_checksum"] is True
    assert sent["DATA"][0]["source_path"].startswith(f"{tmp_path}/staging/.runfs-staging/up-")
    assert sent["DATA"][0]["destination_path"].startswith("/share/.runfs.tmp/up-")
    assert sent["deadline"]
    assert [asked["new_path"] for name, asked in globus.asked if name == "rename"] == ["/share/u/deep/a.bin"]
    assert list((tmp_path / "staging/.runfs-staging").iterdir()) == []
    assert list((globus.remote / "share/.runfs.tmp").iterdir()) == []


def test_a_read_brings_the_file_once(store: Store, globus: Globus, tmp_path: Path) -> None:
    put(globus, "u/a", b"0123456789")
    assert store.read("u/a", 3, 4) == b"3456"
    assert store.read("u/a") == b"0123456789"
    assert store.read("u/a", 8, 10) == b"89"
    assert store.read("u/a", 10, 5) == b""
    assert store.read("u/a", 99) == b""
    assert operations(globus).count("transfer") == 1
    assert store.info().ranges is False
    put(globus, "u/a", b"new")
    assert store.read("u/a") == b"new"
    assert store.sweep(0) == 2
    assert store.read("u/a") == b"new"
    with pytest.raises(UsageError):
        store.read("u/a", -1)


def test_listing(store: Store, globus: Globus) -> None:
    for key in ("u1/a", "u1/b/c", "u10/a", "top", ".runfs/u1/manifest.json", ".runfs.tmp/up-1"):
        put(globus, key, key.encode())
    os.symlink("/etc/passwd", globus.remote / "share/u1/link")
    put(globus, "u1/ space ", b"x")
    every = {"u1/a", "u1/b/c", "u10/a", "top", ".runfs/u1/manifest.json"}
    assert {stat.key for stat in store.list()} == every
    assert any("is a link" in problem for problem in store.problems)
    assert any("white space" in problem for problem in store.problems)
    assert {stat.key for stat in store.list("u1")} == {"u1/a", "u1/b/c", "u10/a"}
    assert {stat.key for stat in store.list("u1/")} == {"u1/a", "u1/b/c"}
    assert {stat.key for stat in store.list("u1/", recursive=False)} == {"u1/a"}
    assert {stat.key for stat in store.list(recursive=False)} == {"top"}
    assert list(store.list("nothing/")) == []
    assert next(iter(store.list("u1/b"))) == store.stat("u1/b/c")


def test_a_listing_comes_in_pages(store: Store, globus: Globus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfs.stores.globus.service.PAGE", 3)
    for number in range(7):
        put(globus, f"u/{number}", b"x")
    assert len({stat.key for stat in store.list("u/")}) == 7
    assert operations(globus).count("ls") == 3


@pytest.mark.parametrize("replaces", [True, False])
def test_replacing(store: Store, globus: Globus, replaces: bool) -> None:
    globus.replaces = replaces
    first = store.write("u/a", b"first")
    assert store.write("u/a", b"second one").version != first.version
    assert (globus.remote / "share/u/a").read_bytes() == b"second one"
    assert list((globus.remote / "share/.runfs.tmp").iterdir()) == []
    assert store.read("u/a") == b"second one"
    assert store.info().atomic_replace is False


def test_conditions_are_looked_at_before(store: Store, globus: Globus) -> None:
    first = store.write("u/a", b"first", if_absent=True)
    sent = operations(globus).count("transfer")
    with pytest.raises(Conflict):
        store.write("u/a", b"second", if_absent=True)
    with pytest.raises(Conflict):
        store.write("u/a", b"second", if_version="other")
    assert operations(globus).count("transfer") == sent
    assert store.write("u/a", b"second", if_version=first.version).size == 6
    assert store.info().conditional_write is False


def test_a_file_and_a_directory_of_one_name(store: Store, globus: Globus) -> None:
    store.write("u/dir/x", b"x")
    with pytest.raises(Conflict, match="a directory in its way"):
        store.write("u/dir", b"y")
    with pytest.raises(NotFound):
        store.stat("u/dir")
    store.delete("u/dir")
    assert store.read("u/dir/x") == b"x"


def test_delete_copy_and_move(store: Store, globus: Globus) -> None:
    store.write("u/a", b"content")
    assert store.copy("u/a", "u/b").size == 7
    assert store.move("u/b", "v/c").key == "v/c"
    assert {stat.key for stat in store.list()} == {"u/a", "v/c"}
    with pytest.raises(Conflict):
        store.move("u/a", "v/c", if_absent=True)
    assert store.move("u/a", "v/c").size == 7
    store.delete("v/c")
    store.delete("v/c")
    assert list(store.list()) == []


def test_a_sweep_removes_what_crashes_left(store: Store, globus: Globus, tmp_path: Path) -> None:
    put(globus, ".runfs.tmp/up-1", b"x")
    put(globus, ".runfs.tmp/old-1-u+b", b"x")
    store.write("u/a", b"x")
    staged = tmp_path / "staging/.runfs-staging/up-2"
    staged.write_bytes(b"x")
    assert store.sweep() == 0
    old = time.time() - 90_000
    os.utime(staged, (old, old))
    os.utime(globus.remote / "share/.runfs.tmp/up-1", (old, old))
    assert store.sweep() == 2
    assert {stat.key for stat in store.list()} == {"u/a"}
    assert (globus.remote / "share/.runfs.tmp/old-1-u+b").exists()  # it may be the only copy
    assert "set aside" in store.problems[0]


def test_a_source_that_fails_leaves_nothing(store: Store, globus: Globus, tmp_path: Path) -> None:
    def source(offset: int, length: int) -> bytes:
        raise FileNotFoundError(2, "the local file vanished")

    with pytest.raises(FileNotFoundError, match="vanished"):
        store.upload("u/a", source, 5)
    with pytest.raises(StoreError, match="changed meanwhile"):
        store.upload("u/a", lambda offset, length: b"x", 5)
    assert list((tmp_path / "staging/.runfs-staging").iterdir()) == []
    assert "transfer" not in operations(globus)


def test_read_only_and_disconnected(globus_stores: Callable[..., Store], globus: Globus) -> None:
    put(globus, "u/a", b"x")
    store = globus_stores(read_only=True)
    assert store.read("u/a") == b"x"
    for change in (lambda: store.write("u/b", b"x"), lambda: store.delete("u/a"), lambda: store.move("u/a", "u/b")):
        with pytest.raises(Denied, match="read-only"):
            change()
    store.disconnect()
    with pytest.raises(Unreachable, match="disconnected"):
        store.read("u/a")
    store.connect({"client_secret": "other"})
    assert store.read("u/a") == b"x"
    with pytest.raises(ConfigError, match="user: no credential of Globus; give client_id"):
        store.connect({"user": "me"})


def test_check(store: Store) -> None:
    check = store.check()
    assert check.reachable
    assert check.readable
    assert check.writable
    assert check.conditional is True  # it looked before; `info` says that this is no promise
    assert check.problems == []


# --- what goes wrong ------------------------------------------------------------------------------------------------

CONSENT = f"{'urn:globus:auth:scope:transfer.api.globus.org:all'}[*https://auth.globus.org/scopes/{THEIRS}/data_access]"


@pytest.mark.parametrize(
    ("status", "answer", "error", "message"),
    [
        (
            403,
            {
                "code": "ConsentRequired",
                "message": "Missing required data_access consent",
                "required_scopes": [CONSENT],
            },
            Denied,
            f"run `globus session consent '{CONSENT}'`",
        ),
        (
            403,
            {
                "code": "AuthorizationRequired",
                "message": "no",
                "authorization_parameters": {"session_required_single_domain": ["uni.example"]},
            },
            Denied,
            "run `globus session update uni.example`",
        ),
        (
            403,
            {
                "code": "AuthorizationRequired",
                "message": "no",
                "authorization_parameters": {"session_required_identities": ["one@uni.example"]},
            },
            Denied,
            "run `globus session update one@uni.example`",
        ),
        (
            401,
            {"code": "AuthenticationFailed", "message": "Token is not active"},
            Denied,
            "a new token for the scope urn:globus:auth:scope:transfer.api.globus.org:all",
        ),
        (403, document("transfer.operation_stat", "permission_denied"), Denied, "lets this login not do that"),
        (404, {"code": "EndpointNotFound", "message": "No such endpoint"}, StoreError, "check its UUID"),
        (
            502,
            {"code": "GCDisconnectedException", "message": "offline"},
            Unreachable,
            "Connect Personal is not running",
        ),
        (503, {"code": "ServiceUnavailable", "message": "maintenance"}, Unreachable, "maintenance"),
        (400, {"code": "ClientError.BadRequest", "message": "odd"}, StoreError, "Globus answered 400"),
    ],
)
def test_refusals(
    globus_stores: Callable[..., Store],
    globus: Globus,
    status: int,
    answer: dict[str, Any],
    error: type[StoreError],
    message: str,
) -> None:
    globus.fail["stat"] = (status, answer)
    with pytest.raises(StoreError) as caught:
        globus_stores(deadline_s=2).read("u/a")
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"status": "FAILED", "fatal_error": {"code": "FILE_NOT_FOUND", "description": "gone"}}, NotFound, "gone"),
        ({"status": "FAILED", "fatal_error": {"code": "QUOTA_EXCEEDED", "description": "full"}}, StoreFull, "quota"),
        ({"status": "FAILED", "fatal_error": {"code": "CANCELED", "description": "by admin"}}, StoreError, "task show"),
        ({"status": "INACTIVE", "nice_status_short_description": "expired"}, Denied, "has expired"),
        ({"status": "ACTIVE", "nice_status": "PERMISSION_DENIED"}, Denied, "lets this login not do that"),
        ({"status": "ACTIVE", "nice_status": "Queued"}, StoreTimeout, "did not end within 1 s and was cancelled"),
    ],
)
def test_tasks_that_fail(
    globus_stores: Callable[..., Store], globus: Globus, task: dict[str, Any], error: type[StoreError], message: str
) -> None:
    put(globus, "u/a", b"x")
    globus.fail["task"] = (200, {"task_id": "t", **task})
    store = globus_stores()
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        store.read("u/a", deadline=1)
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert time.monotonic() - began < 5
    assert "cancel" in operations(globus)


def test_a_task_outlives_a_service_that_is_away_for_a_while(store: Store, globus: Globus) -> None:
    put(globus, "u/a", b"x")
    globus.fail["task"] = (503, {"code": "ServiceUnavailable", "message": "maintenance"})
    back = threading.Timer(3.0, globus.fail.clear)  # longer than the SDK itself tries again
    back.start()
    assert store.read("u/a", deadline=20) == b"x"
    back.join()
    assert operations(globus).count("transfer") == 1
    assert "cancel" not in operations(globus)


def test_a_failed_upload_leaves_nothing_visible(store: Store, globus: Globus, tmp_path: Path) -> None:
    store.write("u/a", b"first")
    globus.fail["rename"] = (403, document("transfer.operation_stat", "permission_denied"))
    with pytest.raises(Denied):
        store.write("u/a", b"second")
    assert {stat.key: stat.size for stat in store.list()} == {"u/a": 5}
    assert list((globus.remote / "share/.runfs.tmp").iterdir()) == []
    assert list((tmp_path / "staging/.runfs-staging").iterdir()) == []


def test_a_staging_directory_that_globus_calls_otherwise(
    globus_stores: Callable[..., Store], globus: Globus, tmp_path: Path
) -> None:
    put(globus, "u/a", b"x")
    (tmp_path / "elsewhere/.runfs-staging").mkdir(parents=True)
    with pytest.raises(StoreError, match="check that local_path is how the local collection calls local_directory"):
        globus_stores(local_path=str(tmp_path / "elsewhere")).read("u/a")


def test_a_lying_collection(store: Store, globus: Globus) -> None:
    put(globus, "u/a", b"x")
    globus.fail["stat"] = (200, {**document("transfer.operation_stat"), "size": 77})
    with pytest.raises(StoreError, match="1 bytes came instead of 77"):
        store.read("u/a")
    globus.fail["stat"] = (200, {**document("transfer.operation_stat"), "size": "many"})
    with pytest.raises(StoreError, match="has 'many' bytes"):
        store.read("u/a")
    entry = {"type": "file", "size": 1, "last_modified": "now"}
    globus.fail["ls"] = (
        200,
        {"DATA": [{**entry, "name": "../../x"}, {**entry, "name": "a/b"}, {**entry, "name": "c"}]},
    )
    assert [stat.key for stat in store.list("u/")] == ["u/c"]


def test_an_expired_refresh_token(tmp_path: Path) -> None:
    with responses.RequestsMock() as mocked:
        load_response(
            RegisteredResponse(
                service="auth", path="/v2/oauth2/token", method="POST", status=400, json={"error": "invalid_grant"}
            ),
            requests_mock=mocked,
        )
        given = {"local_directory": str(tmp_path), "client_id": "c", "refresh_token": "hush", "local_endpoint": OURS}
        store = open_store(URL, options=given)
        with pytest.raises(Denied, match="login is missing or has expired: set refresh_token") as caught:
            store.stat("u/a")
        assert "hush" not in str(caught.value)
        store.disconnect()


def test_no_network(tmp_path: Path) -> None:
    with responses.RequestsMock(assert_all_requests_are_fired=False):
        store = open_store(URL, options={"local_directory": str(tmp_path), **OPTIONS})
        with pytest.raises(Unreachable, match="Globus cannot be reached"):
            store.stat("u/a")
        store.disconnect()


def test_data_access_is_asked_for(globus: Globus, globus_stores: Callable[..., Store]) -> None:
    store: Any = globus_stores(data_access=True)
    assert store._service._scope() == (
        "urn:globus:auth:scope:transfer.api.globus.org:all"
        f"[*https://auth.globus.org/scopes/{THEIRS}/data_access *https://auth.globus.org/scopes/{OURS}/data_access]"
    )


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("globus://lab/share", {}, "UUID-OF-THE-COLLECTION"),
        (URL, {"local_endpoint": "here"}, "local_endpoint: give the UUID"),
        (URL, {"local_directory": "staging"}, "local_directory: give the full path"),
        (URL, {"client_id": ""}, "client_id: set it, or GLOBUS_CLIENT_ID"),
        (URL, {"client_secret": ""}, "set one of them, or GLOBUS_CLIENT_SECRET"),
        (f"{URL}?refresh_token=x", {}, "no refresh_token in a URL"),
        (URL, {"local_endpiont": "x"}, "did you mean local_endpoint"),
    ],
)
def test_bad_configurations(url: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOBUS_CLIENT_ID", "GLOBUS_CLIENT_SECRET", "GLOBUS_REFRESH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        validate(url, options={"local_directory": "/tmp", **OPTIONS, **options})


def test_credentials_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOBUS_CLIENT_ID", "c")
    monkeypatch.setenv("GLOBUS_REFRESH_TOKEN", "hush")
    warnings = validate(URL, options={"local_directory": "/tmp", "local_endpoint": OURS})
    assert "one machine only" in warnings[0]


def test_without_the_sdk_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "globus_sdk", None)
    with pytest.raises(ConfigError, match=r"pip install 'runfs\[globus\]'"):
        validate(URL, options={"local_directory": "/tmp", **OPTIONS})
