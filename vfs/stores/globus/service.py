"""The calls to Globus Transfer that the store needs: one collection's files, and tasks that are waited for.

Used by `store.py`. Each call blocks for at most the HTTP timeout, `wait` until its budget is over. globus-sdk is
imported here and nowhere else, when a store is first used.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from vfs.errors import ConfigError, Conflict, NotFound, StoreError, StoreTimeout
from vfs.stores.globus.errors import SCOPE, explain, of_task
from vfs.stores.limits import Budget

if TYPE_CHECKING:
    import globus_sdk

PAGE = 10_000  # entries of a directory asked for at once; Globus allows 100,000
_POLL_FIRST_S = 0.5
_POLL_MOST_S = 10.0  # Globus asks for no more than that
INSTALL = "pip install 'runfs[globus]'"


@dataclass(frozen=True, slots=True)
class Login:
    """Who asks: a client of its own (`client_id`, `client_secret`), or a person's refresh token made for `client_id`.
    `data_access`: ask for that consent to these mapped collections too (clients only)."""

    client_id: str
    client_secret: str | None = field(default=None, repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    data_access: tuple[str, ...] = ()


def require_sdk() -> None:
    """Raises ConfigError when globus-sdk is not installed."""
    try:
        import globus_sdk
    except ImportError:
        raise ConfigError(f"globus-sdk is not installed: {INSTALL}") from None
    del globus_sdk


class Service:
    """Globus Transfer for one store. `timeout_s`: for one HTTP request, which is tried again `retries` times."""

    def __init__(self, name: str, login: Login, *, timeout_s: float, retries: int = 2) -> None:
        self._name = name
        self._login = login
        self._timeout_s = timeout_s
        self._retries = retries
        self._lock = threading.Lock()
        self._client: globus_sdk.TransferClient | None = None

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def stat(self, collection: str, path: str) -> Mapping[str, Any]:
        """One file's or directory's document. Raises NotFound."""
        with self._explained("stat", path):
            found: Mapping[str, Any] = self._transfer().operation_stat(collection, path).data
            return found

    def entries(self, collection: str, path: str) -> Iterator[Mapping[str, Any]]:
        """The documents of what is in a directory, in pages. Raises NotFound."""
        offset = 0
        while True:
            with self._explained("list", path):
                page = list(self._transfer().operation_ls(collection, path, limit=PAGE, offset=offset))
            yield from page
            if len(page) < PAGE:
                return
            offset += len(page)

    def mkdir(self, collection: str, path: str) -> None:
        """Make a directory; one that is there already is fine. Raises Conflict when a file has its name."""
        try:
            with self._explained("make", path):
                self._transfer().operation_mkdir(collection, path)
        except Conflict:
            if self.stat(collection, path).get("type") != "dir":
                raise

    def rename(self, collection: str, path: str, target: str) -> None:
        """Raises NotFound, Conflict (where the collection does not replace)."""
        with self._explained("rename", path):
            self._transfer().operation_rename(collection, path, target)

    def transfer(self, source: tuple[str, str], target: tuple[str, str], budget: Budget) -> Mapping[str, Any]:
        """Bring one file from a collection to another, checksums compared by Globus, and wait; the task's document."""
        import globus_sdk

        task = globus_sdk.TransferData(
            source[0],
            target[0],
            label="runfs",
            verify_checksum=True,
            fail_on_quota_errors=True,
            skip_source_errors=False,
            deadline=_until(budget),
            notify_on_succeeded=False,
            notify_on_failed=False,
            notify_on_inactive=False,
        )
        task.add_item(source[1], target[1])
        return self._run("transfer", source[1], lambda client: client.submit_transfer(task), budget)

    def remove(self, collection: str, path: str, budget: Budget) -> None:
        """Remove one file, and wait; one that is gone already is fine."""
        import globus_sdk

        task = globus_sdk.DeleteData(
            collection,
            label="runfs",
            recursive=False,
            ignore_missing=True,
            deadline=_until(budget),
            notify_on_succeeded=False,
            notify_on_failed=False,
            notify_on_inactive=False,
        )
        task.add_item(path)
        self._run("delete", path, lambda client: client.submit_delete(task), budget)

    # --- tasks ---------------------------------------------------------------------------------------------------

    def _run(
        self,
        operation: str,
        path: str,
        submit: "Callable[[globus_sdk.TransferClient], Any]",
        budget: Budget,
    ) -> Mapping[str, Any]:
        with self._explained(operation, path):
            number = str(submit(self._transfer())["task_id"])
        try:
            return self._wait(operation, path, number, budget)
        except StoreError:
            self._cancel(number)
            raise

    def _wait(self, operation: str, path: str, number: str, budget: Budget) -> Mapping[str, Any]:
        pause = _POLL_FIRST_S
        while True:
            task = self._task(operation, path, number, budget)
            problem = of_task(task, f"{self._name}: {operation} {path}")
            if problem is not None:
                raise problem
            if task.get("status") == "SUCCEEDED":
                return task
            if not budget.left():
                raise StoreTimeout(
                    f"{self._name}: {operation} {path}: task {number} did not end within {budget.total_s:g} s and was "
                    "cancelled; Globus queues tasks, so give this store a longer deadline_s"
                )
            time.sleep(min(pause, max(budget.left(), 0.01)))
            pause = min(pause * 1.5, _POLL_MOST_S)

    def _task(self, operation: str, path: str, number: str, budget: Budget) -> Mapping[str, Any]:
        """A task's document; nothing while it cannot be asked for: the task goes on without us."""
        try:
            with self._explained(operation, path):
                task: Mapping[str, Any] = self._transfer().get_task(number).data
                return task
        except StoreError as error:
            if not error.temporary or not budget.left():
                raise
            return {}

    def _cancel(self, number: str) -> None:
        """Nobody waits for it any more. That it ended meanwhile, or cannot be told, changes nothing."""
        import globus_sdk

        try:
            self._transfer().cancel_task(number)
        except globus_sdk.GlobusError:
            return

    # --- the client ----------------------------------------------------------------------------------------------

    def _transfer(self) -> "globus_sdk.TransferClient":
        with self._lock:
            if self._client is None:
                self._client = self._connected()
            return self._client

    def _connected(self) -> "globus_sdk.TransferClient":
        """A logged-in client: this asks Globus Auth for a token. Raises globus-sdk's errors, ConfigError."""
        require_sdk()
        import globus_sdk
        from globus_sdk.transport import RequestsTransport, RetryConfig

        def transport() -> RequestsTransport:
            return RequestsTransport(http_timeout=self._timeout_s)

        def retry() -> RetryConfig:  # one each: a client adds its own rules to it
            return RetryConfig(max_retries=self._retries, max_sleep=1)

        login = self._login
        authorizer: globus_sdk.authorizers.GlobusAuthorizer
        if login.client_secret is not None:
            auth = globus_sdk.ConfidentialAppAuthClient(
                login.client_id, login.client_secret, transport=transport(), retry_config=retry()
            )
            authorizer = globus_sdk.ClientCredentialsAuthorizer(auth, self._scope())
        else:
            native = globus_sdk.NativeAppAuthClient(login.client_id, transport=transport(), retry_config=retry())
            authorizer = globus_sdk.RefreshTokenAuthorizer(login.refresh_token or "", native)
        return globus_sdk.TransferClient(authorizer=authorizer, transport=transport(), retry_config=retry())

    def _scope(self) -> str:
        wanted = " ".join(f"*https://auth.globus.org/scopes/{each}/data_access" for each in self._login.data_access)
        return f"{SCOPE}[{wanted}]" if wanted else SCOPE

    @contextmanager
    def _explained(self, operation: str, what: str) -> Iterator[None]:
        require_sdk()
        import globus_sdk

        try:
            yield
        except (globus_sdk.GlobusError, NotFound) as error:
            if isinstance(error, NotFound):
                raise
            raise explain(error, self._name, operation, what) from error


def _until(budget: Budget) -> str:
    """When Globus itself is to give a task up, so that none outlives us for long."""
    return (datetime.now(UTC) + timedelta(seconds=budget.left() + 60)).isoformat(timespec="seconds")
