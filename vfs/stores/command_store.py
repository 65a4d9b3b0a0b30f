"""A calculated store: a command of the user's makes a record again, for instance by relaunching its run.

Used through `open_store("command://NAME")`, as the last of several stores. Off unless `enabled = true` is configured.
A question about a file waits until the command has ended, at most `limit_s`; after that the record is served from a
directory of ours (`whole.py`), and the command does not run again for it.

The command is an argument list, never a shell's line: what a placeholder stands for is one argument, or a part of one,
however it looks. It runs in an empty directory of its own, in a session of its own, and with `MACHINABLE_INDEX`
set to a new file there, so that a relaunch neither finds the record in the project's index nor writes to that.

What it leaves must hold one valid record with the kind and identity keys that the index has for the one asked for.
machinable gives each run a new uuid, so that may differ; so may what each run writes anew (times, host). Readers
compare the bytes with the record's digests: this store promises nothing about them.
"""

import logging
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfs.errors import ConfigError, DamagedRecord, Denied, NotFound, RunfsError, StoreError, StoreTimeout
from vfs.events import Events
from vfs.format import HEADER, MARKER, MODEL, Header, opened, parse_json, read_bytes, read_header
from vfs.index import Index
from vfs.stores import urls
from vfs.stores.base import BaseBroker
from vfs.stores.limits import Limits, read_limits
from vfs.stores.protocol import Check, Info
from vfs.stores.whole import WholeRecordStore
from vfs.stores.whole_files import own_place

log = logging.getLogger(__name__)

