"""The command line's side of the control socket: plain blocking sockets, nothing heavy loaded.

Used by `daemon.target`. `ask` blocks until the command has ended; the daemon says at least every few seconds that it
is alive, and is given up after a minute of silence.
"""

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.protocol import SILENCE_S, encode, error_from
from vfs.errors import Refused, RunfsError

CONNECT_S = 5.0


class DaemonLost(RunfsError):
    """The daemon ended or fell silent while it worked for us."""


@contextmanager
def connected(path: Path) -> Iterator[socket.socket | None]:
    """A connection to the daemon at `path`, or None when nobody listens there. Raises Refused for a stranger's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_S)
        if not _connect(connection, path):
            yield None
            return
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.geteuid(), 0):
            raise Refused(f"{path} is served by another user (uid {uid}); it was not asked anything")
        yield connection


def _connect(connection: socket.socket, path: Path) -> bool:
    directory = None
    try:
        address = str(path)
        if len(os.fsencode(path)) > 107:  # the size of a socket address: name it through its directory
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
            address = f"/proc/self/fd/{directory}/{path.name}"
        connection.connect(address)
        return True
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise Refused(f"{path} belongs to another user; run the command as that user") from error
    except (TimeoutError, BlockingIOError) as error:
        raise DaemonLost(f"the daemon at {path} does not take connections; see its log, or end it") from error
    finally:
        if directory is not None:
            os.close(directory)


def answers(path: Path) -> bool:
    """Whether somebody listens at `path`."""
    with connected(path) as connection:
        return connection is not None


def ask(
    path: Path,
    command: str,
    args: dict[str, Any],
    progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    silence_s: float = SILENCE_S,
) -> dict[str, Any] | None:
    """The result of a command run by the daemon at `path`; None when nobody listens there.

    Raises what the daemon raised, as the same class, or DaemonLost.
    """
    with connected(path) as connection:
        if connection is None:
            return None
        connection.settimeout(silence_s)
        try:
            connection.sendall(encode({"command": command, "args": args}))
            return _result(connection, progress)
        except TimeoutError:
            message = f"the daemon at {path} has been silent for {silence_s:.0f} s; the command may still be running"
            raise DaemonLost(f"{message}. Look at its log, then ask again") from None
        except (BrokenPipeError, ConnectionResetError):
            raise _lost(command) from None


def _result(connection: socket.socket, progress: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    with connection.makefile("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            message = json.loads(line)
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            if "error" in message:
                raise error_from(message["error"])
            if "progress" in message and progress is not None:
                progress(message["progress"])
    raise _lost(command="the command")


def _lost(command: str) -> DaemonLost:
    return DaemonLost(
        f"the daemon ended while it ran {command}; what was acknowledged is kept. See its log, mount again"
    )
