"""What Globus says went wrong, as our errors: each with the command or the scope that helps.

Used by `service.py`. Nothing here blocks. The fields are those of globus-sdk's GlobusAPIError and of a task's
document (docs.globus.org/api/transfer).
"""

import shlex
from collections.abc import Mapping
from typing import Any

from vfs.errors import Conflict, Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable

SCOPE = "urn:globus:auth:scope:transfer.api.globus.org:all"
_EXPIRED = (
    "the login is missing or has expired: set refresh_token (or GLOBUS_REFRESH_TOKEN) to a new token for the scope"
)
_TRANSIENT = frozenset({429, 500, 502, 503, 504})

# Words in an error's code or a task's status, and what they mean; the first that fits counts.
_MEANINGS: tuple[tuple[tuple[str, ...], type[StoreError], str], ...] = (
    (("EndpointNotFound",), StoreError, "there is no such collection; check its UUID in the URL and local_endpoint"),
    (("GCDisconnected", "GCNotConnected", "NotConnected"), Unreachable, "Globus Connect Personal is not running there"),
    (("GCPaused",), Unreachable, "Globus Connect Personal is paused there; unpause it"),
    (("Timeout", "TIMEOUT"), StoreTimeout, "the collection did not answer in time"),
    (("QUOTA", "NO_SPACE", "Quota"), StoreFull, "the collection's disk or quota is full"),
    (("PERMISSION_DENIED", "PermissionDenied", "Forbidden"), Denied, "the collection lets this login not do that"),
    (("FILE_NOT_FOUND", "PATH_NOT_FOUND", "NotFound"), NotFound, "there is no such file"),
    (("Exists",), Conflict, "there is something with that name already"),
)


def explain(error: Exception, store: str, operation: str, what: str) -> StoreError:
    """Our error for one of globus-sdk's."""
    import globus_sdk

    doing = f"{store}: {operation} {what}".rstrip()
    if isinstance(error, globus_sdk.GlobusAPIError):
        return _explain_answer(error, doing)
    if isinstance(error, globus_sdk.GlobusTimeoutError):
        return StoreTimeout(f"{doing}: Globus did not answer in time")
    if isinstance(error, globus_sdk.NetworkError):
        return Unreachable(f"{doing}: Globus cannot be reached: {error}")
    return StoreError(f"{doing}: {error}")


def _explain_answer(error: Any, doing: str) -> StoreError:
    if (helpful := _what_login_lacks(error)) is not None:
        return Denied(f"{doing}: {helpful}")
    code = str(error.code or "")
    if error.http_status == 401 or "invalid_grant" in f"{code} {error.text}":
        return Denied(f"{doing}: {_EXPIRED} {SCOPE}")
    if "invalid_client" in f"{code} {error.text}":
        return Denied(f"{doing}: Globus does not know this client: check client_id and client_secret")
    said = " ".join(str(error.message or "").split())[:300]
    if (found := _meant(code)) is not None:
        return found[0](f"{doing}: {found[1]} ({code}: {said})")
    if error.http_status == 403:
        return Denied(f"{doing}: {said}")
    kind = Unreachable if error.http_status in _TRANSIENT else StoreError
    return kind(f"{doing}: Globus answered {error.http_status} {code}: {said}")


def _what_login_lacks(error: Any) -> str | None:
    """The command that gives a login what is asked for here: a consent, or a session with certain identities."""
    if error.code == "ConsentRequired":
        scopes = error.info.consent_required.required_scopes or [SCOPE]
        consent = f"globus session consent {' '.join(map(shlex.quote, scopes))}"
        return (
            f"this login has not consented to the use of the collection: run `{consent}`; a client of its own needs "
            f"data_access = true, a refresh token must be one for {' '.join(scopes)}"
        )
    asked = error.info.authorization_parameters
    if not asked:
        return None
    if asked.session_required_identities:
        return f"it needs a fresh login: run `globus session update {' '.join(asked.session_required_identities)}`"
    if asked.session_required_single_domain:
        return f"it needs a login of {asked.session_required_single_domain[0]}: run `globus session update " + (
            f"{asked.session_required_single_domain[0]}`"
        )
    if asked.session_required_policies:
        return f"it needs a login by policy: run `globus session update --policy {asked.session_required_policies[0]}`"
    if asked.session_required_mfa:
        return "it needs a login with a second factor: run `globus login --force` with one"
    return f"it needs a fresh login ({asked.session_message}): run `globus login --force`"


def of_task(task: Mapping[str, Any], doing: str) -> StoreError | None:
    """What ended a task, or will keep it from ending; None while it goes on or when it succeeded."""
    number = task.get("task_id")
    status = task.get("status")
    if status in ("FAILED", "INACTIVE"):
        fatal = task.get("fatal_error") or {}
        code = str(fatal.get("code") or task.get("nice_status") or status)
        said = f"{doing}: {fatal.get('description') or task.get('nice_status_short_description') or code}"
        if status == "INACTIVE":
            return Denied(f"{said}: {_EXPIRED} {SCOPE} (task {number})")
        found = _meant(code) or (StoreError, "it failed")
        return found[0](f"{said}: {found[1]}; `globus task show {number}` tells more")
    nice = str(task.get("nice_status") or "")
    if (
        status == "ACTIVE"
        and (meant := _meant(nice)) is not None
        and not issubclass(meant[0], Unreachable | StoreTimeout)
    ):
        return meant[0](f"{doing}: {meant[1]} ({nice}); `globus task show {number}` tells more")
    return None


def _meant(code: str) -> tuple[type[StoreError], str] | None:
    return next(((kind, text) for words, kind, text in _MEANINGS if any(word in code for word in words)), None)
