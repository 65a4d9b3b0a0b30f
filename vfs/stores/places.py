"""Where a key's file is inside a directory store.

Used by `file.py`. Nothing here blocks. This module owns the layout:

- `<root>/<key>`: the plain place, which any tool can read.
- `<root>/.runfs.alt/...`: for a key that cannot have its plain place because a file has the name one of its
  directories needs, or a directory has its own name (`u/a` and `u/a/b` at once), or a part is longer than a
  file name may be, or a symbolic link is in the way (links are never followed). The key with `/` written as
  `+`, cut into names of at most 200 characters; all but the last end in `=`, so that a directory is never
  called like a file. Neither character occurs in a key.
- `<root>/.runfs.tmp/`: files being written, and the lock.
- `<root>/.runfs-store`: the marker.
"""

ALTERNATIVE = ".runfs.alt"
TEMPORARY = ".runfs.tmp"
MARKER = ".runfs-store"
HIDDEN = frozenset({ALTERNATIVE, TEMPORARY, MARKER})

_CUT = 200  # a file name has at most 255 bytes

Place = tuple[str, ...]


def plain(key: str) -> Place:
    """The plain place: the directories and the name."""
    return tuple(key.split("/"))


def alternative(key: str) -> Place:
    """The place for a key whose plain place is taken by something else."""
    flat = key.replace("/", "+")
    names = [flat[at : at + _CUT] for at in range(0, len(flat), _CUT)]
    return (ALTERNATIVE, *(name + "=" for name in names[:-1]), names[-1])


def key_of_alternative(names: Place) -> str | None:
    """The key of a file under `.runfs.alt` (names below that directory), or None where it is not one of
    ours."""
    flat = "".join(name.removesuffix("=") for name in names[:-1]) + names[-1]
    key = flat.replace("+", "/")
    return key if "=" not in key and alternative(key)[1:] == tuple(names) else None
