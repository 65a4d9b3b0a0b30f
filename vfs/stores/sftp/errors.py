"""What an SFTP server's and asyncssh's failures mean, in sentences that say what to do.

Used by `session.py` and `files.py`. Nothing here blocks, but for a look into known_hosts.
"""

import asyncio
import socket

import asyncssh

from vfs.errors import ConfigError, Denied, NotFound, RunfsError, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.stores.sftp.config import PASSPHRASE_ENV, PASSWORD_ENV, Target, connect_options

_FULL = (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded)
_MISSING = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
_LOST = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.ConnectionLost)
_KEYS = (asyncssh.KeyImportError, asyncssh.KeyEncryptionError)


def timed_out(target: Target, operation: str, key: str, why: str) -> StoreTimeout:
    """A call that our own limits ended."""
    return StoreTimeout(
        f"{_what(target, operation, key)}: {why} from {target.place}; is the network or the server slow?"
    )


def full(target: Target, operation: str, key: str) -> StoreFull:
    """The server's disk takes no more."""
    return StoreFull(
        f"{_what(target, operation, key)}: the disk of {target.place} is full; make room or use another store"
    )


def explain(error: Exception, target: Target, operation: str, key: str) -> RunfsError:
    """Our error for one of asyncssh's, or of the network's."""
    what = _what(target, operation, key)
    if isinstance(error, RunfsError):
        return error
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return Denied(f"{what}: {_host_key(target)}")
    if isinstance(error, asyncssh.PermissionDenied):
        return Denied(f"{what}: {_login(target)}")
    if isinstance(error, _LOST) or (isinstance(error, asyncssh.DisconnectError) and error.code != 0):
        return Unreachable(f"{what}: {target.place} ended the connection ({_reason(error)}); is its SSH server well?")
    if isinstance(error, OSError | asyncio.IncompleteReadError):
        return Unreachable(
            f"{what}: no connection to {target.place} ({_reason(error)}); is the server up and reachable?"
        )
    if isinstance(error, asyncssh.SFTPError):
        return _refused(error, target, what)
    return StoreError(f"{what}: {target.place}: {_reason(error)}")


def bad_key(error: BaseException, target: Target) -> Denied:
    """A private key that cannot be read."""
    return Denied(
        f"{target.name}: the credentials do not open key_file {target.key_file}: {error}; give its passphrase in "
        f"{PASSPHRASE_ENV} or in the configuration (passphrase), or load it into ssh-agent"
    )


def is_key_error(error: BaseException) -> bool:
    """Whether a private key could not be read."""
    return isinstance(error, _KEYS)


def _refused(error: asyncssh.SFTPError, target: Target, what: str) -> StoreError:
    if isinstance(error, _MISSING):
        return NotFound(f"{what}: there is no such object")
    if isinstance(error, _FULL):
        return StoreFull(f"{what}: {_reason(error)} at {target.place}; make room there or use another store")
    if isinstance(error, asyncssh.SFTPPermissionDenied | asyncssh.SFTPWriteProtect):
        return Denied(f"{what}: {target.place} says no; check who owns {target.root} there, and that it may be written")
    return StoreError(f"{what}: {target.place} refused: {_reason(error)}; its log may say why")


def _host_key(target: Target) -> str:
    port = f"-p {target.port} " if target.port else ""
    where = target.known_hosts or "~/.ssh/known_hosts"
    scan = f"ssh-keyscan {port}{target.host}"
    if _knows_another(target):
        return (
            f"{target.place} shows another host key than {where} has for it. Somebody may be in between: ask its "
            f"administrator whether the key was changed; only then remove the old line (ssh-keygen -R) and add what "
            f"{scan} prints"
        )
    return (
        f"the host key of {target.place} is not known. Run {scan} | ssh-keygen -lf - and compare the fingerprint with "
        f"what its administrator says; then {scan} >> {where}"
    )


def _knows_another(target: Target) -> bool:
    port = target.port if target.port not in (None, 22) else None
    try:
        found = asyncssh.match_known_hosts(connect_options(target)["known_hosts"], target.host, "", port)
    except (OSError, ValueError, ConfigError):
        return False
    return bool(found[0])


def _login(target: Target) -> str:
    who = f"user {target.user}" if target.user else "your user name"
    tried = f"key_file {target.key_file}" if target.key_file else "the keys of ssh-agent and ~/.ssh"
    password = " and the password" if target.password else ""
    return (
        f"{target.place} does not let {who} in with these credentials: {tried}{password}. Add the public key with "
        f"ssh-copy-id, give another key_file, or a password in {PASSWORD_ENV} or the configuration"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host name"
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return " ".join(str(getattr(error, "reason", "") or error or type(error).__name__).split())


def _what(target: Target, operation: str, key: str) -> str:
    return f"{target.name}: {operation} {key}".rstrip()
