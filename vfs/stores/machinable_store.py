"""Any machinable `Storage` class as a source of records: `machinable:///project?module=my_storage`.

Used through `open_store`. A Storage knows records by their uuids: a question about one of its files brings the record
once with the Storage's `contains` and `retrieve` into a directory of ours and is answered from there (`whole.py`); a
listing asks its `walk`. Blocks as the Storage does, at most for the deadline.

Read-only, because a Storage takes and replaces records as wholes: it has no single commit point, no conditions and
no way to tell what it holds byte by byte, so nothing pushed there could be proven, and evicting on its word could lose
data.

The Storage runs in a process of its own (`machinable_helper.py`): its project's code is the user's, and machinable
opens the index with another SQLite library than ours, which in one process would undo both libraries' locks.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from vfs.errors import ConfigError, DamagedRecord, NotFound, RunfsError, StoreError, StoreTimeout, Unreachable
from vfs.format import read_header
from vfs.stores import urls
from vfs.stores.base import BaseBroker
from vfs.stores.limits import Limits, read_limits
from vfs.stores.protocol import Info
from vfs.stores.whole import WholeRecordStore
from vfs.stores.whole_files import own_place, regular_files

KEEP_S = 86400.0  # a record of another storage seldom changes; after so long it is brought again
_START_S = 60.0  # importing machinable and a project's module takes a second, on a cold network disk many
_LONGEST_LINE = 1 << 20  # bytes of one answer
_HELPER = Path(__file__).with_name("machinable_helper.py")
_OPTIONS = frozenset({"module", "python", "place", "keep_s", "read_only"})
_INSTALL = "pip install 'machinable>=5.1'"


class MachinableStore(WholeRecordStore):
    """The records of one Storage. `python`: the interpreter that has machinable and what the project imports."""

    def __init__(
        self,
        name: str,
        url: str,
        place: Path,
        project: Path,
        module: str,
        config: Mapping[str, Any],
        *,
        python: str = sys.executable,
        keep_s: float = KEEP_S,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        super().__init__(name, url, place, patience_s=4 * limits.deadline_s, keep_s=keep_s, retry_s=2.0, limits=limits)
        settings = {"project": str(project), "module": module, "config": dict(config)}
        self._helper = Helper(name, python, settings)

    def info(self) -> Info:
        return Info(broker="machinable", read_only=True)

    def disconnect(self) -> None:
        super().disconnect()
        self._helper.stop()

    def _bring(self, uuid: str, into: Path) -> Path:
        target = into / "record"
        question = {"call": "retrieve", "uuid": uuid, "into": str(target)}
        found = self._helper.ask(question, self._limits, grows=lambda: used_bytes(into))
        if found != [True] or not target.is_dir():
            raise NotFound(f"{self.name}: the storage has no record {uuid}")
        try:
            header = read_header(target)
        except DamagedRecord as error:
            raise StoreError(f"{self.name}: what the storage gave for {uuid} is no record: {error}") from error
        if header.uuid != uuid:
            raise StoreError(f"{self.name}: asked for {uuid}, the storage gave the record {header.uuid}")
        return target

    def _uuids(self, deadline: float | None, most: int | None = None) -> Iterator[str]:
        limits = self._limits if deadline is None else replace(self._limits, deadline_s=deadline)
        # Not as they come: who lists asks for the records in between, and the helper answers one question at a time.
        found = self._helper.ask({"call": "walk", "most": most}, limits)
        return (uuid for uuid in found if isinstance(uuid, str))


class Helper:
    """The process in which the Storage lives: started at the first question, again after it ended. One question at a
    time; a question that gets no answer in time ends the process."""

    def __init__(self, name: str, python: str, settings: Mapping[str, Any]) -> None:
        self._name = name
        self._python = python
        self._settings = settings
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._number = 0

    def ask(self, question: Mapping[str, Any], limits: Limits, grows: Callable[[], int] | None = None) -> list[Any]:
        """The items of an answer and its result. The deadline is for each item; it begins anew as long as `grows`
        (bytes so far) goes on at the least throughput. Raises StoreError, StoreTimeout, Unreachable, ConfigError."""
        if not self._lock.acquire(timeout=limits.deadline_s):
            raise StoreTimeout(f"{self._name}: the storage was busy with something else for {limits.deadline_s:g} s")
        try:
            return self._ask(question, Patience(limits, grows))
        except BaseException as error:
            if not isinstance(error, _Answered):
                self._end()  # nobody will read the rest of this answer
                raise
            raise error.error from None
        finally:
            self._lock.release()

    def stop(self) -> None:
        """End the process, also one that is at work; another question starts a new one."""
        process = self._process
        if process is not None:
            _kill(process)  # whoever waits for its answer goes on
            with self._lock:
                self._end()

    def _ask(self, question: Mapping[str, Any], patience: "Patience") -> list[Any]:
        process = self._started()
        self._number += 1
        self._send(process, {"id": self._number, **question})
        items: list[Any] = []
        while True:
            answer = self._answer(process, patience)
            if "item" in answer:
                items.append(answer["item"])
                continue
            if (error := self._error(answer)) is not None:
                raise _Answered(error)
            return items if answer["result"] is None else [*items, answer["result"]]

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        try:
            self._process = subprocess.Popen(
                [self._python, str(_HELPER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"{self._name}: python = {self._python!r}: {error.strerror}; name one that runs"
            ) from error
        self._buffer = b""
        try:
            self._send(self._process, self._settings)
            problem = self._error(self._answer(self._process, Patience(Limits(deadline_s=_START_S), None)))
            if problem is not None:
                raise problem
        except BaseException:
            self._end()
            raise
        return self._process

    def _send(self, process: "subprocess.Popen[bytes]", what: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(what).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise self._gone(process) from error

    def _answer(self, process: "subprocess.Popen[bytes]", patience: "Patience") -> dict[str, Any]:
        assert process.stdout is not None
        while b"\n" not in self._buffer:
            self._buffer += self._more(process, process.stdout, patience)
            if len(self._buffer) > _LONGEST_LINE:
                raise StoreError(f"{self._name}: the storage's process answered with more than {_LONGEST_LINE} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict) or answer.get("id") not in (0, self._number):
            raise StoreError(f"{self._name}: the storage's process gave an answer that is none")
        return answer

    def _more(self, process: "subprocess.Popen[bytes]", output: IO[bytes], patience: "Patience") -> bytes:
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while not poll.poll(patience.next_s() * 1000):
            if patience.is_over():
                raise StoreTimeout(f"{self._name}: the storage did not answer within {patience.limits.deadline_s:g} s")
        patience.begin()
        got = os.read(output.fileno(), 65536)
        if not got:
            raise self._gone(process)
        return got

    def _gone(self, process: "subprocess.Popen[bytes]") -> Unreachable:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        return Unreachable(
            f"{self._name}: the process with the storage ended (status {process.returncode}); try its code in "
            f"{self._settings['project']}: {self._python} -c 'import {self._settings['module']}'"
        )

    def _error(self, answer: Mapping[str, Any]) -> RunfsError | None:
        if "error" not in answer:
            return None
        if answer.get("missing") == "machinable":
            return ConfigError(f"{self._name}: {self._python} has no machinable: {self._python} -m {_INSTALL}")
        where = f"{self._settings['module']} in {self._settings['project']}"
        return StoreError(f"{self._name}: the storage {where} failed: {answer['error']}")

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self._process = None


class _Answered(Exception):
    """An error that came as an answer: the process goes on."""

    def __init__(self, error: RunfsError) -> None:
        super().__init__(str(error))
        self.error = error


class Patience:
    """How long an answer may take: the deadline, again and again while enough bytes arrive."""

    def __init__(self, limits: Limits, grows: Callable[[], int] | None) -> None:
        self.limits = limits
        self._grows = grows
        self._size = 0
        self.begin()

    def begin(self) -> None:
        self._end = time.monotonic() + self.limits.deadline_s

    def next_s(self) -> float:
        """Seconds until `is_over` should be asked."""
        return max(0.0, self._end - time.monotonic())

    def is_over(self) -> bool:
        """Whether the deadline passed, and too little came meanwhile to grant another."""
        if self.next_s() > 0:
            return False
        size = self._grows() if self._grows is not None else 0
        if size - self._size < self.limits.least_throughput * self.limits.deadline_s or self._grows is None:
            return True
        self._size = size
        self.begin()
        return False


def used_bytes(directory: Path) -> int:
    """The sizes of the files below a directory that somebody is writing to."""
    try:
        return sum(status.st_size for _path, status in regular_files(os.fsencode(directory)))
    except OSError:
        return 0


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Broker(BaseBroker):
    """`machinable:///project/directory?module=my_storage`. Options: `module`, a module of that project or a remote it
    declares (default: machinable's disk Storage); `python`, the interpreter that has machinable; `keep_s`, how long a
    record that was brought is taken as it is; `place`, where; all others are the Storage's own configuration."""

    read_only = True
    wants = frozenset({"place"})

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        read_limits(config)
        project = Path("/" + location.path)
        if location.host or not location.path:
            raise ConfigError(f"url = {location.url!r}: give machinable:///project/directory with three slashes")
        if not project.is_dir():
            raise ConfigError(f"url = {location.url!r}: there is no directory {project}")
        module = urls.option(config, location, "module") or "machinable.storage"
        if not all(part.isidentifier() for part in str(module).split(".")):
            raise ConfigError(f"module = {module!r}: give a Python module of the project, such as my_storage")
        _keep_s(config, location)
        python = urls.option(config, location, "python")
        if python is None and importlib.util.find_spec("machinable") is None:
            raise ConfigError(
                f"machinable is not installed beside runfs: {_INSTALL}, or set python to an interpreter that has it"
            )
        return [f"{location.url}: runs the code of {module} in {project}, in a process of its own"]

    def open(self, config: Mapping[str, Any]) -> MachinableStore:
        self.validate(config)
        location = urls.split(config)
        place = urls.option(config, location, "place")
        known = _OPTIONS | urls.COMMON
        return MachinableStore(
            config.get("name") or "machinable",
            location.url,
            Path(place) if place else own_place(),
            Path("/" + location.path),
            str(urls.option(config, location, "module") or "machinable.storage"),
            {key: value for key, value in {**location.query, **config}.items() if key not in known},
            python=str(urls.option(config, location, "python") or sys.executable),
            keep_s=_keep_s(config, location),
            limits=read_limits(config),
        )


def _keep_s(config: Mapping[str, Any], location: urls.Location) -> float:
    given = urls.option(config, location, "keep_s")
    try:
        seconds = KEEP_S if given is None else float(given)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"keep_s = {given!r}: give seconds, 0 or more")
    return seconds
