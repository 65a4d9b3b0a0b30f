"""A remote store's configuration: from a URL and options to what opendal wants.

Used by `remote.py`. Nothing here blocks; the environment is read (AWS_*), never printed.
"""

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import opendal
import opendal.config

from vfs.errors import ConfigError
from vfs.hiding import dresses
from vfs.stores import keys, urls

LEAST_SECRET = 6  # characters; replacing anything shorter would garble the messages
OURS = frozenset({"read_only", "conditional_writes"})

# The option of the service that a URL's host stands for.
_HOST_OPTION = {
    "s3": "bucket",
    "gcs": "bucket",
    "oss": "bucket",
    "obs": "bucket",
    "cos": "bucket",
    "tos": "bucket",
    "b2": "bucket",
    "azblob": "container",
    "azdls": "filesystem",
    "swift": "container",
}
BUCKET_ENGINES = frozenset(_HOST_OPTION)  # these list by prefix, not by directory
_ALIASES = {"gs": "gcs", "az": "azblob", "azure": "azblob", "https": "http", "ftps": "ftp"}
_ELSEWHERE = frozenset({"ftp", "http"})
_LOCAL = frozenset({"fs", "memory", "moka", "mini-moka", "dashmap", "cacache", "sled", "redb", "persy", "sqlite"})
_ACCOUNTS = frozenset({"user", "username", "access_key_id", "account_name", "session_token"})  # go with the secrets
_LITERAL = re.compile(r"Literal\[['\"]([a-z0-9-]+)['\"]\]")
_PUBLIC_AWS = "amazonaws.com"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a remote store is. `options` are opendal's, secrets among them: never printed. `place` is for
    messages."""

    scheme: str
    options: dict[str, str]
    name: str
    url: str
    place: str
    read_only: bool
    prefix: str
    conditions: bool = True  # False: the server ignores conditions on writes, says the configuration

    def secrets(self) -> list[str]:
        """What must not appear in any message, in every form in which it is sent."""
        given = [value for key, value in self.options.items() if urls.is_secret(key)]
        environment = [value for key, value in os.environ.items() if key.startswith("AWS_") and urls.is_secret(key)]
        return dresses([*given, *environment], self.options)

    def __repr__(self) -> str:
        return f"Target({self.url})"


def target(config: Mapping[str, Any]) -> Target:
    """The target of a configuration. Raises ConfigError naming the key."""
    location = urls.split(config)
    scheme, endpoint = _scheme(location)
    known = service_options(scheme)
    urls.refuse_unknown(config, location, known | OURS)
    options = _given_options(config, location, known)
    _add_host(scheme, endpoint, location, options, known)
    prefix = _prefix(location, options)
    if prefix:
        options["root"] = "/" + prefix
    _add_defaults(scheme, options)
    name = str(config.get("name") or _short_name(scheme, location, prefix))
    read_only = urls.truth(config, location, "read_only")
    place = options.get("endpoint") or location.host
    given = urls.option(config, location, "conditional_writes")
    conditions = given is None or urls.truth(config, location, "conditional_writes")
    return Target(scheme, options, name, location.url, place, read_only, prefix, conditions)


def with_credentials(target: Target, credentials: Mapping[str, str]) -> Target:
    """The target with other secrets. Raises ConfigError for what is no secret option of this type of store."""
    known = service_options(target.scheme)
    for key in credentials:
        if key not in known or not (urls.is_secret(key) or key in _ACCOUNTS):
            raise ConfigError(f"{target.name}: {key}: not a credential of a {target.scheme} store")
    return replace(target, options={**target.options, **credentials})


def warnings(target: Target) -> list[str]:
    """What is allowed, and worth a sentence."""
    found = []
    endpoint = target.options.get("endpoint", "")
    if endpoint.startswith("http://") and not _loopback(endpoint):
        found.append(f"{target.url}: plain http: others on the network can read and change what is sent; use https")
    if target.scheme == "webdav":
        found.append(f"{target.url}: WebDAV has no conditional writes: push to it from one machine only")
    if target.scheme == "s3" and not target.conditions:
        found.append(f"{target.url}: conditional_writes is off: push to it from one machine only")
    if target.scheme == "s3" and not _has_credentials(target):
        found.append(
            f"{target.url}: no AWS_ACCESS_KEY_ID in the environment or the configuration: other sources are tried"
        )
    return found


def service_options(scheme: str) -> frozenset[str]:
    """The options opendal's service of that name has. Raises ConfigError when there is no such service."""
    for each in vars(opendal.config).values():
        if typing.is_typeddict(each) and scheme in _LITERAL.findall(str(each.__annotations__.get("scheme"))):
            return frozenset(each.__annotations__) - {"scheme"}
    raise ConfigError(f"url {scheme}://...: no such type of store; use s3, gcs, azblob, webdav+https, file, ...")


def _scheme(location: urls.Location) -> tuple[str, str | None]:
    """opendal's service, and the endpoint when the URL is one (`webdav+https://host`)."""
    service, plus, transport = location.scheme.partition("+")
    scheme = _ALIASES.get(service, service)
    if scheme in _LOCAL:
        raise ConfigError(f"url {location.url}: use file:///directory for a store on this machine")
    if scheme in _ELSEWHERE:  # opendal's ftp gives wrong ranges, its http cannot compare answers
        raise ConfigError(f"url {location.url}: there is a store of its own for {scheme}: leave the broker out")
    return scheme, f"{transport}://{location.host}" if plus else None


def _given_options(config: Mapping[str, Any], location: urls.Location, known: frozenset[str]) -> dict[str, str]:
    merged = {**location.query, **{key: value for key, value in config.items() if value is not None}}
    return {key: _text(value) for key, value in merged.items() if key in known}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _add_host(
    scheme: str, endpoint: str | None, location: urls.Location, options: dict[str, str], known: frozenset[str]
) -> None:
    if endpoint is not None:
        options.setdefault("endpoint", endpoint)
    elif scheme in _HOST_OPTION:
        options.setdefault(_HOST_OPTION[scheme], location.host)
        if not options[_HOST_OPTION[scheme]]:
            raise ConfigError(f"url {location.url}: name the {_HOST_OPTION[scheme]}: {location.scheme}://NAME/prefix")
    elif location.host and "endpoint" in known:
        options.setdefault("endpoint", f"https://{location.host}")


def _prefix(location: urls.Location, options: dict[str, str]) -> str:
    prefix = options.pop("root", "").strip("/") or location.path
    reason = keys.why_not_readable(prefix) if prefix else None
    if reason is not None:
        raise ConfigError(f"url {location.url}: the prefix {prefix!r} {reason}")
    return prefix


def _add_defaults(scheme: str, options: dict[str, str]) -> None:
    if scheme != "s3":
        return
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options.setdefault("region", region or "us-east-1")
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    if endpoint and _PUBLIC_AWS not in endpoint:
        # Off Amazon nobody answers at the address of the instance metadata: asking there would only wait.
        options.setdefault("disable_ec2_metadata", "true")


def _short_name(scheme: str, location: urls.Location, prefix: str) -> str:
    return location.host or prefix.rsplit("/", 1)[-1] or scheme


def _loopback(endpoint: str) -> bool:
    host = endpoint.split("://", 1)[-1].split("/", 1)[0]
    return host.startswith(("127.", "localhost", "[::1]"))


def _has_credentials(target: Target) -> bool:
    given = target.options.keys() & {"access_key_id", "profile", "role_arn", "skip_signature"}
    return bool(given) or bool(os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE"))
