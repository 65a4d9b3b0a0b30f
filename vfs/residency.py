"""Where a unit's files are, as one table. Used by units, evict, restore and crash recovery. Pure.

A unit (a root record with everything nested in it) is in exactly one state. What a crash in a state leaves, and
what the next start does with it, is `RECOVERY`.
"""

from enum import Enum


class State(Enum):
    """State of a unit; the value is what the journal holds (a resident unit has no row there)."""

    RESIDENT = "resident"  # the working directory is real and holds every byte
    EVICTING = "evicting"  # the shadow is built; the exchange may or may not have happened
    EVICTED = "evicted"  # the working directory is a link into the mount; the shadow holds the files
    RESTORING = "restoring"  # a whole copy is beside the link; the exchange may or may not have happened


TRANSITIONS: frozenset[tuple[State, State]] = frozenset(
    {
        (State.RESIDENT, State.EVICTING),  # intent recorded, then the exchange
        (State.EVICTING, State.EVICTED),  # what was set aside is gone
        (State.EVICTING, State.RESIDENT),  # refused at the last comparison, or recovered before the exchange
        (State.EVICTED, State.RESTORING),
        (State.RESTORING, State.RESIDENT),
        (State.RESTORING, State.EVICTED),  # refused, or recovered before the exchange
        (State.RESIDENT, State.EVICTED),  # a record known only from a store: it never was here
    }
)

# (state in the journal, the working directory is a link) -> state to finish towards
RECOVERY: dict[tuple[State, bool], State] = {
    (State.EVICTING, True): State.EVICTED,
    (State.EVICTING, False): State.RESIDENT,
    (State.RESTORING, True): State.EVICTED,
    (State.RESTORING, False): State.RESIDENT,
    (State.EVICTED, True): State.EVICTED,
    # Somebody put a real directory where the link was: it is theirs, and both are kept (see doctor).
    (State.EVICTED, False): State.EVICTED,
}


class FileState(Enum):
    """State of one file, as shown by `status PATH`. It is derived, never stored."""

    RESIDENT = "resident"
    PARTIAL = "partial"
    EVICTED = "evicted"
    DIRTY = "dirty"


def allowed(before: State, after: State) -> bool:
    """Whether a unit may go from one state to another."""
    return (before, after) in TRANSITIONS
