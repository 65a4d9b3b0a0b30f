"""Named points at which a test can end or hold this process: the crash and race tests. Without RUNFS_FAULT a no-op.

Called by push, evict, hydrate, the cache and stores between the steps whose order matters. Blocks only where a test
says so.

    RUNFS_FAULT="name[#n]=action[,...]"     n: the n-th time the point is passed (default: the first)
    action: kill            SIGKILL to this process: what a crash leaves
            hold:PATH       make PATH.here, then wait until PATH.go is there (60 s at most)
            trace:PATH      append the point's name to PATH, each time it is passed
    RUNFS_FAULT="@PATH"     the same from a file, which a test may write and change while this process runs: counting
                            begins anew with each change
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path

_HOLD_S = 60.0


def _parse(text: str) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for item in filter(None, text.split(",")):
        place, _equals, action = item.partition("=")
        name, _hash, number = place.partition("#")
        found.setdefault(name, []).append((int(number or 1), action))
    return found


_GIVEN = os.environ.get("RUNFS_FAULT", "")
_FILE = Path(_GIVEN[1:]) if _GIVEN.startswith("@") else None
_FAULTS = {} if _FILE else _parse(_GIVEN)
_passed: Counter[str] = Counter()
_read = ""


def _follow(file: Path) -> None:
    """Take up what a test has written by now."""
    global _read
    text = file.read_text().strip() if file.exists() else ""
    if text != _read:
        _read = text
        _passed.clear()
        _FAULTS.clear()
        _FAULTS.update(_parse(text))


def point(name: str) -> None:
    """Here a test may interfere; otherwise nothing happens."""
    if _FILE is not None:
        _follow(_FILE)
    if _FAULTS:
        _passed[name] += 1
        for number, action in _FAULTS.get(name, []) + _FAULTS.get("*", []):
            what, _colon, path = action.partition(":")
            if what == "trace":
                with open(path, "a") as file:
                    file.write(f"{name}\n")
            elif number == _passed[name]:
                _do(what, path)


def _do(what: str, path: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hold":
        Path(f"{path}.here").touch()
        end = time.monotonic() + _HOLD_S
        while not os.path.exists(f"{path}.go") and time.monotonic() < end:
            time.sleep(0.002)
    else:
        raise ValueError(f"RUNFS_FAULT: {what!r} is not kill, hold:PATH or trace:PATH")
