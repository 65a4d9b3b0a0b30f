"""Sessions in processes of their own, that can be killed or held at a named point (`vfs/faults.py`). Started by forking
a process that has loaded everything already: 20 ms instead of a second."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from vfs.settings import Settings

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.core.doing", "vfs.session", "vfs.stores.file", "vfs.stores.memory"])


class _Nobody:
    """Progress that nobody follows."""

    cancelled = False

    def __call__(self, event: dict[str, object], /) -> None:
        return None


def _work(settings: str, commands: list[tuple[str, str]], fault: str, said: str) -> None:
    import importlib

    from vfs import faults
    from vfs.errors import RunfsError
    from vfs.session import Session

    os.environ["RUNFS_FAULT"] = fault
    importlib.reload(faults)
    outcome: list[str] = []
    session = Session.open(Settings.model_validate_json(settings))
    try:
        for command, uuid in commands:
            unit = session.core.units.get(uuid)
            try:
                match command:
                    case "evict":
                        session.evictor.evict(unit)
                    case "restore":
                        session.evictor.restore(unit)
                    case "hydrate":
                        session.evictor.hydrate(unit)
                    case "push":
                        pushed = session.pusher.push(unit)
                        assert not pushed.failed, pushed.failed
                    case "begin":
                        session.transactions.begin(unit, "notes")
                    case "commit":
                        session.transactions.commit(unit)
                    case "rollback":
                        session.transactions.rollback(unit)
                    case "prune" | "versions restore":
                        args = {"uuids": [uuid], "keep": 0, "uuid": uuid, "number": 1}
                        name = "versions prune" if command == "prune" else command
                        done = session.run(name, args, _Nobody())
                        assert not done["failed"], done
                outcome.append("")
            except (RunfsError, OSError) as error:
                outcome.append(str(error) or repr(error))
    finally:
        session.close()
    Path(said).write_text(json.dumps(outcome))


class Worker:
    """A process that runs commands on a session. `said()` waits: one sentence a command, "" when it went well."""

    def __init__(self, settings: Settings, commands: list[tuple[str, str]], place: Path, fault: str = "") -> None:
        self._place = place / f"said-{os.urandom(4).hex()}"
        self.process: BaseProcess = _context.Process(
            target=_work, args=(settings.model_dump_json(), commands, fault, str(self._place))
        )
        self.process.start()

    def killed(self) -> bool:
        """Whether it was ended by the fault; False when it ran through."""
        self.process.join(60)
        assert self.process.exitcode in (0, -9), self.process.exitcode
        return self.process.exitcode == -9

    def said(self) -> list[str]:
        self.process.join(90)
        assert self.process.exitcode == 0, self.process.exitcode
        return [str(each) for each in json.loads(self._place.read_text())]


@contextmanager
def held(settings: Settings, command: str, uuid: str, place: Path, point: str) -> Iterator[Worker]:
    """A worker that waits at a point while the block runs; it goes on afterwards, and the block's end waits for it."""
    from tests.core.making import until

    name = place / f"hold-{os.urandom(4).hex()}"
    worker = Worker(settings, [(command, uuid)], place, f"{point}=hold:{name}")
    here = Path(f"{name}.here")
    until(lambda: here.exists() or not worker.process.is_alive(), 60)
    assert here.exists(), f"{point} was never passed: {worker.said()}"
    try:
        yield worker
    finally:
        Path(f"{name}.go").touch()
        worker.process.join(90)


def trace(settings: Settings, command: str, uuid: str, place: Path) -> list[str]:
    """The points a command passes, in order."""
    name = place / f"trace-{os.urandom(4).hex()}"
    said = Worker(settings, [(command, uuid)], place, f"*=trace:{name}").said()
    assert said == [""], said
    return name.read_text().split()
