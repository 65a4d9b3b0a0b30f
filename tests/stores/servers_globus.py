"""Globus as far as the SDK's own testing responses go: directories behind mocked HTTP. It shows what the store asks for
and how it takes the answers; the service itself was never asked.

The documents are those of `globus_sdk.testing`, filled in with what is in the directories.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import responses
from globus_sdk.testing import get_response_set, load_response
from requests import PreparedRequest

from vfs.stores import Store, open_store

API = "https://transfer.api.globus.org/v0.10"
THEIRS = "aaaaaaaa-0000-4000-8000-000000000001"
OURS = "bbbbbbbb-0000-4000-8000-000000000002"
OPTIONS = {"client_id": "cccccccc-0000-4000-8000-000000000003", "client_secret": "hush", "local_endpoint": OURS}

Answer = tuple[int, dict[str, str], str]


def document(name: str, case: str = "default") -> dict[str, Any]:
    """What the SDK's testing module has the service answer."""
    found = get_response_set(name).lookup(case).json
    assert isinstance(found, dict)
    return dict(found)


@dataclass
class Globus:
    """Two collections: `remote` is the root of THEIRS; OURS shows this machine's files. `fail` maps an operation ("ls",
    "stat", "mkdir", "rename", "transfer", "delete", "task") to a status and a document to answer with."""

    remote: Path
    replaces: bool = False  # whether a rename takes the place of a file
    fail: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, collection: str, path: str) -> Path:
        return self.remote / path.lstrip("/") if collection == THEIRS else Path(path)

    def answer(self, request: PreparedRequest) -> Answer:
        """Answers any request to the Transfer API."""
        parts = urlsplit(str(request.url))
        names = parts.path.removeprefix("/v0.10/").split("/")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = json.loads(request.body) if request.body else {}
        operation = names[-1] if names[0] == "operation" or names[-1] == "cancel" else names[0]
        self.asked.append((operation, {**query, **body}))
        with self.lock:
            status, found = self._answer(operation, names, query, body)
        return status, {"Content-Type": "application/json"}, json.dumps(found)

    def _answer(
        self, operation: str, names: list[str], query: dict[str, Any], body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        found: dict[str, Any]
        if operation in self.fail:
            status, found = self.fail[operation]
        elif operation == "task":
            status, found = 200, self.tasks[names[1]]
        elif operation == "cancel":
            status, found = 200, document("transfer.cancel_task")
        elif operation in ("transfer", "delete", "submission_id"):
            status, found = getattr(self, f"_{operation}")(body)
        else:
            status, found = getattr(self, f"_{operation}")(names[2], {**query, **body})
        return status, found

    def _ls(self, collection: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = self.place(collection, asked["path"])
        if not place.is_dir():
            return 404, document("transfer.operation_stat", "not_found")
        names = sorted(os.listdir(place))[int(asked["offset"]) :][: int(asked["limit"])]
        return 200, {"DATA_TYPE": "file_list", "DATA": [described(place / name) for name in names]}

    def _stat(self, collection: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = self.place(collection, asked["path"])
        if not os.path.lexists(place):
            return 404, document("transfer.operation_stat", "not_found")
        return 200, {**document("transfer.operation_stat"), **described(place)}

    def _mkdir(self, collection: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = self.place(collection, asked["path"])
        if os.path.lexists(place):
            return 502, {"code": "ExternalError.MkdirFailed.Exists", "message": "Path already exists"}
        if not place.parent.is_dir():
            return 404, document("transfer.operation_stat", "not_found")
        place.mkdir()
        return 202, document("transfer.operation_mkdir")

    def _rename(self, collection: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        source, target = self.place(collection, asked["old_path"]), self.place(collection, asked["new_path"])
        if not source.exists():
            return 404, document("transfer.operation_stat", "not_found")
        if target.is_dir() or (target.exists() and not self.replaces):
            return 502, {"code": "ExternalError.RenameFailed.Exists", "message": "File already exists"}
        if not target.parent.is_dir():
            return 502, {"code": "ExternalError.RenameFailed", "message": "Not a directory"}
        os.replace(source, target)
        return 200, document("transfer.operation_rename")

    def _submission_id(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, document("transfer.get_submission_id")

    def _transfer(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for item in asked["DATA"]:
            source = self.place(asked["source_endpoint"], item["source_path"])
            target = self.place(asked["destination_endpoint"], item["destination_path"])
            if not source.is_file() or not target.parent.is_dir():
                return 200, self._begun("transfer.submit_transfer", "FAILED", "FILE_NOT_FOUND")
            shutil.copyfile(source, target)
        return 202, self._begun("transfer.submit_transfer", "SUCCEEDED")

    def _delete(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for item in asked["DATA"]:
            self.place(asked["endpoint"], item["path"]).unlink(missing_ok=True)
        return 202, self._begun("transfer.submit_delete", "SUCCEEDED")

    def _begun(self, name: str, status: str, code: str = "") -> dict[str, Any]:
        number = f"dddddddd-0000-4000-8000-{len(self.tasks):012}"
        listed = document("transfer.task_list")["DATA"][0]
        fatal = {"code": code, "description": "the file is not there"} if code else None
        self.tasks[number] = {**listed, "task_id": number, "status": status, "fatal_error": fatal}
        return {**document(name), "task_id": number}


def described(place: Path) -> dict[str, Any]:
    """A file's document, of the shape of the SDK's."""
    status = os.lstat(place)
    kind = "dir" if place.is_dir() else "file"
    when = datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, UTC)
    link = os.readlink(place) if place.is_symlink() else None
    name = {"name": place.name, "type": kind, "link_target": link}
    return {**name, "size": status.st_size, "last_modified": when.isoformat(" ")}


@pytest.fixture
def globus(tmp_path: Path) -> Iterator[Globus]:
    """The two collections, logged in to."""
    (tmp_path / "remote" / "share").mkdir(parents=True)
    served = Globus(tmp_path / "remote")
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mocked:
        load_response("auth.oauth2_client_credentials_tokens", requests_mock=mocked)
        for method in ("GET", "POST"):
            mocked.add_callback(method, url=re.compile(re.escape(API) + "/.*"), callback=served.answer)
        yield served


@pytest.fixture
def globus_stores(globus: Globus, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes stores on the directory `share` of their collection."""
    (tmp_path / "staging").mkdir()
    made: list[Store] = []

    def make(**options: object) -> Store:
        given = {"url": f"globus://{THEIRS}/share", "local_directory": str(tmp_path / "staging"), **OPTIONS}
        made.append(open_store({**given, **options}))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()
