"""Random operations on a mount and on a plain directory: the same after each one, whatever goes wrong meanwhile.

`MODEL_EXAMPLES=500 make test T=tests/model` runs more of them; MODEL_STEPS makes them longer.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import machine
from tests.model.world import World
from tests.servers import Seaweed

pytestmark = pytest.mark.mounted
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "4"))
STEPS = int(os.environ.get("MODEL_STEPS", "25"))


class Worlds:
    """The world in use; a new one when its records are used up, or after a failure in it."""

    def __init__(self, place: Path, kind: str, seaweed: Seaweed | None) -> None:
        self._given = place, kind, seaweed
        self._made = 0
        self._world: World | None = None

    def world(self) -> World:
        if self._world is None or len(self._world.free) < 2:
            self.close()
            place, kind, seaweed = self._given
            self._made += 1
            self._world = World(place / f"w{self._made}", kind, seaweed)
            (place / f"w{self._made}").mkdir()
            self._world.__enter__()
        return self._world

    def close(self, *, failed: bool = False) -> None:
        if self._world is not None:
            if failed:
                print(self._world.mounted.log()[-4000:])
            self._world.__exit__(None, None, None)
            self._world = None


@pytest.fixture(params=["file", "s3"])
def worlds(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Worlds]:
    seaweed = request.getfixturevalue("seaweed") if request.param == "s3" else None
    made = Worlds(tmp_path, request.param, seaweed)
    yield made
    made.close()


def test_the_same_as_a_plain_directory(worlds: Worlds) -> None:
    class Example(machine(worlds.world())):  # type: ignore[misc]
        def __init__(self) -> None:
            type(self).world = worlds.world()
            super().__init__()

        def teardown(self) -> None:
            if sys.exc_info()[0] is not None:  # a step failed: what is left of the world tells nothing
                worlds.close(failed=True)
                return
            try:
                super().teardown()
            except BaseException:
                worlds.close(failed=True)
                raise

    run_state_machine_as_test(
        Example,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
        ),
    )
