"""Telling systemd how the daemon is (sd_notify(3)), without a dependency.

Used by `daemon.mount` and the command line. A message is one datagram: sending never blocks, and outside systemd
(NOTIFY_SOCKET not set) nothing happens.
"""

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def notify(*lines: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send lines such as READY=1 or STATUS=...; whether somebody got them."""
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # the abstract namespace: the name begins with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.connect(address)
            sender.send("\n".join(lines).encode())
    except OSError as error:
        log.debug("systemd was not told %s: %s", lines, error)
        return False
    return True


def ready(status: str = "") -> bool:
    """The mount answers."""
    return notify("READY=1", f"MAINPID={os.getpid()}", *([f"STATUS={_line(status)}"] if status else []))


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return notify(f"STATUS={_line(text)}")


def watchdog() -> bool:
    """Still alive. To be called at least every `watchdog_interval()` seconds."""
    return notify("WATCHDOG=1")


def stopping(text: str = "draining") -> bool:
    return notify("STOPPING=1", f"STATUS={_line(text)}")


def extend(seconds: float) -> bool:
    """Ask for more time while starting or stopping (a drain that still makes progress)."""
    return notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def watchdog_interval(environ: Mapping[str, str] | None = None) -> float | None:
    """Seconds between two `watchdog()` calls (half of what systemd waits), or None when no watchdog is wanted."""
    given = os.environ if environ is None else environ
    if given.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        interval = int(given.get("WATCHDOG_USEC", "0")) / 2e6
    except ValueError:
        return None
    return interval if interval > 0 else None


def _line(text: str) -> str:
    return text.replace("\n", " ")
