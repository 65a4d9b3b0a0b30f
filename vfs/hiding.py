"""Secrets in other people's words: servers repeat what they were sent, libraries log it.

Used by stores for their messages and by the daemon for its log. Pure functions.
"""

import base64
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

LEAST = 6  # characters; replacing anything shorter would garble the messages
HIDDEN = "***"
_ACCOUNTS = ("user", "username", "account_name", "client_id")


def dresses(secrets: Iterable[str], options: Mapping[str, object] | None = None) -> list[str]:
    """How secrets look where they are sent: plain, percent-encoded, in base64, and with the user name of `options` as
    HTTP's Basic credentials. Longest first, so that none is hidden in part only."""
    users = [str(value) for key, value in (options or {}).items() if key in _ACCOUNTS and value]
    found = set()
    for secret in {secret for secret in secrets if len(secret) >= LEAST}:
        found |= {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), _base64(secret)}
        found |= {_base64(f"{user}:{secret}") for user in users} | {_base64(f":{secret}")}
    return sorted(found, key=len, reverse=True)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode("ascii").rstrip("=")


def hide(text: str, dressed: Iterable[str]) -> str:
    """The text without what `dresses` gave."""
    for each in dressed:
        text = text.replace(each, HIDDEN)
    return text


def has_password(url: str) -> bool:
    """Whether a URL holds, or seems to hold, a user with a password. A password with a slash in it ends the host for
    who reads URLs by the rules, and the rest looks like a path."""
    rest = url.partition("://")[2].partition("?")[0]
    before, at, _after = rest.rpartition("@")
    if not at or ":" not in before or rest.startswith("/"):
        return False
    return re.match(r"[^:@]*:[0-9]+(/|$)", before) is None  # that is a port, and the @ one of a path
