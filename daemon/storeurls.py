"""Store URLs as given to --store and RUNFS_STORE, and the short names stores are shown by. No network, no disk.

Used by `daemon.config`. A value is `URL`, `NAME=URL`, or the name of a store in the configuration file.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

from vfs.errors import ConfigError
from vfs.hiding import has_password

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=([A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def named_stores(given: Sequence[str], configured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Store tables for what was given, in its order; names made from URLs never clash. Raises ConfigError."""
    by_name = {store["name"]: store for store in configured}
    stores: list[dict[str, Any]] = []
    for text in given:
        named = _NAMED.fullmatch(text)
        if named is not None:
            stores.append({"name": named[1], "url": named[2]})
        elif _URL.match(text):
            stores.append({"name": _free(name_of(text), [store["name"] for store in stores]), "url": text})
        elif text in by_name:
            stores.append(by_name[text])
        else:
            raise ConfigError(_unknown(text, list(by_name)))
    return stores


def name_of(url: str) -> str:
    """A short name for people: the bucket, the host, or the last part of a local directory."""
    if has_password(url):
        return "store"  # it is refused in a moment, in words that must not have a part of it
    try:
        parts = urlsplit(url)
    except ValueError:
        return "store"  # it is refused in a moment, too
    path = [part for part in parts.path.split("/") if part]
    name = (path[-1:] or ["store"])[0] if parts.scheme in ("file", "fs") else (parts.hostname or parts.scheme)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64] or "store"


def _free(name: str, taken: Sequence[str]) -> str:
    if name not in taken:
        return name
    number = next(n for n in range(2, len(taken) + 3) if f"{name}-{n}" not in taken)
    return f"{name}-{number}"


def _unknown(text: str, names: list[str]) -> str:
    near = get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "write a URL such as s3://bucket/prefix or file:///dir"
    return f"{text!r} is neither a URL nor a store in the configuration; {hint}"
