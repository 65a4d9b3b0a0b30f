"""What a command shows while it works and when it has ended: progress on a terminal, then text or JSON.

Used by the command line. Progress goes to stderr and only to a terminal; results go to stdout. rich is loaded at the
first step of progress, so that short commands do not wait for it.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from daemon import render
from daemon.protocol import encode
from daemon.quantities import clock, count, plain, rate
from daemon.target import Target

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Reporter:
    """Bars for what moves, one for each transfer; silent where nobody looks."""

    cancelled = False  # Ctrl-C ends the process itself

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bars: Bars | None = None
        self._tasks: dict[tuple[str, ...], TaskID] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: dict[str, Any], /) -> None:
        if self._shown:
            self._update(self._started(), event)

    def _started(self) -> "Bars":
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            names = TextColumn("{task.description}", markup=False)
            facts = TextColumn("{task.fields[facts]}", markup=False)
            self._bars = Progress(
                names, BarColumn(bar_width=20), facts, console=Console(stderr=True, force_terminal=True), transient=True
            )
            self._bars.start()
        return self._bars

    def _update(self, bars: "Bars", event: dict[str, Any]) -> None:
        # Without a path it is about the whole command: one bar, whichever record it has come to.
        names = ("what", "uuid", "path", "store") if event.get("path") else ("what",)
        key = tuple(str(event.get(name, "")) for name in names)
        if event.get("over"):  # it ended, however far it was
            if key in self._tasks:
                bars.remove_task(self._tasks.pop(key))
            return
        if key not in self._tasks:
            self._tasks[key] = bars.add_task("", total=None, facts="")
        title = " ".join(plain(event[name]) for name in ("what", "path", "uuid", "store") if event.get(name))
        bars.update(self._tasks[key], description=title)
        total, done = event.get("size") or event.get("total"), event.get("done")
        share = render.share(event) if event.get("path") else counted(done, total)
        moving = (share, rate(event.get("rate")), clock(event.get("left_s")))
        facts = (*moving, plain(event.get("message", "")))
        bars.update(self._tasks[key], total=total, completed=done, facts="  ".join(filter(None, facts)))
        if total and done is not None and done >= total:
            bars.remove_task(self._tasks.pop(key))


def counted(done: int | None, total: int | None) -> str:
    """3 of 318, or how many so far."""
    if done is None:
        return ""
    return f"{count(done)} of {count(total)}" if total else count(done)


@contextmanager
def reporting(as_json: bool) -> Iterator[Reporter]:
    """A reporter for one command."""
    with Reporter(shown=sys.stderr.isatty() and not as_json and not os.environ.get("NO_PROGRESS")) as reporter:
        yield reporter


def perform(target: Target, command: str, args: dict[str, Any], *, as_json: bool) -> None:
    """Run a command, print its result, and end with its exit code (typer.Exit)."""
    with reporting(as_json) as reporter:
        result = target.run(command, args, reporter)
        while result.get("next"):  # a long listing comes in pages
            if not as_json:
                show(command, {**result, "next": None}, args, as_json=False)
                result = target.run(command, {**args, "after": result["next"]}, reporter)
                continue
            page = target.run(command, {**args, "after": result["next"]}, reporter)
            result = {**page, "records": result["records"] + page["records"]}
    show(command, result, args, as_json=as_json)
    raise typer.Exit(int(result.get("exit", 0)))


def show(command: str, result: dict[str, Any], args: dict[str, Any], *, as_json: bool) -> None:
    """A result on stdout."""
    if as_json:
        print_json(result)
        return
    for line in render.lines(command, result, args):
        print(line)


def print_json(value: dict[str, Any]) -> None:
    """One JSON document: a line for programs, indented for people."""
    line = encode(value).decode("ascii")
    if sys.stdout.isatty():
        line = json.dumps(json.loads(line), indent=2) + "\n"
    sys.stdout.write(line)


def keep_trace() -> str:
    """Write the traceback of the exception at hand where a report can find it, and say where."""
    import tempfile
    import traceback

    from daemon.directories import environment_directories

    place = environment_directories(os.environ)["state_dir"]
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=place, prefix="trace-", suffix=".txt")
        with os.fdopen(descriptor, "w") as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f"The traceback cannot be kept ({place}: {error.strerror}); RUNFS_DEBUG=1 shows it"
    return f"The traceback is in {name}; RUNFS_DEBUG=1 shows it"
