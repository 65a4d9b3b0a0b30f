"""An SFTP store's configuration: from a URL, options and the environment to how the server is reached.

Used by `store.py`, `session.py` and `errors.py`. Nothing here blocks, but for reading small files;
passwords are read, never printed.

    sftp://[user@]host[:port]/directory        an absolute directory of the server
    sftp://[user@]host[:port]/~/directory      below the directory where the user lands

What neither URL nor options say comes from the user's `~/.ssh/config`, which may also name the host (`Host` with
`HostName`, `IdentityFile`, `ProxyJump`, ...). Secrets come from options or from the environment, never from the URL.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncssh

from vfs.errors import ConfigError
from vfs.stores import urls

OPTIONS = frozenset({"read_only", "port", "user", "key_file", "passphrase", "password", "known_hosts", "ssh_config"})
PASSWORD_ENV = "RUNFS_SFTP_PASSWORD"
PASSPHRASE_ENV = "RUNFS_SFTP_PASSPHRASE"
NO_CONFIG = "none"
KEEPALIVE_S = 15.0  # finds connections that died while nobody used them
FASTEST = "aes128-gcm@openssh.com"  # twice as fast here as asyncssh's own first choice
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
_CREDENTIALS = frozenset({"user", "password", "passphrase"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where an SFTP store is, and how it is reached. `root`: its directory, absolute or relative to where the user
    lands. `port`, `user`: None where the user's SSH configuration decides. `ssh_config`: a file, None for the
    user's own, `none` for no file at all. `place` is for messages."""

    host: str
    port: int | None
    user: str | None
    root: str
    name: str
    url: str
    read_only: bool = False
    used: bool = False
    key_file: str | None = None
    known_hosts: str | None = None
    ssh_config: str | None = None
    password: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """The server, as people know it."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


def target(config: Mapping[str, Any]) -> Target:
    """The target of a configuration. Raises ConfigError naming the key."""
    location = urls.split(config)
    urls.refuse_unknown(config, location, OPTIONS)
    parts = urlsplit(location.url)
    if not parts.hostname:
        raise ConfigError(f"url = {location.url!r}: name the server: sftp://host/directory")
    given = {key: _text(config, location, key) for key in OPTIONS - {"read_only", "port"}}
    if given["user"] and parts.username:
        raise ConfigError("user: given in the URL and as an option; leave one of them out")
    root = _root(location)
    return Target(
        host=parts.hostname,
        port=_port(config, location, parts.port),
        user=given["user"] or (unquote(parts.username) if parts.username else None),
        root=root,
        name=str(config.get("name") or parts.hostname),
        url=location.url,
        read_only=urls.truth(config, location, "read_only"),
        used=bool(config.get("used")),
        key_file=_file(given, "key_file"),
        known_hosts=_file(given, "known_hosts"),
        ssh_config=None if given["ssh_config"] is None else _config_file(given),
        password=given["password"] or os.environ.get(PASSWORD_ENV),
        passphrase=given["passphrase"] or os.environ.get(PASSPHRASE_ENV),
    )


def with_credentials(target: Target, credentials: Mapping[str, str]) -> Target:
    """The target with another user, password or passphrase. Raises ConfigError for anything else."""
    for key in credentials:
        if key not in _CREDENTIALS:
            raise ConfigError(
                f"{target.name}: {key}: not a credential of an sftp store; give user, password, passphrase"
            )
    return replace(target, **credentials)  # type: ignore[arg-type]


def warnings(target: Target) -> list[str]:
    """What is allowed, and worth a sentence."""
    if target.password is None or target.key_file is not None:
        return []
    return [f"{target.url}: a password lets everyone in who has it; ssh-copy-id and a key file are safer"]


def connect_options(target: Target) -> dict[str, Any]:
    """asyncssh's arguments for a target. Reads the user's SSH configuration. Raises ConfigError."""
    files = () if target.ssh_config is None else [] if target.ssh_config == NO_CONFIG else [target.ssh_config]
    try:
        found = asyncssh.SSHClientConnectionOptions(
            config=files or None if target.ssh_config else (), host=target.host, client_keys=None, agent_path=None
        )
    except ValueError as error:
        raise ConfigError(f"{target.name}: ssh_config: {error}") from error
    options: dict[str, Any] = {
        "config": files or None if target.ssh_config else (),
        "known_hosts": _known_hosts(target, found.known_hosts),
        "keepalive_interval": KEEPALIVE_S,
        "x509_trusted_certs": None,
    }
    if found.config.get("Ciphers") is None:
        options["encryption_algs"] = "^" + FASTEST
    given = {
        "port": target.port,
        "username": target.user,
        "client_keys": [target.key_file] if target.key_file else None,
        "password": target.password,
        "passphrase": target.passphrase,
    }
    return {**options, **{key: value for key, value in given.items() if value is not None}}


def _known_hosts(target: Target, configured: object) -> list[str]:
    """The files with the host keys. Raises ConfigError where the SSH configuration turns the check off."""
    if target.known_hosts is not None:
        return [target.known_hosts]
    if configured is None:
        raise ConfigError(
            f"{target.name}: UserKnownHostsFile none in the SSH configuration turns the check of the host key off; "
            f"give the store known_hosts = PATH"
        )
    named = [str(each) for each in configured] if isinstance(configured, list) else []
    files = [Path(each).expanduser() for each in named or ["~/.ssh/known_hosts"]] + [Path(SYSTEM_KNOWN_HOSTS)]
    return [str(each) for each in files if os.access(each, os.R_OK)] or [os.devnull]


def _root(location: urls.Location) -> str:
    path = location.path
    relative = path == "~" or path.startswith("~/")
    root = path[2:] if relative else "/" + path
    if any(part in (".", "..", "") for part in root.strip("/").split("/")) and root not in ("", "/"):
        raise ConfigError(f"url = {location.url!r}: the directory has an empty, '.' or '..' part")
    if root in ("", "/"):
        raise ConfigError(f"url = {location.url!r}: name a directory: sftp://host/directory or sftp://host/~/directory")
    return root


def _port(config: Mapping[str, Any], location: urls.Location, in_url: int | None) -> int | None:
    given = urls.option(config, location, "port")
    if given is None:
        return in_url
    if in_url is not None:
        raise ConfigError("port: given in the URL and as an option; leave one of them out")
    try:
        port = int(str(given))
    except ValueError:
        port = 0
    if not 0 < port < 65536:
        raise ConfigError(f"port = {given!r}: give a number from 1 to 65535")
    return port


def _text(config: Mapping[str, Any], location: urls.Location, key: str) -> str | None:
    given = urls.option(config, location, key)
    return None if given is None else str(given)


def _config_file(given: Mapping[str, str | None]) -> str | None:
    return NO_CONFIG if given["ssh_config"] == NO_CONFIG else _file(given, "ssh_config")


def _file(given: Mapping[str, str | None], key: str) -> str | None:
    """A local file that an option names. Raises ConfigError when it cannot be read."""
    path = given[key]
    if path is None:
        return None
    found = Path(path).expanduser()
    if not found.is_file() or not os.access(found, os.R_OK):
        raise ConfigError(f"{key} = {path!r}: there is no such file, or it cannot be read")
    return str(found)
