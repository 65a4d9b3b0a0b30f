"""What opendal raises, as one of our errors with a sentence that says what to do.

Used by `remote.py`. Nothing here blocks. opendal's own text is never passed on whole: its context has request
URLs (signatures among them) and headers.
"""

import re
from collections.abc import Sequence

from opendal import exceptions

from vfs.errors import Conflict, Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.hiding import hide

_CODE = re.compile(r'code: "([^"]*)"')
_MESSAGE = re.compile(r'message: "([^"]*)"')
_STATUS = re.compile(r"status: (\d{3})|\b(401) Unauthorized")
_FULL = re.compile(
    r"InsufficientStorage|QuotaExceeded|No space left|EntityTooLarge|no writable volumes|no free volumes", re.I
)
_CONNECT = re.compile(
    r"tcp connect|\(Connect\)|dns error|connection (?:refused|reset|closed)|ConnectionReset|IncompleteMessage", re.I
)
_NO_CREDENTIALS = "failed to load signing credential"
_CREDENTIALS = {  # what to set, by opendal's name of the service
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    "gcs": "credential_path, or GOOGLE_APPLICATION_CREDENTIALS",
    "azblob": "account_name, account_key",
    "webdav": "username and password, or token",
}

# opendal's classes share no base, and its file objects raise OSError with the class's name as the first word.
OPENDAL_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    *(each for each in vars(exceptions).values() if isinstance(each, type) and issubclass(each, Exception)),
)


class ServerFailed(Unreachable):
    """The server answered that it failed itself (500). Some do so where a name is in the way of another."""


def kind(error: Exception) -> str:
    """The name of opendal's class: NotFound, ConditionNotMatch, Unexpected, ..."""
    found = re.match(r"([A-Z][A-Za-z]+) \((?:temporary|permanent|persistent)\)", str(error))
    return found[1] if found else type(error).__name__


def explain(
    error: Exception, store: str, place: str, operation: str, key: str, secrets: Sequence[str], scheme: str
) -> StoreError:
    """Our error for one of opendal's. `temporary` on it says whether trying again at once can help."""
    what = f"{store}: {operation} {key}" if key else f"{store}: {operation}"
    text = hide(str(error), secrets)  # before anything is cut: half a secret would be found no more
    made = _made(error, text, what, place, _CREDENTIALS.get(scheme, "its options in the configuration"))
    final = type(made)(hide(str(made), secrets))
    final.temporary = made.temporary
    return final


def timed_out(store: str, place: str, operation: str, key: str, why: str) -> StoreTimeout:
    """The error for a call that our own limits ended."""
    return StoreTimeout(
        f"{store}: {operation} {key}: {why}; {place} may be overloaded or cut off: runfs stores tries it"
    )


def _made(error: Exception, text: str, what: str, place: str, credentials: str) -> StoreError:
    code = _first(_CODE, text)
    name = kind(error)
    if name == "NotFound":
        return NotFound(f"{what}: there is no such object")
    if name in ("ConditionNotMatch", "AlreadyExists"):
        return Conflict(f"{what}: somebody else wrote it meanwhile")
    if name == "PermissionDenied" or _first(_STATUS, text) == "401":
        return Denied(f"{what}: refused ({code or 'permission denied'}); {_advice(code, credentials)}")
    if name == "ConfigInvalid":
        return _lasting(Unreachable(f"{what}: {place} says {_short(text)}; check the store's URL"))
    if _NO_CREDENTIALS in text:
        return Denied(f"{what}: no credentials; set {credentials}, or configure them")
    if _first(_STATUS, text) == "507" or _FULL.search(text):
        return StoreFull(
            f"{what}: {place} takes no more ({code or _short(text)}); make room there or use another store"
        )
    return _temporary_or_not(error, text, what, place)


def _temporary_or_not(error: Exception, text: str, what: str, place: str) -> StoreError:
    if _CONNECT.search(text):
        return Unreachable(f"{what}: no connection to {place} ({_cause(text)}); is it running, and the network up?")
    if "timeout reached" in text:
        return _temporary(
            StoreTimeout(f"{what}: no answer in time; {place} may be overloaded or cut off: runfs stores tries it")
        )
    temporary = "(temporary)" in text or "(persistent)" in text or kind(error) == "RateLimited"
    status = _first(_STATUS, text)
    if temporary or (status is not None and status.startswith("5")):
        made = ServerFailed if status == "500" else Unreachable
        return _temporary(made(f"{what}: {place} is not able to answer ({status or _cause(text)}); try again later"))
    if "too little data" in text:
        return _temporary(StoreError(f"{what}: {place} sent fewer bytes than it promised"))
    return StoreError(f"{what}: {place} says {_short(text)}")


def _advice(code: str | None, credentials: str) -> str:
    if code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken"):
        return f"check the credentials ({credentials})"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong: set it"
    if code is None:  # an answer without a body, as to HEAD, does not say why
        return f"check the credentials ({credentials}) and what they may do"
    return "these credentials may not do that: ask for the right, or use others"


def _short(text: str) -> str:
    """opendal's own words without their context."""
    message = _first(_MESSAGE, text)
    if message is not None:
        return message
    head = text.split("\n", 1)[0]
    return (head.split("=>", 1)[-1] if "=>" in head else head).strip()[:200]


def _cause(text: str) -> str:
    """The innermost reason of a failed request, without its URL."""
    source = re.search(r"Source:\n\s+(.*)", text)
    words = re.sub(r" ?\(os error \d+\)", "", source[1] if source else _short(text))
    return words.rsplit("error: ", 1)[-1].rsplit("): ", 1)[-1].split("http", 1)[0].strip(" ()")[:120] or "no answer"


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return next(filter(None, found.groups()), "") if found else None


def _temporary(error: StoreError) -> StoreError:
    error.temporary = True
    return error


def _lasting(error: StoreError) -> StoreError:
    error.temporary = False
    return error
