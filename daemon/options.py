"""Parameters that several commands share, so that each has one spelling and one help text."""

from pathlib import Path
from typing import Annotated

import typer

from daemon import complete

Uuids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[UUID]...", help="Records; - reads them from stdin.", autocompletion=complete.uuids),
]
Mount = Annotated[
    Path | None,
    typer.Option("--mount", metavar="MOUNTPOINT", help="The mount that is meant.", autocompletion=complete.mountpoints),
]
Project = Annotated[
    Path | None, typer.Option("--project", metavar="DIR", help="The project whose index is meant.", file_okay=False)
]
Index = Annotated[
    Path | None,
    typer.Option("--index", metavar="FILE", help="The machinable index (.machinable.sqlite).", dir_okay=False),
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The configuration file.", dir_okay=False)
]
Stores = Annotated[
    list[str] | None,
    typer.Option("--store", metavar="URL", help="A home, such as s3://bucket/prefix or file:///dir. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be done.")]
