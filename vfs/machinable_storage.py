"""A machinable Storage whose records are also in runfs's stores: S3, WebDAV, another disk, ... No mount is needed.

This file is for your project (write it there with: runfs config storage-module runfs_storage.py). It needs machinable
and the program `runfs`, which lives in an environment of its own; nothing else of runfs is imported.

    from machinable import get
    with get("runfs_storage", {"store": "s3://lab/study?endpoint=https://s3.lab.example"}):
        get("mymodel", {"lr": 0.1}).launch()      # runs here as always, and is committed to the store

Records live in the local directory, as with machinable's own storage; each is committed to the stores when it is made
and when a run in it ends. Which stores: the configuration's, or those named in `store` (URLs, or names of configured
ones). Credentials come from the environment's usual variables or runfs's configuration: never put them here, machinable
keeps what is here in its index. Every call blocks until the stores have answered, each request within its deadline.
"""

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from machinable import Index, Project, Storage
from machinable.errors import StorageError
from machinable.format import read_id
from machinable.utils import object_hash, path_to_uri, sanitize_filename, uri_to_path, walk_markers
from pydantic import BaseModel

_FAR = ("Project", "Storage")  # kinds that hold records beside each other: a record in one is a root record


class RunfsStorage(Storage):
    """Records in a local directory and in runfs's stores."""

    class Config(BaseModel):
        """`directory`: where records live on this machine (relative to the project, or absolute). `store`: URLs or
        names, separated by spaces; empty: the configured ones. `command`: the runfs program; empty: RUNFS_COMMAND, or
        the one on the PATH. `on_error`: what a run does when its record cannot be committed: "raise", or "warn" and go
        on; the record is in the local directory either way."""

        directory: str = "./storage"
        store: str = ""
        command: str = ""
        on_error: Literal["raise", "warn"] = "raise"

    # --- the program -------------------------------------------------------------------------------------------

    def _program(self) -> list[str]:
        named = self.config.command or os.environ.get("RUNFS_COMMAND", "")
        found = shutil.which(os.path.expanduser(named or "runfs"))
        if found is None:
            raise StorageError(
                f"the program {named or 'runfs'!r} is not there: install runfs (pipx install runfs), or name it in "
                "RUNFS_COMMAND or in this storage's `command`"
            )
        return [found]

    def _ask(self, verb: str, *arguments: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
        """The answer of `runfs records VERB`. Raises StorageError with what runfs said."""
        stores = [part for each in self.config.store.split() for part in ("--store", each)]
        command = [*self._program(), "records", verb, *stores, *options, "--json", "--", *arguments]
        place = os.path.expanduser(Project.get().config.directory) if Project.is_connected() else None
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=place, check=False)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            said = done.stderr.strip().removeprefix("runfs: ")
            raise StorageError(f"runfs records {verb} failed: {said or f'exit code {done.returncode}'}") from None
        if not isinstance(answer, dict) or "error" in answer:
            raise StorageError(f"runfs: {answer['error']['message'] if isinstance(answer, dict) else answer}")
        return answer

    @staticmethod
    def _refuse_failed(answer: dict[str, Any]) -> None:
        failed = [f"{each['source']}: {each['reason']}" for each in answer.get("failed", [])]
        if failed:
            raise StorageError("runfs: " + "; ".join(failed))

    @staticmethod
    def _root_of(uuid: str) -> tuple[str, ...]:
        """The option that names the root record that this one lies in, or is, where the index knows it: else every
        manifest in the stores has to be looked into for a nested one."""
        entry = Index.get().get_by_id(uuid)
        root = None
        while entry is not None and entry.kind not in _FAR:
            root = entry.record_id
            entry = Index.get().get_by_id(entry.parent_id) if entry.parent_id else None
        return ("--root", root) if root is not None else ()

    # --- who and where -----------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The names of the stores."""
        return str(self._ask("where")["id"])

    def home_uri(self, uuid: str) -> str:
        """Where a record belongs: its place in the first store, as a URL."""
        return str(self._ask("where", uuid)["uri"])

    # --- in ----------------------------------------------------------------------------------------------------

    def commit(self, interface: Any) -> None:
        """Bring a record's directory to the stores. Raises StorageError, or warns (`on_error`)."""
        super().commit(interface)
        try:
            self._commit([interface])
        except StorageError as error:
            if self.config.on_error == "raise":
                raise
            warnings.warn(f"{interface!r} is on this machine only: {error}", stacklevel=2)

    def _commit(self, interfaces: list[Any]) -> None:
        places = [each.local_directory(create=False) for each in interfaces]
        records = [place for place in places if place and os.path.isfile(os.path.join(place, ".machinable"))]
        if records:
            self._refuse_failed(self._ask("commit", *dict.fromkeys(map(os.path.abspath, records))))

    def upload(self, interface: Any, related: bool | int = True) -> None:
        """Commit a record, and those related to it: 0 none, 1 (True) the direct ones, 2 theirs too."""
        others = interface.related(deep=int(related) == 2).all() if related else []
        self._commit([interface, *others])

    def push(self, local: str, uuid: str) -> str:
        """Bring a working copy to the stores; the place of its record there."""
        self._refuse_failed(self._ask("commit", os.path.abspath(uri_to_path(str(local)))))
        return self.home_uri(uuid)

    # --- out ---------------------------------------------------------------------------------------------------

    def contains(self, uuid: str) -> bool:
        """Whether a store has the record."""
        return bool(self._ask("contains", uuid, options=self._root_of(uuid))["contains"])

    def retrieve(self, uuid: str, local_directory: str) -> bool:
        """Make a directory hold a record, whole and checked; False when no store has it. Nothing that is there is
        overwritten: StorageError names what differs."""
        target = os.path.abspath(local_directory)
        return bool(self._ask("retrieve", uuid, target, options=self._root_of(uuid))["found"])

    def pull(self, uuid: str, into: str | None = None) -> str | None:
        """A working copy of a record: where it is, or brought from a store; None when it is nowhere."""
        entry = Index.get().get_by_id(uuid)
        here = self._here(entry.local_uri or entry.storage_uri) if entry is not None else None
        if here is not None and (into is None or os.path.abspath(into) == here):
            return path_to_uri(here)
        target = into or os.path.join(self.root(), uuid)
        if not self.retrieve(uuid, target):
            return None
        if into is None and entry is not None:
            Index.get().register_location(uuid, path_to_uri(target))
        return path_to_uri(target)

    @staticmethod
    def _here(uri: str) -> str | None:
        try:
            path = uri_to_path(uri)
        except ValueError:
            return None
        return path if os.path.isfile(os.path.join(path, ".machinable")) else None

    def download(self, uuid: str, destination: str | None = None, related: bool | int = True) -> list[str]:
        """Bring a record, and those related to it, into directories named after them; indexed when no destination is
        named. One that no store has is left out."""
        if not self.contains(uuid):
            return []
        place = destination or self.root()
        answer = self._ask("download", uuid, os.path.abspath(place), options=("--related", str(int(related))))
        retrieved = [str(each["directory"]) for each in answer["retrieved"]]
        if destination is None:
            for directory in retrieved:
                for record in walk_markers(directory):
                    Index.get().ingest_directory(record, relations=bool(related))
        return retrieved

    def walk(self) -> Iterator[str]:  # type: ignore[override]
        """Every record directory, for `Index.reindex`: those that are here, and those that only a store has, which are
        brought. (`runfs reindex` brings none: it makes them readable through a mount.)"""
        here = set()
        for directory in walk_markers(self.root()):
            here.add((read_id(directory) or {}).get("uuid"))
            yield directory
        for each in self._ask("walk")["records"]:
            target = os.path.join(self.root(), each["uuid"])
            if each["uuid"] not in here and self.retrieve(each["uuid"], target):
                yield from walk_markers(target)

    def search_for(self, interface: Any) -> list[str]:
        """The uuids of records in the stores with the identity and predicate of an interface, the newest first."""
        identity = sanitize_filename(interface.catalog_identity_key(), max_len=128)  # as the index keeps it
        predicate = interface.predicate_key or object_hash(interface.predicate)[:32]
        answer = self._ask("search", options=("--identity-key", identity, "--predicate-key", predicate))
        return [str(uuid) for uuid in answer["uuids"]]

    # --- away --------------------------------------------------------------------------------------------------

    def delete(self, uuid: str) -> bool:
        """Remove a record from the stores; the local directory stays. StorageError for one nested in another."""
        return bool(self._ask("delete", uuid)["deleted"])
