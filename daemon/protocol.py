"""The control protocol's lines: one JSON request, progress while it runs, one JSON answer. No I/O.

Used by `daemon.control` (the daemon's side) and `daemon.client` (the command line's side). Each line ends with a
newline and is ASCII, so that names with any bytes pass.

    -> {"command": "push", "args": {"uuids": ["qcmIdGsGCpwS"]}}
    <- {"alive": true}                                  every few seconds while the work is silent
    <- {"progress": {"what": "push", "uuid": ..., "done": 1, "size": 2, "rate": 3, "left_s": 4}}
    <- {"result": {..., "exit": 0}}      or      {"error": {"type": "Refused", "message": "...", "exit": 1}}
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Protocol

from vfs import errors
from vfs.errors import RunfsError, UsageError

MAX_REQUEST = 1 << 20  # bytes; room for 60,000 uuids, and a bound on what a broken client can make us hold
ALIVE_S = 5.0  # how often a silent command says that it still works
SILENCE_S = 60.0  # after which a client gives the daemon up


class Progress(Protocol):
    """What a running command tells, and how it learns that nobody listens any more."""

    @property
    def cancelled(self) -> bool:
        """True when the asker has gone: stop at the next point where stopping is safe."""
        ...

    def __call__(self, event: dict[str, Any], /) -> None:
        """Tell one step. Never blocks, and never raises; steps may be left out when they come too fast."""
        ...


class Commands(Protocol):
    """What the control socket serves; `vfs.session.Session` is one."""

    def run(self, command: str, args: dict[str, Any], progress: Progress, /) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Request:
    command: str
    args: dict[str, Any]


def encode(message: dict[str, Any]) -> bytes:
    """One line. Numbers JSON cannot hold (infinity, not a number) become null."""
    try:
        text = json.dumps(message, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(message), allow_nan=False, default=_plain)
    return text.encode("ascii") + b"\n"


def _plain(value: object) -> object:
    """What the core may put into a result beside JSON's own types."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode_request(line: bytes) -> Request:
    """Raises UsageError for anything that is not a request."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not one line of JSON: {type(error).__name__}") from None
    if not isinstance(message, dict) or not isinstance(message.get("command"), str):
        raise UsageError('the request has no command: send {"command": "status", "args": {}}')
    args = message.get("args", {})
    if not isinstance(args, dict):
        raise UsageError("the request's args are not an object")
    return Request(message["command"], args)


def error_message(error: RunfsError) -> dict[str, Any]:
    """An error as it is sent, and as `--json` prints it."""
    return {"error": {"type": type(error).__name__, "message": str(error), "exit": error.exit_code}}


def error_from(message: dict[str, Any]) -> RunfsError:
    """The exception an error line stands for, of the same class where this version knows it."""
    known = getattr(errors, str(message.get("type")), RunfsError)
    kind = known if isinstance(known, type) and issubclass(known, RunfsError) else RunfsError
    error = kind(str(message.get("message", "the daemon gave no reason")))
    error.exit_code = message["exit"] if message.get("exit") in (1, 2) else kind.exit_code
    return error
