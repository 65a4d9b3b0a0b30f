"""A project's own script that runs a record's module again with its configuration, and the command that calls it."""

import shlex
import sys

from tests.projects import Project

SCRIPT = '''
"""Runs a record's module again with its configuration; results go to the directory that is asked for."""

import json, os, sys
from machinable import Project, Storage, get

module, config, directory, project = sys.argv[1:5]
sys.path.insert(0, project)
with open(os.path.join(project, "relaunched"), "a") as counted:
    counted.write(module + "\\n")
print("relaunching", module)
with Project(project), Storage(directory):
    get(module, json.loads(config)).launch()
'''
COMMAND = f"{shlex.quote(sys.executable)} {{project}}/relaunch.py {{module}} {{config}} {{directory}} {{project}}"


def make_relaunchable(project: Project) -> Project:
    """Put the script into a project."""
    (project.path / "relaunch.py").write_text(SCRIPT)
    return project


def relaunches(project: Project) -> int:
    """How often the script was run."""
    counted = project.path / "relaunched"
    return len(counted.read_text().split()) if counted.exists() else 0
