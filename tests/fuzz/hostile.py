"""Values that hurt parsers: strategies for hypothesis, and the worst ones by name."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

WORST: dict[str, bytes] = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "a huge number": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "a huge exponent": b'{"format": 1e999999999}',
    "not a number": b'{"format": NaN}',
    "infinity": b'{"format": -Infinity}',
    "half a surrogate": b'{"uuid": "\\ud800"}',
    "ten megabytes of text": b'{"uuid": "' + b"x" * 10_000_000 + b'"}',
    "ten megabytes of commas": b"," * 10_000_000,
    "one key a million times": b'{"a":1' + b',"a":1' * 1_000_000 + b"}",
    "another encoding": '{"format": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"format": 1}',
    "zeros": bytes(1_000_000),
    "nothing": b"",
    "null": b"null",
    "no object": b'"text"',
}

texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=st.characters(), max_size=20),  # surrogates too
    st.sampled_from(
        ["..", ".", "/", "../../x", "a/../b", "\0", "a\0b", "\ud800", "%2E%2E", "x" * 300, "\u202e", "-", " "]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**4000]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(texts, below, max_size=4), max_leaves=12
)


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here]
    if isinstance(value, dict):
        for key, below in value.items():
            found += _places(below, (*here, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            found += _places(below, (*here, number))
    return found


@st.composite
def spoiled(draw: st.DrawFn, sound: Any) -> Any:
    """A sound value with a few parts exchanged, removed, or given another name."""
    value = copy.deepcopy(sound)
    for _change in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            continue
        holder = value
        for part in place[:-1]:
            holder = holder[part]
        kind = draw(st.sampled_from(["exchange", "exchange", "remove", "add"]))
        if kind == "exchange":
            holder[place[-1]] = draw(values)
        elif kind == "remove":
            del holder[place[-1]]
        elif isinstance(holder, dict):
            holder[draw(texts)] = draw(values)
        else:
            holder.append(copy.deepcopy(holder[place[-1]]))
    return value


def dumped(value: Any) -> bytes:
    """As JSON, with whatever Python's own parser would take again."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of too many digits
        return repr(value).encode("utf-8", "surrogatepass")


def documents(sound: Any) -> st.SearchStrategy[bytes]:
    """Spoiled documents, any JSON, and any bytes."""
    return st.one_of(spoiled(sound).map(dumped), values.map(dumped), st.binary(max_size=200))