LIMIT_S = 600.0
KEPT_MOST = 8  # records made again that are kept
_LAST_WORDS = 600  # characters of the command's output in a message
_OPTIONS = frozenset({"command", "enabled", "index", "place", "limit_s", "read_only"})
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_OF_RECORD = frozenset({"uuid", "module", "config"})
_PLACEHOLDERS = _OF_RECORD | {"directory", "project"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A record as the index describes it. `config`: what ran, as JSON."""

    uuid: str
    kind: str
    identity_key: str
    predicate_key: str
    module: str
    config: str

    def matches(self, header: Header) -> bool:
        """Whether a record is this one, made again: its uuid may differ."""
        return (header.kind, header.identity_key, header.predicate_key) == (
            self.kind,
            self.identity_key,
            self.predicate_key,
        )


class Template:
    """A command with placeholders: `{uuid}`, `{module}`, `{config}` of the record; `{directory}`, where it is to put
    the record; `{project}`, the directory of the index. Raises ConfigError."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.parts = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"command = {text!r}: {error}") from None
        if not self.parts:
            raise ConfigError("command: give the command that makes a record again, with {module}, {config}, ...")
        unknown = set(_PLACEHOLDER.findall(text)) - _PLACEHOLDERS
        if unknown:
            known = ", ".join(sorted(f"{{{each}}}" for each in _PLACEHOLDERS))
            raise ConfigError(f"command: no placeholder {{{min(unknown)}}}; there are {known}")
        program = self.parts[0]
        if not _OF_RECORD.isdisjoint(_PLACEHOLDER.findall(program)):
            raise ConfigError(f"command: the program {program!r} must not come from the record")
        if "/" in program and not program.startswith(("/", "{project}/")):
            raise ConfigError(f"command: {program!r}: give the program's full path, or its bare name")

    def fill(self, values: Mapping[str, str]) -> list[str]:
        """The arguments for a record. Raises StoreError for a value that could be taken for an option."""
        return [self._fill(part, values) for part in self.parts]

    @staticmethod
    def _fill(part: str, values: Mapping[str, str]) -> str:
        filled = _PLACEHOLDER.sub(lambda found: values[found[1]], part)  # once: a value's braces stay what they are
        if "\0" in filled or (filled.startswith("-") and not part.startswith("-")):
            raise StoreError(f"the record's {part} is {filled[:80]!r}, which a program could misunderstand; not run")
        return filled

    def __str__(self) -> str:
        return self.text


class CommandStore(WholeRecordStore):
    """Records made by a command. `index`: machinable's, which knows what is to be made. `events` tells each run of the
    command, by its arguments, before it begins."""

    def __init__(
        self,
        name: str,
        url: str,
        place: Path,
        template: Template,
        index: Path,
        *,
        enabled: bool = False,
        limit_s: float = LIMIT_S,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(name, url, place, patience_s=limit_s, most=KEPT_MOST, limits=limits)
        self.template = template
        self.enabled = enabled
        self.events = Events()
        self._index = index
        self._limit_s = limit_s
        self._one = threading.Lock()  # one command at a time: each may be as large as the run was
        self._running: subprocess.Popen[bytes] | None = None  # not reaped yet, so its number is its own
        self._running_lock = threading.Lock()

    def info(self) -> Info:
        return Info(broker="command", read_only=True, calculates=True)

    def disconnect(self) -> None:
        super().disconnect()
        self._end()

    def _end(self) -> None:
        """End a command that runs, and all it started."""
        with self._running_lock:
            if self._running is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._running.pid, signal.SIGKILL)

    def check(self) -> Check:
        """Whether the program is there and the index can be read; nothing is run."""
        result = Check(reachable=self.enabled)
        try:
            self._refuse_if_off()
            program = self.template.parts[0].replace("{project}", str(self._index.parent))
            if shutil.which(program) is None:
                raise ConfigError(f"{self.name}: there is no program {program!r} that can be run")
            with Index.open(self._index):
                result.readable = True
        except RunfsError as error:
            result.problems.append(str(error))
        return result

    def _uuids(self, deadline: float | None, most: int | None = None) -> Iterator[str]:
        """Only what was made already: a listing runs nothing."""
        return (uuid for uuid in self._here() if self._kept(uuid) is not None)

    def _listed(self, uuid: str, deadline: float | None) -> Path | None:
        return self._kept(uuid)

    def _bring(self, uuid: str, into: Path) -> Path:
        self._refuse_if_off()
        wanted = self._wanted(uuid)
        output = into / "output"
        output.mkdir()
        arguments = self._arguments(wanted, output)
        with self._one:
            self._begin("calculate", uuid)
            shown = shlex.join(arguments)
            log.warning("%s: making %s again: %s", self.name, uuid, shown)
            with self.events.progress("calculate", shown, 0, uuid=uuid, store=self.name):
                self._run(uuid, arguments, output)
        return self._checked(wanted, output)

    def _refuse_if_off(self) -> None:
        if not self.enabled:
            raise Denied(
                f"{self.name}: it is switched off; it would run: {self.template}  "
                f"(enabled = true in [stores.{self.name}.options] allows that)"
            )

    def _wanted(self, uuid: str) -> Wanted:
        with Index.open(self._index) as index:
            rows = index.rows([uuid])
        if not rows:
            raise NotFound(f"{self.name}: the index has no record {uuid}: nothing says how to make it")
        row = rows[0]
        if not row.get("module"):
            raise NotFound(f"{self.name}: the index has no module for {uuid}: nothing says how to make it")
        names = ("kind", "identity_key", "predicate_key", "module", "config_resolved_json")
        return Wanted(uuid, *(str(row[name]) for name in names))

    def _arguments(self, wanted: Wanted, output: Path) -> list[str]:
        values = {"uuid": wanted.uuid, "module": wanted.module, "config": wanted.config}
        return self.template.fill({**values, "directory": str(output), "project": str(self._index.parent)})

    def _run(self, uuid: str, arguments: list[str], output: Path) -> None:
        """Run the command to its end. Its output is kept in `<uuid>.log`. Raises StoreError, StoreTimeout."""
        told = self.place / f"{uuid}.log"
        environment = {**os.environ, "MACHINABLE_INDEX": str(output / ".machinable.sqlite")}
        with open(told, "wb") as words:
            try:
                process = subprocess.Popen(
                    arguments,
                    cwd=output,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise StoreError(f"{self.name}: {arguments[0]} cannot be run: {error.strerror}") from error
        with self._running_lock:
            self._running = process
        if not self.connected:  # between the last look and now
            self._end()
        ended = _ends_within(process, self._limit_s)
        self._end()  # the command if it runs still, and what it left running
        with self._running_lock:
            self._running = None
        status = process.wait()
        if not ended:
            raise StoreTimeout(
                f"{self.name}: the command for {uuid} was ended after {self._limit_s:g} s (limit_s); "
                f"{told} has what it said{_last_words(told)}"
            )
        if status:
            raise StoreError(
                f"{self.name}: the command for {uuid} ended with status {status}: {shlex.join(arguments)}; "
                f"{told} has what it said{_last_words(told)}"
            )

    def _checked(self, wanted: Wanted, output: Path) -> Path:
        """The record in a command's output. Raises StoreError when it is not there, damaged, or another one."""
        others: list[str] = []
        for directory in record_directories(output):
            try:
                header = read_header(directory)
            except DamagedRecord as error:
                others.append(str(error))
                continue
            if not wanted.matches(header):
                others.append(f"{header.kind} {header.identity_key}/{header.predicate_key}")
                continue
            _check_model(directory, self.name)
            return directory
        seen = f"; it left {'; '.join(others[:5])}" if others else "; it left no record"
        raise StoreError(
            f"{self.name}: the command made no {wanted.kind} {wanted.identity_key}/{wanted.predicate_key} "
            f"for {wanted.uuid}{seen}. Has the code or the configuration changed since?"
        )


def record_directories(root: Path) -> Iterator[Path]:
    """Directories with a record's marker or header, from the top; links are not followed."""
    for directory, _names, files in os.walk(root):
        if MARKER in files or HEADER in files:
            yield Path(directory)


def _check_model(directory: Path, name: str) -> None:
    """The model is there and parses. Raises StoreError."""
    try:
        with opened(directory) as descriptor:
            data = read_bytes(descriptor, MODEL, str(directory))
            if data is None or MARKER not in os.listdir(descriptor):
                raise DamagedRecord(f"{directory}: has no {MODEL if data is None else MARKER}")
            parse_json(data, f"{directory}/{MODEL}")
    except (DamagedRecord, OSError) as error:
        raise StoreError(f"{name}: what the command made is no valid record: {error}") from error


def _last_words(told: Path) -> str:
    try:
        with open(told, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * _LAST_WORDS))
            text = file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
    return f", at the end: {text[-_LAST_WORDS:]}" if text else ""


def _ends_within(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait for the end of a process without reaping it: until then its group's number is nobody else's."""
    watched = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(min(seconds, 1e6) * 1000))
    finally:
        os.close(watched)


class Broker(BaseBroker):
    """`command://NAME`. Options: `command`, the template (see `Template`); `enabled`, without which nothing is run;
    `limit_s`, seconds one record may take; `index`, `place`: given by the session."""

    read_only = True
    calculates = True
    wants = frozenset({"index", "place"})

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, _OPTIONS)
        read_limits(config)
        if "command" in location.query or "enabled" in location.query:
            raise ConfigError("command, enabled: they belong in [stores.NAME.options], not in a URL")
        template = _template(config)
        _limit_s(config, location)
        if urls.truth(config, location, "enabled"):
            return [f"runs, when no other store has a record: {template}"]
        return [f"switched off: enabled = true would let it run: {template}"]

    def open(self, config: Mapping[str, Any]) -> CommandStore:
        self.validate(config)
        location = urls.split(config)
        index = urls.option(config, location, "index")
        if not index:
            raise ConfigError("index: name the index that describes the records, PROJECT/.machinable.sqlite")
        place = urls.option(config, location, "place")
        return CommandStore(
            config.get("name") or location.host or "command",
            location.url,
            Path(place) if place else own_place(),
            _template(config),
            Path(index),
            enabled=urls.truth(config, location, "enabled"),
            limit_s=_limit_s(config, location),
            limits=read_limits(config),
        )


def _template(config: Mapping[str, Any]) -> Template:
    text = config.get("command")
    if not isinstance(text, str):
        raise ConfigError("command: give the command that makes a record again, with {module}, {config}, {directory}")
    return Template(text)


def _limit_s(config: Mapping[str, Any], location: urls.Location) -> float:
    given = urls.option(config, location, "limit_s")
    try:
        seconds = LIMIT_S if given is None else float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"limit_s = {given!r}: give seconds, more than 0")
    return seconds
