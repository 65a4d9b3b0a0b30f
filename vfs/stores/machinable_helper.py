"""The other half of the `machinable` store: a program of its own, run by the Python that has machinable.

Started by `machinable_store.py`, never imported by it: the user's code, machinable's own SQLite and whatever they print
stay out of the daemon's process. Needs machinable and the standard library, nothing of runfs.

One JSON object a line. In: `{"project", "module", "config"}` once, then `{"id", "call", ...}`. Out: `{"id", "item"}`
any number of times, then `{"id", "result"}` or `{"id", "error", "missing"}`. Blocks as the user's Storage does.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


def main() -> int:
    """Serve requests until the input ends."""
    # The first place is this file's directory, whose modules are none of the user's: his project may have a `base`.
    sys.path[:] = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the user's code prints is no answer
    try:
        storage = _open(json.loads(sys.stdin.readline()))
    except BaseException as error:
        _tell(answers, {"id": 0, **_explained(error)})
        return 1
    _tell(answers, {"id": 0, "result": type(storage).__qualname__})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            _answer(storage, asked, answers)
        except BrokenPipeError:
            return 0
        except BaseException as error:
            _tell(answers, {"id": asked["id"], **_explained(error)})
    return 0


def _open(settings: dict[str, Any]) -> Any:
    """The user's Storage, made as machinable makes it in that project: remotes are resolved too."""
    from machinable import Project, Storage

    os.chdir(settings["project"])
    context: Any = Project(settings["project"])
    context.__enter__()
    made: Any = Storage.make(settings["module"], settings["config"] or None)
    if not isinstance(made, Storage):
        raise TypeError(f"{settings['module']} holds a {type(made).__name__}, which is no machinable Storage")
    storage: Any = made
    storage.__enter__()
    return storage


def _answer(storage: Any, asked: dict[str, Any], answers: IO[str]) -> None:
    result = None
    if asked["call"] == "retrieve":
        result = bool(storage.contains(asked["uuid"])) and bool(storage.retrieve(asked["uuid"], asked["into"]))
    elif asked["call"] == "walk":
        for uuid in itertools.islice(_walk(storage), asked["most"]):
            _tell(answers, {"id": asked["id"], "item": uuid})
    else:
        raise ValueError(f"no call {asked['call']!r}")
    _tell(answers, {"id": asked["id"], "result": result})


def _walk(storage: Any) -> Iterator[str]:
    """The records of a storage, without those that are nested in another one: they come with it."""
    tops: set[str] = set()
    for found in storage.walk():
        directory = str(found).rstrip("/")
        if not _inside(directory, tops):
            tops.add(directory)
            yield _uuid(directory)


def _inside(directory: str, tops: set[str]) -> bool:
    parent = os.path.dirname(directory)
    while parent not in ("", "/"):
        if parent in tops:
            return True
        parent = os.path.dirname(parent)
    return False


def _uuid(directory: str) -> str:
    """What the header says where it is here; else the last part of the name, as remote storages lay records out."""
    try:
        with open(os.path.join(directory, "id.json"), encoding="utf-8") as file:
            return str(json.load(file)["uuid"])
    except (OSError, ValueError, KeyError, TypeError):
        return os.path.basename(directory)


def _explained(error: BaseException) -> dict[str, Any]:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return {"error": f"{type(error).__name__}: {error}", "missing": missing}


def _tell(answers: IO[str], what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
