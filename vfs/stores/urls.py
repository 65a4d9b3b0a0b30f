"""Store URLs and option mappings, read the same way by every broker.

Used by the brokers. Nothing here blocks. A store's configuration is a flat mapping: `url`, optionally `name`,
`broker`, the limits (`limits.py`), `used`, and the broker's own options; options may also stand in the URL's
query, except secret ones: a URL ends up in process lists, histories and logs.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from vfs.errors import ConfigError, Denied
from vfs.hiding import has_password

COMMON = frozenset({"url", "name", "broker", "used", "deadline_s", "least_throughput", "window_s", "on_close"})
_SECRET = re.compile(
    r"secret|password|passwd|passphrase|token|credential$|access_?key|account_key|encryption_key|customer_key|^key$|sas"
    r"|private|signature|(^|_)(pass|auth)($|_)|(api|master|application|sse)_?key"
)
_TRUE = frozenset({"1", "true", "yes", "on"})
_WITH_USER = frozenset({"sftp"})  # a user may stand before the host there, never a password
_FALSE = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True, slots=True)
class Location:
    """A store URL taken apart. `url` as given; `host` with the port; `path` without slashes at its ends,
    percent-decoded."""

    url: str
    scheme: str
    host: str
    path: str
    query: dict[str, str]


def is_secret(option: str) -> bool:
    """Whether the value of an option with this name must never be shown."""
    return _SECRET.search(option.lower()) is not None


def split(config: Mapping[str, Any]) -> Location:
    """The configuration's `url`. Raises ConfigError when it is missing, malformed or has a secret in it (and
    does not repeat the secret)."""
    url = config.get("url")
    if not isinstance(url, str) or "://" not in url:
        raise ConfigError("a store needs a url such as s3://bucket/prefix or file:///directory")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        # Python's reason quotes the port, and that may be the end of a password.
        raise ConfigError("url of a store: its host or port is not one; write scheme://host:port/path") from None
    user_only = parts.scheme.lower() in _WITH_USER and bool(parts.username) and parts.password is None
    if has_password(url) or ("@" in parts.netloc and not user_only):
        raise ConfigError(f"url {parts.scheme}://...: no user or password in a URL; {_WHERE}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in query:
        if is_secret(option):
            raise ConfigError(f"url {parts.scheme}://...?{option}=...: no {option} in a URL; {_WHERE}")
    if parts.fragment:
        raise ConfigError(f"url {parts.scheme}://...: '#' is not allowed; write %23 for it in a path")
    return Location(
        url, parts.scheme.lower(), parts.netloc, unquote(parts.path, errors="surrogateescape").strip("/"), query
    )


_WHERE = "credentials come from the environment (AWS_ACCESS_KEY_ID, ...) or the configuration file"


def option(config: Mapping[str, Any], location: Location, key: str) -> Any:
    """An option's value: the mapping's, else the URL's, else None."""
    given = config.get(key)
    return location.query.get(key) if given is None else given


def truth(config: Mapping[str, Any], location: Location, key: str) -> bool:
    """A yes-or-no option; absent is no. Raises ConfigError."""
    given = option(config, location, key)
    if given is None or isinstance(given, bool):
        return bool(given)
    text = str(given).lower()
    if text not in _TRUE | _FALSE:
        raise ConfigError(f"{key} = {given!r}: give true or false")
    return text in _TRUE


def refuse_unknown(config: Mapping[str, Any], location: Location, known: Iterable[str]) -> None:
    """Raises ConfigError for an option nobody reads, with the nearest known one."""
    allowed = sorted(COMMON | set(known))
    for key in [*config, *location.query]:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(set(known)))}"
            raise ConfigError(f"{key}: no such option for a {location.scheme} store; {hint}")


def read_only_error(name: str, operation: str) -> Denied:
    """What a change to a store that was opened for reading only ends with."""
    return Denied(f"{name}: {operation}: the store is configured read-only")
